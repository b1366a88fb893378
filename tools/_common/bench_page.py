"""The page of benchmarks, from the result files of `tools/benchmark.py` and `tools/train.py`: rows in, text out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vitrail.tools._common.bench_tables import BESIDE, kernel_label, products_ms
from vitrail.tools._common.table import Row

_INTRODUCTION = """\
# Benchmarks

Made by `python -m vitrail.tools.model_cards` from the JSON files beside this page, which hold all figures as
`vitrail.tools.benchmark` wrote them, with device, versions and commit; edit nothing here. Figures of one table come
from one machine; those of a case, and a model and its reference, from one run in alternation.

To measure your own machine:

```sh
python -m vitrail.tools.benchmark --kernels --precision bf16 --json kernels.json  # --peers fast: in a few minutes
python -m vitrail.tools.benchmark --kernels --part 1/2 --turns /tmp/turns ...  # several processes share the work
python -m vitrail.tools.benchmark --kernels --host --peers fast --precision bf16 --json host.json
python -m vitrail.tools.benchmark --models --precision bf16 --json models.json
python -m vitrail.tools.benchmark --heads --precision amp-bf16 --json heads.json
```
"""
_OPERATORS = """\
## Operators

Milliseconds on the GPU, replayed as CUDA graphs on inputs that rotate, so that none waits in the cache; medians. The
floor is the time in which the inputs could be read and the results written once, at the speed of a large copy; "of the
floor" is its share of our time. It is the roofline of everything but the cases whose floor names products, too: a large
matrix product would take that long for the same operations. "others" is the fastest other way to do the whole job, and
how many times our time it takes. Before it is timed every implementation is compared with the definition in float64,
output and gradients; ours may be off by twice what the eager definition is in the same dtype, a peer by ten times.
`routing_layer` is BiFormer's whole attention layer; its choice of routes is checked in float32. Memory is what a call
allocates at most. Of implementations with a * a change of layout that the others do is not timed.
"""
_HOST = """\
## Host

Microseconds that a call keeps the host, without waiting for the GPU, on small maps: what a model spends in Python and
launches where nothing captures it. Medians.
"""
_MODELS = """\
## Models

Images per second with random weights, medians; in brackets the speed against the reference, in alternation with which
each model ran in the same way. Training is forward, cross-entropy and backward. Memory is the most that a step of the
eager model takes, weights included. Before one of ours is timed its logits are compared with those of its definition in
float64. accelerated/ is timm's model after `vitrail.accelerate`, eager/ ours with every operator by its definition,
authors/ that with BiFormer's attention in the steps of its authors, who gather keys and values. What follows a colon
are arguments.
"""
_NOT_MEASURED = """\
## What is not measured

Reading and preparing images, the optimiser, compiling, and other GPUs than those named. Inputs and weights are random:
routes and windows of a trained model may lie closer together. NATTEN is measured where it is installed. What a table
does not name was not run.
"""
_HEADS = """\
## Decode heads

Decode heads of segmenters for 150 classes on the maps of one backbone: VWFormer's, the same function as its authors
write it out, and UPerNet's, in alternation. GMACs are those of one image; with the backbone, ConvNeXt-T's are added.
Inference / training, which is forward and backward; speed is against UPerNet's, memory what a step takes at most
beside weights and maps. Times of a CPU are processor time, of all threads together.
"""
_SCALING = """\
## Training on several GPUs

Figures of `vitrail.tools.scale`: forward, loss, backward and AdamW on made-up images. Efficiency is the speed over that
of one process times their number. Steps that are launched operation by operation depend on the host, which the
processes share; those replayed as CUDA graphs do not.
"""
_PLANS = """\
## Training plans

