"""The benchmark on a CPU: models in alternation, operators behind their correctness gate, bad arguments."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from vitrail.tools._common import kernel_cases
from vitrail.tools.benchmark import main


def test_models_are_compared(tmp_path: Path) -> None:
    files = [
        "--json",
        str(tmp_path / "rows.json"),
        "--csv",
        str(tmp_path / "rows.csv"),
        "--plot",
        str(tmp_path / "p.png"),
    ]
    sizes = ["--device", "cpu", "--batch-size", "2", "--img-size", "32", "--min-time", "0.02"]
    assert main(["biformer_n", "--compare", "timm/test_resnet", *sizes, *files]) == 0
    rows = {row["model"]: row for row in _rows(tmp_path / "rows.json")}
    assert rows.keys() == {"biformer_n", "timm/test_resnet"}
    assert all(row["torch"] and row["device"] for row in rows.values())
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_kernels_run_on_a_cpu(tmp_path: Path) -> None:
    assert main(["--kernels", "--device", "cpu", "--min-time", "0.01", "--json", str(tmp_path / "rows.json")]) == 0
    ours = [row for row in _rows(tmp_path / "rows.json") if row["implementation"] == "vitrail"]
    assert len(ours) == 8  # four cases, forward and forward+backward
    assert all(row["correct"] and row["p50_ms"] > 0 for row in ours)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_cases.window_attention

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) * (1.1 if kwargs["backend"] == "auto" else 1)

    monkeypatch.setattr(kernel_cases, "window_attention", wrong)
    assert main(["--kernels", "--device", "cpu", "--min-time", "0.01"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [["biformer_x"], ["biformer_n", "--precision", "int3"], ["accelerated/test_resnet"], ["mine/test_resnet"], []],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([*arguments, "--device", "cpu"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert capsys.readouterr().err


def _rows(path: Path) -> list[dict]:
    loaded = json.loads(path.read_text())
    return loaded if isinstance(loaded, list) else loaded["rows"]
