"""The table of accuracy against cost."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from vitrail.tools._common.cards import read_facts, read_measured
from vitrail.tools.model_table import main, make_rows


def test_rows_are_facts_and_counts() -> None:
    rows = {row["model"]: row for row in make_rows(throughput={"davit_t": 321.0})}
    assert set(rows) == set(read_facts())
    assert rows["davit_t"] == {
        "model": "davit_t",
        "parameters": read_measured()["davit_t"]["parameters"],
        "gmacs": read_measured()["davit_t"]["gmacs"],
        "size": 224,
        "top1": 82.8,
        "images_per_second": 321.0,
    }
    assert rows["biformer_n"]["top1"] is None


def test_files_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = [
        {"model": "rmt_t", "images_per_s": 300.0},
        {"model": "rmt_t", "images_per_s": 200.0},
        {"model": "rmt_t", "images_per_s": 900.0, "mode": "train"},
        {"model": "rmt_s", "images_per_s": 50.0},
    ]
    (tmp_path / "speed.json").write_text(json.dumps(speeds))
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    arguments = ["rmt_*", "--throughput", str(tmp_path / "speed.json"), "--sort", "images_per_second"]
    for kind, path in paths.items():
        arguments += [f"--{'plot' if kind == 'png' else kind}", str(path)]
    assert main(arguments) == 0
    assert "rmt_l" in capsys.readouterr().out
    rows = json.loads(paths["json"].read_text())
    assert [row["images_per_second"] for row in rows][:3] == [50.0, 300.0, None]
    assert len(list(csv.DictReader(paths["csv"].open()))) == len(rows)
    with Image.open(paths["png"]) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_such_model"]) == 2
    assert main(["rmt_*", "--json", str(tmp_path)]) == 2
    assert "a folder; expected the name of a file" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{]")
    assert main(["--throughput", str(tmp_path / "x.json")]) == 2
    assert "not a result file" in capsys.readouterr().err
    (tmp_path / "x.json").write_text('[{"operator": "window_attention", "p50_ms": 1.0}]')
    assert main(["--throughput", str(tmp_path / "x.json")]) == 2
    assert "no speed" in capsys.readouterr().err
    assert main(["scatterformer_*", "--plot", str(tmp_path / "empty.png")]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    assert not (tmp_path / "empty.png").exists()