**Computed** by `vitrail.tools.plan`, not measured: what one GPU holds at the peak of a step (forward, loss, backward,
AdamW) and sends in it. "use" is the first setting that fits, in the order of the columns. Weights, gradients and
AdamW's moments are those of replicas, where every GPU has all of them (DDP holds two sets of gradients); activations,
bytes sent and arithmetic those of the setting in use. Sending and arithmetic are least times: links and tensor cores
busy all the time.
"""
_VARIANTS = {"eager": ("eager", False), "compiled": ("compiled", False), "CUDA graph": ("eager", True)}
_VARIANTS["compiled, CUDA graph"] = ("compiled", True)
_PASSES = ("forward", "forward+backward")


def render(folder: Path) -> str:
    """The page for the result files in a folder.

    Raises:
        ValueError: A file holds neither rows of a benchmark nor the figures of a training.
    """
    kernels: list[Row] = []
    models: list[Row] = []
    heads: list[Row] = []
    scaling: list[Row] = []
    plans: list[Row] = []
    trainings: dict[str, Row] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "score" in content:
            trainings[path.name] = content
        elif isinstance(content, list) and content and "operator" in content[0]:
            kernels += content
        elif isinstance(content, list) and content and "head" in content[0]:
            heads += content
        elif isinstance(content, list) and content and "scaling" in content[0]:
            scaling += [row for row in content if "images_per_s" in row]  # the others are loss curves
        elif isinstance(content, list) and content and "largest_batch" in content[0]:
            plans += content
        elif isinstance(content, list) and content and "images_per_s" in content[0]:
            models += content
        else:
            raise ValueError(f"{path} is no result file of vitrail.tools.benchmark, scale, plan or train")
    on_device = [row for row in kernels if not row["host_time"]]
    on_host = [row for row in kernels if row["host_time"]]
    one_kernel = ("operator", "case", "pass", "implementation")
    one_model = ("model", "mode", "variant", "cuda_graph", "batch_size", "height", "width")
    one_head = ("head", "mode", "batch_size", "height", "width")
    one_scaling = ("model", "mode", "scaling", "launch", "processes", "batch_per_process")
    parts = [
        _INTRODUCTION,
        _section(_OPERATORS, on_device, one_kernel, _operators),
        _section(_HOST, on_host, one_kernel, _host),
        _section(_MODELS, models, one_model, _models),
        _section(_HEADS, heads, one_head, _heads),
        _NOT_MEASURED if kernels or models else "",
        _section(_SCALING, scaling, one_scaling, _scaling),
        _plans(plans),
        _trainings(trainings),
    ]
    return "\n".join(part for part in parts if part)


def _section(introduction: str, rows: Sequence[Row], keys: Sequence[str], show: Any) -> str:
    """A chapter with one part for every machine, software and precision that was measured; "" without rows."""
    parts = [introduction] if rows else []
    for title, members in _grouped(rows, _where).items():
        measured = _grouped(members, lambda row: tuple(row[key] for key in keys))
        newest = [max(found, key=_age) for found in measured.values()]
        parts.append(f"### {title}\n\n{show(newest)}")
    return "\n".join(parts)


def _age(row: Row) -> tuple[bool, str]:
    """Order of rows that tell the same: figures count more than their absence, then the date counts."""
    figure = next((row[name] for name in ("p50_ms", "images_per_s", "latency_p50_ms") if name in row), None)
    return figure is not None, row["date"]


def _grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _where(row: Row) -> str:
    """Machine, software, precision, commit and day."""
    software = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "timm") if row[name])
    precision = row.get("dtype") or row.get("precision") or row.get("amp") or "float32"
    threads = row.get("threads")
    device = row["device"] + (f" ({threads} thread{'s' if threads > 1 else ''})" if threads else "")
    return f"{device}, {precision}; {software}; commit {row['commit'] or 'unknown'}, {row['date'][:10]}"


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]], n_left: int) -> str:
    """A Markdown table whose first `n_left` columns are flush left."""
    rule = ["---"] * n_left + ["---:"] * (len(titles) - n_left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *lines)) + "\n"


def _operators(rows: list[Row]) -> str:
    parts = [f"A large copy moves {rows[0]['copy_bytes_per_s'] / 1e9:,.0f} GB/s.\n", _summary(rows)]
    for operator, members in _grouped(rows, lambda row: row["operator"]).items():
        lines = [_details(found) for found in _grouped(members, lambda r: (r["case"], r["implementation"])).values()]
        titles = ("case", "implementation", "error", "forward", "forward + backward", "ours is", "memory MB")
        parts.append(f"<details><summary>{operator}</summary>\n\n{_table(titles, lines, 2)}\n</details>\n")
    return "\n".join(parts)


def _summary(rows: list[Row]) -> str:
    """One line a case: the floor, ours, the floor's share, and the fastest of the others, forward / with backward."""
    lines = []
    for (operator, case), members in _grouped(rows, lambda row: (row["operator"], row["case"])).items():
        passes = _grouped(members, lambda row: row["pass"])
        ours = [_of(passes.get(kind, []), "vitrail") for kind in _PASSES]
        others = [_fastest_other(passes.get(kind, [])) for kind in _PASSES]
        lines.append(
            (
                operator,
                case,
                _both(ours, _floor),
                _both(ours, lambda row: f"{row['p50_ms']:.3f}"),
                _both(ours, lambda row: f"{row['bandwidth_share']:.0%}"),
                _both(others, lambda row: f"{row['implementation']} {_shown(row['ours_speedup'], '.2f', 'x')}"),
            )
        )
    return _table(("operator", "case", "floor, ms", "ours, ms", "of the floor", "others"), lines, 2)


