"""Model cards from one file of facts, the registry and what is measured: text in, text out.

`model_cards/facts.yaml` holds what somebody has to know (papers, published results, remarks); licence, source, input
and weights come from the registered configuration; parameters and multiply-adds are counted (`measure`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import PretrainedCfg
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.models._fetch import file_digest
from vitrail.models._registry import configurations, is_shipped
from vitrail.models._weights import locate

FOLDER = Path(vitrail.__file__).parent / "model_cards"
Facts = dict[str, Any]


def read_facts(folder: Path = FOLDER) -> dict[str, Facts]:
    """The facts of every model, by name."""
    return yaml.safe_load((folder / "facts.yaml").read_text())


def read_measured(folder: Path = FOLDER) -> dict[str, Facts]:
    """What was counted for every model, by name."""
    return json.loads((folder / "measured.json").read_text())


def count_parameters(name: str) -> int:
    """Parameters of a model with its default classifier, without any memory for them."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(name: str) -> Facts:
    """Parameters, and multiply-adds of one default image in 10^9 (None for models of point clouds), by shapes alone."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = timm.models.get_pretrained_cfg(name).input_size
    if size is None:
        return {"parameters": parameters, "gmacs": None, "input_size": None, "strides": None}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *size, device="meta"))
    strides = [entry["reduction"] for entry in model.feature_info]
    gmacs = counter.get_total_flops() / 2e9
    return {"parameters": parameters, "gmacs": gmacs, "input_size": list(size), "strides": strides}


def render(name: str, facts: Facts, measured: Facts) -> str:
    """The card of a model."""
    cfg = timm.models.get_pretrained_cfg(name)
    parts = [
        f"---\n{_header(name, facts, cfg)}---\n# {facts['title']} (`{name}`)",
        facts["about"],
        facts.get("links", ""),
        "## Facts",
        _table(name, facts, measured),
        _counting_note(facts, measured),
        *(f"## {title}\n\n{text}" for title, text in facts.get("sections", {}).items()),
        f"## Weights\n\n{_weights(name, facts, cfg)}",
        _own_results(facts),
        f"## Use\n\n```python\n{_example(name, measured)}\n```" if measured["input_size"] else "",
        f"## Checked here\n\n{facts['checked']}" if "checked" in facts else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _header(name: str, facts: Facts, cfg: PretrainedCfg) -> str:
    header = {
        "tags": facts.get("tags", ["image-classification", "timm", "vitrail"]),
        "library_name": "timm",
        "pipeline_tag": facts.get("pipeline_tag", "image-classification"),
        "license": facts["license"],
    }
    if facts.get("datasets"):
        header["datasets"] = facts["datasets"]
    header["model-index"] = [{"name": name, "results": _results(facts, cfg)}]
    return yaml.safe_dump(header, sort_keys=False, width=1000, allow_unicode=True)


def _results(facts: Facts, cfg: PretrainedCfg) -> list[Facts]:
    """Results in the Hub's form; each names who measured it."""
    published, results = facts.get("published", {}), []
    if "top1" in published:
        result = _result("ImageNet-1k", "imagenet-1k", published, "as the paper says")
        results.append({**result, "source": {"name": "Reported by the paper, not measured here", "url": _paper(cfg)}})
    for own in facts.get("measured_here", []):
        results.append(_result(own["dataset"], own.get("type", "digits"), own, "measured by this project"))
    return results


def _result(dataset: str, identifier: str, values: Facts, whose: str) -> Facts:
    titles = {"top1": f"top-1 accuracy (%), {whose}", "top5": f"top-5 accuracy (%), {whose}"}
    metrics = [
        {"type": "accuracy", "name": title, "value": values[key], "verified": False}
        for key, title in titles.items()
        if key in values
    ]
    task = {"type": "image-classification", "name": "Image Classification"}
    return {"task": task, "dataset": {"name": dataset, "type": identifier}, "metrics": metrics}


def _paper(cfg: PretrainedCfg) -> str:
    first = cfg.paper_ids if isinstance(cfg.paper_ids, str) else (cfg.paper_ids or ("",))[0]
    return f"https://arxiv.org/abs/{first.removeprefix('arXiv:')}"


def _table(name: str, facts: Facts, measured: Facts) -> str:
    published = facts.get("published", {})
    rows = dict(facts.get("rows", {}))
    said = f" (published: {published['parameters']})" if "parameters" in published else ""
    rows["Parameters, counted"] = f"{measured['parameters']:,}{said}"
    if measured["input_size"]:
        _, height, width = measured["input_size"]
        said = f" (published: {published['gmacs']})" if "gmacs" in published else ""
        rows[f"GMACs at {height} x {width}, counted"] = f"{measured['gmacs']:.4g}{said}"
    if "top1" in published:
        rows["ImageNet-1k accuracy, the paper's"] = _accuracy(published)
    for own in facts.get("measured_here", []):
        rows[f"{own['dataset']}, measured here"] = _accuracy(own)
    if measured["input_size"]:
        least = (timm.models.get_pretrained_cfg(name).min_input_size or (3, 32, 32))[1:]
        rows["Input"] = f"RGB, any size from {least[0]} x {least[1]}; {height} x {width} by default"
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _accuracy(values: Facts) -> str:
    five = f", {values['top5']:g} % top-5" if "top5" in values else ""
    note = f" ({values['note']})" if "note" in values else ""
    return f"{values['top1']:g} % top-1{five}{note}"


