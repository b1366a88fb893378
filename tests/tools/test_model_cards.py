"""The cards say what the facts, the registry and the counts say, and can be read by the Hub; a model keeps it all."""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from timm.models import save_for_hf
from timm.models._hub import push_to_hf_hub

import vitrail
from vitrail.tools._common import cards
from vitrail.tools.model_cards import main, make_pages

NAMES = vitrail.list_models()
measure = functools.cache(cards.measure)  # takes about a second each


def test_every_card_is_up_to_date() -> None:
    pages = make_pages()
    assert set(pages) == {f"{name}.md" for name in NAMES} | {"README.md", "benchmarks/README.md"}
    stale = [name for name, text in pages.items() if (cards.FOLDER / name).read_text() != text]
    assert not stale, "run python -m vitrail.tools.model_cards"


def test_every_parameter_count_is_right() -> None:
    measured = cards.read_measured()
    assert {name: cards.count_parameters(name) for name in NAMES} == {n: measured[n]["parameters"] for n in NAMES}


def test_the_counts_of_a_draw_are_right() -> None:
    drawn = random.Random(0).sample(NAMES, 8)
    measured = cards.read_measured()
    assert [measure(name) for name in drawn] == [measured[name] for name in drawn]


@pytest.mark.slow
def test_all_counts_are_right() -> None:
    assert {name: measure(name) for name in NAMES} == cards.read_measured()


def test_the_count_on_shapes_alone_is_that_of_a_real_run() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model("biformer_n").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    assert measure("biformer_n") == {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": counter.get_total_flops() / 2e9,
        "input_size": [3, 32, 32],
        "strides": [2, 4, 8, 16],
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_reads_the_header(name: str) -> None:
    path = cards.FOLDER / f"{name}.md"
    card, facts = ModelCard.load(path), cards.read_facts()[name]
    assert card.data.model_name == name
    assert card.data.library_name == "timm"
    assert {"timm", "vitrail"} <= set(card.data.tags)
    assert card.data.license
    wanted = {value for key, value in facts.get("published", {}).items() if key in ("top1", "top5")}
    results = card.data.eval_results or []
    theirs = [r for r in results if r.source_name == "Reported by the paper, not measured here"]
    assert {r.metric_value for r in theirs} == wanted
    assert all("arxiv.org" in r.source_url and "as the paper says" in r.metric_name for r in theirs)
    ours = [r for r in results if r not in theirs]
    assert all("measured by this project" in r.metric_name for r in ours)
    measured = {own[key] for own in facts.get("measured_here", []) for key in ("top1", "top5") if key in own}
    assert {r.metric_value for r in ours} == measured
    assert not any(r.verified for r in results)


def test_no_card_types_what_is_counted() -> None:
    """A count that the facts repeat must at least be the counted one."""
    measured = cards.read_measured()
    for name, facts in cards.read_facts().items():
        assert not {key for key in facts["rows"] if "GMACs" in key or key.startswith("Parameters, ")}, name
        published = facts.get("published", {}).get("gmacs")
        if published:
            assert abs(float(published) / measured[name]["gmacs"] - 1) < 0.12, name


def test_links_and_code_in_cards() -> None:
    index = (cards.FOLDER / "README.md").read_text()
    links = re.findall(r"\]\(([\w.]+\.md)\)", index)
    assert {f"{name}.md" for name in NAMES} <= set(links)
    assert all((cards.FOLDER / link).is_file() for link in links)
    code = re.search(r"```python\n(.*?)```", (cards.FOLDER / "biformer_n.md").read_text(), re.S)
    assert code
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    assert scope["logits"].shape == (1, 10)
    assert [m.shape[1] for m in scope["maps"]] == [32, 64, 128, 256]


def test_a_stale_card_is_reported_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in filter(Path.is_file, cards.FOLDER.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "davit_t.md").write_text("old")
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert "davit_t.md" in capsys.readouterr().err
    assert main(["--folder", str(tmp_path)]) == 0
    assert main(["--check", "--folder", str(tmp_path)]) == 0
    facts = yaml.safe_load((tmp_path / "facts.yaml").read_text())
    del facts["rmt_t"]
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(facts))
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert "disagree about rmt_t" in capsys.readouterr().err


_KEPT = ("interpolation", "crop_pct", "first_conv", "classifier", "license", "origin_url", "paper_ids")


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", ["biformer_n", "l2vit_n", "vsa_swin_n", "rmt_n", "dinat_n", "gated_swinrmt_swat_n"])
def test_a_model_comes_back_from_its_hub_folder(name: str, in_chans: int, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=7, in_chans=in_chans, drop_rate=0.1).eval()
    config = {"label_names": list("abcdefg"), "num_classes": 7}
    save_for_hf(model, tmp_path, model_config=config, safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=in_chans).eval()
    image = torch.rand(1, in_chans, 32, 32)
    assert torch.equal(again(image), model(image))
    assert type(again) is type(model)
    old, new = model.pretrained_cfg, again.pretrained_cfg
    assert {key: new.get(key) for key in _KEPT} == {key: old.get(key) for key in _KEPT}
    assert tuple(new["label_names"]) == tuple("abcdefg")
    assert tuple(new["input_size"]) == (in_chans, *old["input_size"][1:])
    if in_chans == 3:  # timm averages what belongs to three channels for others
        assert [*new["mean"], *new["std"]] == [*old["mean"], *old["std"]]


def test_what_is_pushed_to_the_hub_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _hub

    class Api:
        """Takes the place of the Hub."""

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def file_exists(self, **kwargs: Any) -> bool:
            return False

        def upload_folder(self, *, folder_path: str, **kwargs: Any) -> str:
            for path in Path(folder_path).iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return "done"

    monkeypatch.setattr(_hub, "HfApi", lambda **kwargs: Api())
    model = timm.create_model("biformer_n", num_classes=7).eval()
    header = yaml.safe_load((cards.FOLDER / "biformer_n.md").read_text().split("---")[1])
    push_to_hf_hub(model, "someone/biformer_n", safe_serialization=True, model_card={"description": "ours", **header})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(image), model(image))
    assert "ours" in (tmp_path / "README.md").read_text()