def _floor(row: Row) -> str:
    products = products_ms(row)
    return f"{row['floor_ms']:.3f}" + (f" (products {products:.3f})" if products > row["floor_ms"] else "")


def _of(rows: Iterable[Row], implementation: str) -> Row | None:
    return next((r for r in rows if r["implementation"] == implementation and r["p50_ms"] is not None), None)


def _fastest_other(rows: Iterable[Row]) -> Row | None:
    timed = [row for row in rows if row["p50_ms"] is not None and row["whole_job"]]
    others = [row for row in timed if not row["implementation"].startswith("vitrail")]
    return min(others, key=lambda row: row["p50_ms"], default=None)


def _both(rows: Iterable[Row | None], show: Any) -> str:
    return " / ".join("-" if row is None else show(row) for row in rows)


def _details(rows: list[Row]) -> tuple[str, ...]:
    """A line for one implementation of a case, from the rows of both passes."""
    first = rows[0]
    passes = {row["pass"]: row for row in rows}
    noted = next((row for row in rows if row["note"]), first)
    return (
        first["case"],
        kernel_label(noted),
        _shown(first["relative_error"], ".1e"),
        *(_shown(passes.get(kind, {}).get("p50_ms"), ".3f") for kind in _PASSES),
        " / ".join(_shown(passes.get(kind, {}).get("ours_speedup"), ".2f", "x") for kind in _PASSES),
        " / ".join(_shown(_in_mb(passes.get(kind, {})), ",.0f") for kind in _PASSES),
    )


def _in_mb(row: Row) -> float | None:
    return None if row.get("peak_memory_bytes") is None else row["peak_memory_bytes"] / 1e6


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _host(rows: list[Row]) -> str:
    lines = []
    for found in _grouped(rows, lambda row: (row["operator"], row["case"], row["implementation"])).values():
        passes = {row["pass"]: row["p50_ms"] for row in found}
        times = (passes.get(kind) for kind in _PASSES)
        cells = ("-" if time is None else f"{time * 1e3:.1f}" for time in times)
        lines.append((found[0]["operator"], found[0]["case"], found[0]["implementation"], *cells))
    return _table(("operator", "case", "implementation", "forward", "forward + backward"), lines, 3)


def _models(rows: list[Row]) -> str:
    parts = []
    kinds = _grouped(rows, lambda row: (row["mode"], row["batch_size"], row["reference"]))
    for (mode, batch, reference), members in kinds.items():
        what = "Inference" if mode == "infer" else "Training"
        used = [name for name, key in _VARIANTS.items() if any(_variant(row) == key for row in members)]
        lines = [_model_line(found, used) for found in _grouped(members, lambda r: (r["model"], r["height"])).values()]
        titles = ("model", "at", "GMACs", *used, "memory MB")
        parts.append(f"{what}, batch {batch}, against `{reference}`:\n\n{_table(titles, lines, 1)}")
    return "\n".join(parts)


def _variant(row: Row) -> tuple[str, bool]:
    return row["variant"], row["cuda_graph"]


def _model_line(rows: list[Row], used: Sequence[str]) -> tuple[str, ...]:
    by_variant = {_variant(row): row for row in rows}
    flops = next((row["flops"] for row in rows if row["flops"]), None)
    eager = by_variant.get(_VARIANTS["eager"], {})
    return (
        rows[0]["model"],
        f"{rows[0]['height']}x{rows[0]['width']}",
        _shown(flops and flops / 2e9, ".2f"),
        *(_throughput(by_variant.get(_VARIANTS[name])) for name in used),
        _shown(_in_mb(eager), ",.0f"),
    )


def _throughput(row: Row | None) -> str:
    if row is None or row["images_per_s"] is None:
        return row["note"] if row and row["note"] else "-"
    beside = "" if row.get("alone", True) else f", {BESIDE}"
    return f"{row['images_per_s']:,.0f} ({_shown(row['speed_ratio'], '.2f', 'x')}{beside})"


