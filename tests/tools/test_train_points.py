"""Training a detector of objects in scans by the command, on made-up scans in KITTI's layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitrail.models.mm.checkpoint import read_checkpoint
from vitrail.tools.test import main as measure
from vitrail.tools.train import main

CONFIG = "kitti/scatterformer_sample"
CALIB = """P2: 700 0 600 0 0 700 180 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""


def _write_scans(root: Path) -> Path:
    """Four scans of a floor, with a car on each; the last has neither points nor objects."""
    generator = np.random.default_rng(0)
    for name in ("velodyne_reduced", "label_2", "calib"):
        (root / name).mkdir(parents=True)
    for i in range(4):
        x, y = 10.0 + 3 * i, -2.0 + i
        car = generator.uniform(-1, 1, (200, 4)) * [2, 0.9, 0.8, 0.5] + [x, y, -0.7, 0.5]
        floor = generator.uniform(0, 1, (300, 4)) * [40, 20, 0, 1] + [1, -10, -1.6, 0]
        points = np.concatenate([car, floor, [[np.nan, 0, 0, 0]]]) if i < 3 else np.zeros((0, 4))
        (root / f"velodyne_reduced/{i:06}.bin").write_bytes(points.astype(np.float32).tobytes())
        label = f"Car 0 0 0 0 100 50 150 1.6 1.8 4.0 {-y} 1.5 {x} -1.5708\n" if i < 3 else ""
        (root / f"label_2/{i:06}.txt").write_text(label)
        (root / f"calib/{i:06}.txt").write_text(CALIB)
    return root


def _options(root: Path, **changes: Any) -> list[str]:
    """A narrow detector of 32 x 32 cells, which the made-up cars are in."""
    low, high = (0.0, -12.8, -3.0), (25.6, 12.8, 1.0)
    ranges = ("model.bbox_head", "train_dataloader.dataset", "val_dataloader.dataset")
    small = {
        "data_root": root,
        "model.backbone.low": low,
        "model.backbone.high": high,
        **{f"{part}.point_range": low + high for part in ranges},
        "train_dataloader.num_workers": 0,
        "val_dataloader.num_workers": 0,
        "train_dataloader.dataset.repeat": 1,
        "model.backbone.dim": 16,
        "model.backbone.voxel_size": "(0.8,0.8,0.5)",
        "model.backbone.voxel_dim": 8,
        "model.neck.dim": 16,
        "model.bbox_head.in_channels": 16,
        "model.bbox_head.dim": 16,
        "model.bbox_head.max_boxes": 20,  # each has a label in the pictures, which takes longer than to find it
        "train_cfg.max_epochs": 2,
        "train_cfg.val_interval": 1,
    }
    return [f"{key}={value}".replace(" ", "") for key, value in {**small, **changes}.items()]


def _train(folder: Path, *options: str, changes: list[str]) -> int:
    return main([CONFIG, "--work-dir", str(folder), "--device", "cpu", *options, "--cfg-options", *changes])


def test_detector_trains_is_measured_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_scans(tmp_path / "data"), tmp_path / "run"
    assert _train(folder, changes=_options(root)) == 0
    text = capsys.readouterr().out
    for part in ("PointDetector on scatterformer_kitti_n", "4 training and 4 held-out scans", "epoch 2/2", "bev_Car"):
        assert part in text
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["epoch"] for row in metrics["curve"]] == [1, 2]
    assert metrics["score"] == "bev_Car"
    assert metrics["held_out"]["nonfinite_points"] == 3
    assert metrics["held_out"]["empty_scans"] == 1
    assert metrics["curve"][-1]["train_loss"] < metrics["curve"][0]["train_loss"]
    assert len(list((folder / "scans").glob("*.png"))) == 4
    assert read_checkpoint(folder / "last.pth")["meta"]["epoch"] == 2
    pictures = f"test_evaluator.picture_dir={tmp_path / 'pictures'}"
    assert measure([str(folder), "--device", "cpu", "--cfg-options", pictures]) == 0
    measured = json.loads((folder / "results.json").read_text())
    assert measured["bev_Car"] == metrics["held_out"]["bev_Car"]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    longer = _options(root, **{"train_cfg.max_epochs": 3})
    assert _train(folder, "--resume", changes=longer) == 0
    assert len(json.loads((folder / "metrics.json").read_text())["curve"]) == 3


def test_problems_are_named_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_scans(tmp_path / "data"), tmp_path / "run"
    for changes, message in (
        (_options(tmp_path / "nowhere"), r"nowhere.* does not exist .*data_root=FOLDER"),
        (_options(root, **{"model.backbone.name": "scatterformer_m"}), "'scatterformer_m', which timm does not know"),
        (_options(root, **{"model.bbox_head.tasks": "[['Car']]", "model.bbox_head.iou_weights": "(0.5,)",
                           "model.bbox_head.nms_thresholds": 0.5}), "num_classes=1, the data have 3 classes"),
        (_options(root, **{"train_dataloader.dataset.reader": "waymo"}), "reader is 'waymo'"),
    ):  # fmt: skip
        assert _train(folder, changes=changes) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert re.search(message, error), error
        assert not folder.exists()


def test_a_damaged_scan_stops_the_run_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _write_scans(tmp_path / "data")
    (root / "label_2/000002.txt").write_text("Car 1 2\n")
    assert _train(tmp_path / "run", changes=_options(root, **{"train_dataloader.num_workers": 1})) == 1
    assert re.search(r"000002\.txt, line 1: 3 fields", capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_trains_on_the_gpu(tmp_path: Path, amp: str | None) -> None:
    root = _write_scans(tmp_path / "data")
    arguments = [CONFIG, "--work-dir", str(tmp_path / "run"), "--device", "cuda", *(["--amp", amp] if amp else [])]
    assert main([*arguments, "--cfg-options", *_options(root)]) == 0
