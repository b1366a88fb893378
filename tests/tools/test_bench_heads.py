"""Decode heads are compared before they are timed, counted at every size and measured in turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")

from vitrail.tools._common import bench_heads, literal_vwformer
from vitrail.tools._common.measure import peak_memory
from vitrail.tools.benchmark import main

_QUICK = ["--heads", "--device", "cpu", "--min-time", "1e-4", "--img-size", "64"]


def test_rows_of_both_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_heads, "_WIDTH", 64)
    found: list[dict[str, Any]] = []
    for mode in ("infer", "train"):
        assert main([*_QUICK, "--mode", mode, "--json", str(tmp_path / "heads.json")]) == 0
        found += json.loads((tmp_path / "heads.json").read_text())
    assert [row["head"] for row in found] == 2 * list(bench_heads.NAMES)
    assert {row["mode"]: row["batch_size"] for row in found} == {"infer": 1, "train": 2}
    assert all(row["latency_p50_ms"] > 0 and row["peak_memory_bytes"] > 0 for row in found)
    assert all(row["forms_differ_by"] < 1e-4 for row in found)
    ours, literal, upernet = found[:3]
    assert ours["parameters"] == literal["parameters"] < upernet["parameters"]
    assert ours["flops"] < literal["flops"] < upernet["flops"]
    assert {row["model_flops"] - row["flops"] for row in found} == {ours["model_flops"] - ours["flops"]}
    assert upernet["speed_ratio"] == pytest.approx(1)
    assert "UPerNet" in capsys.readouterr().out


def test_heads_are_counted_as_published() -> None:
    counted = bench_heads._count((512, 512))
    heads = bench_heads._make_heads("meta")
    assert sum(p.numel() for p in heads["VWFormer"].module.parameters()) == 7_624_726
    gmacs = [counted[name]["flops"] / 2e9 for name in bench_heads.NAMES]
    assert gmacs[0] == pytest.approx(21.8, abs=0.05)
    assert gmacs[1] == pytest.approx(33.3, abs=0.05)  # published


def test_a_form_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_heads, "_WIDTH", 64)
    right = literal_vwformer.literal_decoder
    monkeypatch.setattr(literal_vwformer, "literal_decoder", lambda *arguments: right(*arguments) * 1.01)
    assert main([*_QUICK, "--mode", "infer"]) == 1
    assert "differ by" in capsys.readouterr().err


def test_bad_calls(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--mode", "train", "--batch-size", "1"], "--batch-size is 1; training needs 2"),
        (["--compile"], "do not belong to --heads"),
        (["--kernels"], "exclude each other"),
        (["--compare", "davit_t"], "exclude each other"),
    ):
        assert main([*_QUICK, *options]) == 2
        assert message in capsys.readouterr().err


def test_peak_memory_of_a_cpu() -> None:
    x = torch.zeros(1 << 20)

    def run() -> Tensor:
        y = x + 1  # 4 MiB
        z = y * 2
        del y
        return z + 1

    assert 8 << 20 <= peak_memory(run, torch.device("cpu")) < 9 << 20