def _heads(rows: list[Row]) -> str:
    """A line for each head and size, from the rows of both modes."""
    lines = []
    for found in _grouped(rows, lambda row: (row["height"], row["width"], row["head"])).values():
        first, modes = found[0], {row["mode"]: row for row in found}
        both = [modes[mode] for mode in ("infer", "train") if mode in modes]
        lines.append(
            (
                first["head"],
                f"{first['height']}x{first['width']}",
                f"{first['parameters'] / 1e6:.2f}",
                f"{first['flops'] / 2e9:.1f}",
                f"{first['model_flops'] / 2e9:.1f}",
                " / ".join(_shown(row["latency_p50_ms"], ",.1f") for row in both),
                " / ".join(_shown(row["speed_ratio"], ".2f", "x") for row in both),
                " / ".join(_shown(_in_mb(row), ",.0f") for row in both),
            )
        )
    batches = " / ".join(dict.fromkeys(str(row["batch_size"]) for row in rows))
    titles = ("head", "at", "params M", "GMACs", "with backbone", f"ms, batch {batches}", "speed", "memory MB")
    return _table(titles, lines, 1)


def _scaling(rows: list[Row]) -> str:
    """Speed, efficiency and memory of every setting."""
    lines = [
        (
            *(str(row[key]) for key in ("model", "mode", "scaling", "launch", "processes", "batch_per_process")),
            f"{row['images_per_s']:,.0f}",
            f"{row['efficiency']:.1%}",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        )
        for row in rows
    ]
    titles = ("model", "mode", "scaling", "launch", "processes", "images each", "images/s", "efficiency", "memory MB")
    return _table(titles, lines, 4)


def _plans(rows: list[Row]) -> str:
    """A table for every kind of training, a line for every model."""
    parts = [_PLANS] if rows else []
    for title, members in _grouped(rows, _plan_title).items():
        settings = list(dict.fromkeys(row["setting"] for row in members))
        lines = [_plan_line(found, settings) for found in _grouped(members, lambda row: row["model"]).values()]
        titles = ("model", "use", "weights MB", "gradients MB", "AdamW MB", "activations MB",
                  *(f"{name}, GB" for name in settings),
                  "sent inside a host MB", "to others MB", "sending ms", "arithmetic ms")  # fmt: skip
        parts.append(f"### {title}\n\n{_table(titles, lines, 2)}")
    return "\n".join(parts)


def _plan_title(row: Row) -> str:
    height, width = row["img_size"]
    inside, between = (speed / 1e9 for speed in row["link_bytes_per_s"])
    gpus, each = row["gpus"], row["batch_per_gpu"]
    return (
        f"{each * gpus:,} images of {height}x{width}, {row['amp'] or 'float32'}, on {gpus} GPUs, {each} each; "
        f"{row['gpus_per_host']} GPUs a host, {row['memory_bytes'] / 1e9:.0f} GB a GPU, {inside:g} GB/s inside a host, "
        f"{between:g} GB/s to others"
    )


def _plan_line(rows: list[Row], settings: Sequence[str]) -> tuple[str, ...]:
    by_setting = {row["setting"]: row for row in rows}
    used = next((row for row in rows if row["fits"]), None)
    row = used or rows[0]
    peaks = (by_setting[name]["peak_bytes"] / 1e9 for name in settings)
    parts = rows[0]["parts"]
    return (
        row["model"],
        used["setting"] if used else f"{max(row['largest_batch'] for row in rows)} images at a time",
        f"{parts['parameters'] / 1e6:,.0f}",
        f"{parts['gradients'] / 1e6:,.0f}",
        f"{parts['optimizer state'] / 1e6:,.0f}",
        f"{row['parts']['activations'] / 1e6:,.0f}",
        *(f"{peak:.1f}" for peak in peaks),
        f"{row['sent_inside_bytes'] / 1e6:,.0f}",
        f"{row['sent_between_bytes'] / 1e6:,.0f}",
        f"{row['communication_ms']:.2f}",
        f"{row['arithmetic_ms']:.1f}",
    )


def _trainings(results: dict[str, Row]) -> str:
    """Trainings whose figures lie here; the model's card says what they are."""
    if not results:
        return ""
    lines = [
        (
            f"[{name.removesuffix('.json')}]({name})",
            str(found["score"]),
            f"{found['best']:.2f}",
            str(found["iterations"]),
            str(found["device"]),
            f"torch {found['versions']['torch']}",
        )
        for name, found in results.items()
    ]
    titles = ("training", "score", "best", "iterations", "device", "software")
    return f"## Trainings\n\nFigures of `vitrail.tools.train`.\n\n{_table(titles, lines, 1)}"