def _counting_note(facts: Facts, measured: Facts) -> str:
    if not measured["input_size"]:
        return ""
    more = f"; {facts['not_counted']}" if "not_counted" in facts else ""
    return (
        "GMACs are half the count of `torch.utils.flop_counter`: convolutions and matrix products, attention included"
        f"{more}."
    )


def _weights(name: str, facts: Facts, cfg: PretrainedCfg) -> str:
    """Where the weights are; a text of the facts adds to it, or replaces it where there is nothing to download."""
    said = facts.get("weights", "").strip()
    by_hand = any("browser" in note or "by hand" in note for note in cfg.notes or ())
    if shipped := [one for one in configurations(name) if is_shipped(one)]:
        return "\n\n".join(filter(None, [*(_shipped_weights(name, one) for one in shipped), said]))
    if cfg.has_weights and cfg.tag and not cfg.tag.startswith("start"):
        place = (
            f"[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id}), as timm hosts them"
            if cfg.hf_hub_id
            else f"<{cfg.url}>; whether the address still works could not be checked from here"
        )
        text = (
            f"The authors' weights (`{name}.{cfg.tag}`, {cfg.license}): {place}.\n"
            f'`timm.create_model("{name}", pretrained=True)` fetches, verifies and loads them; the authors\' own file '
            "loads as well.\nThis project has not trained or evaluated them itself."
        )
        return f"{text}\n\n{said}" if said else text
    convert = (
        f"`python -m vitrail.tools.weights convert {name} FILE` turns such a file into safetensors in this package's "
        "layout."
    )
    text = said or " ".join(cfg.notes or ()) or "None are public."
    return f"{text}\n\n{convert}" if by_hand else text


def _shipped_weights(name: str, cfg: PretrainedCfg) -> str:
    path = locate(name, cfg)
    return (
        f"`{name}.{cfg.tag}`, weights of this project in the package, {cfg.description} and stored in float16 "
        f"({path.stat().st_size / 1e6:.1f} MB, {cfg.license}):\n"
        f'`timm.create_model("{name}.{cfg.tag}", pretrained=True)` verifies and loads them; no network is needed. '
        "SHA-256:\n"
        f"`{file_digest(path)}`"
    )


def _own_results(facts: Facts) -> str:
    how = "\n\n".join(own["how"] for own in facts.get("measured_here", []) if own.get("how"))
    return f"## Measured here\n\n{how}" if how else ""


def _example(name: str, measured: Facts) -> str:
    size = ", ".join(map(str, measured["input_size"]))
    return (
        "import timm\nimport torch\nimport vitrail\n\n"
        f'model = timm.create_model("{name}", num_classes=10).eval()\n'
        f"logits = model(torch.randn(1, {size}))  # (1, 10)\n\n"
        f'backbone = timm.create_model("{name}", features_only=True).eval()\n'
        f"maps = backbone(torch.randn(1, {size}))  # strides {', '.join(map(str, measured['strides']))}"
    )


def render_index(facts: dict[str, Facts], measured: dict[str, Facts]) -> str:
    """The page that lists all cards."""
    lines = [
        "# Model cards",
        "",
        "Made by `python -m vitrail.tools.model_cards` from `facts.yaml`, the registry and counts (`measured.json`); "
        "edit the facts, not the cards.",
        "Accuracies on ImageNet-1k are the papers', not measured here.",
        "",
        "| model | parameters | GMACs | at | ImageNet-1k top-1, paper | weights |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in sorted(facts):
        counted, top1 = measured[name], facts[name].get("published", {}).get("top1")
        size = counted["input_size"][-1] if counted["input_size"] else None
        cells = (f"{counted['parameters'] / 1e6:.1f}M", _shown(counted["gmacs"]), _shown(size), _shown(top1))
        lines.append(f"| [{name}]({name}.md) | {' | '.join(cells)} | {_access(name)} |")
    return "\n".join([*lines, "", "[VWFormer](vwformer.md) is a decoder for segmenters, not an entry point.", ""])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _access(name: str) -> str:
    cfg = timm.models.get_pretrained_cfg(name)
    if any(map(is_shipped, configurations(name))):
        return "included"
    if cfg.has_weights:
        return "start" if (cfg.tag or "").startswith("start") else "download"
    return "by hand" if any("browser" in note or "by hand" in note for note in cfg.notes or ()) else "none"
