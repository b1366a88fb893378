"""The page of benchmarks shows what the result files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vitrail.tools._common.bench_page import render
from vitrail.tools._common.cards import FOLDER
from vitrail.tools.benchmark import main

_QUICK = ["--device", "cpu", "--min-time", "1e-4"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of a CPU."""
    folder = tmp_path_factory.mktemp("results")
    assert main(["--kernels", "strip_gate", "linear_attention", *_QUICK, "--json", str(folder / "kernels.json")]) == 0
    host = ["--kernels", "strip_gate", "--host", "--peers", "fast"]
    assert main([*host, *_QUICK, "--json", str(folder / "host.json")]) == 0
    models = ["--models", "biformer_n", "timm/test_resnet", "--img-size", "32", "--batch-size", "2"]
    assert main([*models, *_QUICK, "--json", str(folder / "models.json")]) == 0
    return folder


def test_every_measured_figure_is_on_the_page(results: Path) -> None:
    page = render(results)
    lines = [re.split(r" \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    for row in json.loads((results / "kernels.json").read_text()):
        if row["p50_ms"] is not None:
            (line,) = (cells for cells in lines if cells[:2] == [row["case"], row["implementation"]])
            assert line[3 if row["pass"] == "forward" else 4] == f"{row['p50_ms']:.3f}"
    for row in json.loads((results / "host.json").read_text()):
        wanted = [row["operator"], row["case"], row["implementation"]]
        (line,) = (cells for cells in lines if cells[:3] == wanted)
        assert line[3 if row["pass"] == "forward" else 4] == f"{row['p50_ms'] * 1e3:.1f}"
    for row in json.loads((results / "models.json").read_text()):
        shown = [cells[3] for cells in lines if cells[0] == row["model"]]
        assert f"{row['images_per_s']:,.0f} ({row['speed_ratio']:.2f}x)" in shown
        assert all(text in page for text in (row["device"], row["torch"], row["date"][:10], row["commit"] or "unknown"))


def test_the_summary_names_the_fastest_other(results: Path) -> None:
    rows = json.loads((results / "kernels.json").read_text())
    others = [
        row
        for row in rows
        if row["operator"] == "linear_attention" and row["pass"] == "forward" and row["p50_ms"] is not None
        if not row["implementation"].startswith("vitrail")
    ]
    best = min(others, key=lambda row: row["p50_ms"])
    (line,) = (line for line in render(results).splitlines() if line.startswith("| linear_attention | "))
    assert f"| {best['implementation']} {best['ours_speedup']:.2f}x / " in line


def test_the_newest_figure_counts(results: Path, tmp_path: Path) -> None:
    rows = json.loads((results / "kernels.json").read_text())
    later = [{**row, "date": row["date"].replace("T", "U"), "p50_ms": 12345.0} for row in rows if row["p50_ms"]]
    skipped = [{**row, "date": "9999", "p50_ms": None, "note": "skipped: time limit"} for row in rows]
    (tmp_path / "a.json").write_text(json.dumps([*later, *skipped]))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    page = render(tmp_path)
    assert page.count("12345.000") >= len(later)
    assert "no CUDA graph" not in page


def test_heads_have_their_figures_of_both_modes(tmp_path: Path) -> None:
    facts = {"parameters": 7_620_000, "flops": 42e9, "model_flops": 52e9, "precision": "amp-bf16", "height": 512}
    facts |= {
        "width": 512,
        "device": "A",
        "torch": "2",
        "triton": None,
        "timm": None,
        "commit": "c",
        "date": "2000-01-01",
    }
    rows = [
        {**facts, "head": "UPerNet", "mode": mode, "batch_size": 2, "latency_p50_ms": time, "speed_ratio": 1.0,
         "peak_memory_bytes": 7e6}
        for mode, time in (("infer", 3.25), ("train", 9.5))
    ]  # fmt: skip
    rows.append({**rows[0], "width": 2048, **dict.fromkeys(("latency_p50_ms", "speed_ratio", "peak_memory_bytes"))})
    (tmp_path / "heads.json").write_text(json.dumps(rows))
    page = render(tmp_path)
    assert "| UPerNet | 512x512 | 7.62 | 21.0 | 26.0 | 3.2 / 9.5 | 1.00x / 1.00x | 7 / 7 |" in page
    assert "| UPerNet | 512x2048 | 7.62 | 21.0 | 26.0 | - | - | - |" in page


def test_what_has_no_figures_says_why(results: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = json.loads((results / "models.json").read_text())
    rows[0] |= dict.fromkeys(("images_per_s", "speed_ratio"), None) | {"note": "out of memory"}
    (tmp_path / "models.json").write_text(json.dumps(rows))
    assert "| out of memory |" in render(tmp_path)


def _plan(setting: str, fits: bool, **changes: Any) -> dict[str, Any]:
    return {
        "model": "test_vit", "setting": setting, "fits": fits, "img_size": [224, 320], "amp": "bf16", "gpus": 64,
        "gpus_per_host": 8, "batch_per_gpu": 2, "link_bytes_per_s": [3e11, 4e10], "memory_bytes": 78e9,
        "peak_bytes": 91_200_000_000, "largest_batch": None, "sent_inside_bytes": 198_600_000,
        "sent_between_bytes": 24_400_000, "communication_ms": 0.66, "arithmetic_ms": 12.34, "commit": "abc",
        "parts": {"parameters": 113_800_000, "gradients": 227_000_000, "optimizer state": 230_000_000,
                  "activations": 5_000_000_000}, **changes,
    }  # fmt: skip


def test_plans_name_the_first_setting_that_fits(tmp_path: Path) -> None:
    rows = [_plan("replicas", False), _plan("shards", True, peak_bytes=71e9), _plan("shards, checkpointing", True)]
    (tmp_path / "plan.json").write_text(json.dumps(rows))
    page = render(tmp_path)
    assert "128 images of 224x320, bf16, on 64 GPUs, 2 each; 8 GPUs a host, 78 GB a GPU, 300 GB/s inside" in page
    assert "| test_vit | shards | 114 | 227 | 230 | 5,000 | 91.2 | 71.0 | 91.2 | 199 | 24 | 0.66 | 12.3 |" in page
    assert "not measured" in page
    (tmp_path / "plan.json").write_text(json.dumps([_plan("replicas", False, largest_batch=1)]))
    assert "| test_vit | 1 images at a time |" in render(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"something": 1}]')
    with pytest.raises(ValueError, match="no result file"):
        render(tmp_path)


def test_committed_results_are_of_gpus_and_of_commits() -> None:
    """A figure of a machine that is nobody's target, or of code that nobody can look up, does not belong there."""
    for path in (FOLDER / "benchmarks").glob("*.json"):
        content = json.loads(path.read_text())
        for row in content if isinstance(content, list) else []:
            # A plan is of a GPU wherever it was made, and forms of heads differ in their work on any machine.
            if "largest_batch" not in row and "head" not in row:
                assert row["threads"] is None, f"{path.name} was measured on a CPU"
            assert row["commit"], f"{path.name} does not name its commit"
