"""Average precision by hand, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.models.mm.point_data import COUNTS
from vitrail.models.mm.point_metric import PointAveragePrecision, average_precision, match_scan


def test_matching() -> None:
    iou = np.array([[0.8, 0.0, 0.0], [0.7, 0.6, 0.0], [0.9, 0.0, 0.0], [0.0, 0.0, 0.9], [0.4, 0.0, 0.0]])
    scores, ignored = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([False, False, True])
    # The first takes true box 0, the second what is left, the third finds nothing, the fourth is on an ignored one.
    assert match_scan(iou, scores, ignored, 0.5).tolist() == [1, 1, 0, -1, 0]
    assert match_scan(iou[:, :0], scores, ignored[:0], 0.5).tolist() == [0] * 5
    assert match_scan(iou[:0], scores[:0], ignored, 0.5).tolist() == []
    # A box that is better than one that came before it does not get what that one took.
    assert match_scan(np.array([[0.6], [0.9]]), np.array([0.9, 0.8]), np.array([False]), 0.5).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("verdicts", "count", "want"),
    [
        ([1, 1, 1], 3, 1.0),
        ([1, 1], 4, 0.5),
        ([0, 1, 1], 2, 2 / 3),
        ([1, 0, 1], 2, 0.5 * 1 + 0.5 * 2 / 3),
        ([1, -1, 1], 2, 1.0),
        ([0, 0], 2, 0.0),
        ([], 2, 0.0),
        ([1, 0, 0, 0], 1, 1.0),
    ],
)
def test_average_precision(verdicts: list[int], count: int, want: float) -> None:
    scores = np.linspace(1, 0.5, len(verdicts))
    order = np.random.default_rng(0).permutation(len(verdicts))
    assert average_precision(scores[order], np.array(verdicts, np.int64)[order], count) == pytest.approx(want)


def test_no_true_box_no_precision() -> None:
    assert np.isnan(average_precision(np.ones(1), np.zeros(1, np.int64), 0))


def _sample(boxes: list[list[float]], labels: list[int], found: list[list[float]], **more: Any) -> dict[str, Any]:
    count = len(boxes)
    return {
        "name": "scan",
        "boxes": torch.tensor(boxes).reshape(-1, 7),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "ignored": torch.tensor(more.get("ignored", [False] * count), dtype=torch.bool),
        "difficulty": torch.tensor(more.get("difficulty", [0] * count), dtype=torch.int64),
        "counts": dict.fromkeys(COUNTS, 1),
        "predicted": {
            "boxes": torch.tensor(found).reshape(-1, 7),
            "scores": torch.linspace(0.9, 0.5, len(found)),
            "labels": torch.tensor(more.get("kinds", [0] * len(found)), dtype=torch.int64),
        },
    }


def _evaluate(samples: list[dict[str, Any]], points: int = 50, **arguments: Any) -> dict[str, float]:
    metric = PointAveragePrecision(**arguments)
    metric.dataset_meta = {"classes": ("car", "bike", "bus")}
    for sample in samples:
        metric.process({"inputs": [torch.rand(points, 4) * 20]}, [sample])
    return metric.evaluate(len(samples))


def test_precision_from_above_and_in_space() -> None:
    near, far, bike = [5.0, 5, 0, 4, 2, 2, 0.3], [15.0, 5, 0, 4, 2, 2, -1.0], [9.0, 1, 0, 2, 1, 1, 0]
    lifted = [*far[:2], 1.5, *far[3:]]
    samples = [
        _sample([near, far, bike], [0, 0, 1], [near, lifted], difficulty=[0, 2, 0]),
        _sample([], [], [bike], kinds=[1]),
    ]
    metrics = _evaluate(samples, by_difficulty=True)
    assert metrics["bev_car"] == 1
    assert metrics["3d_car"] == pytest.approx(0.5)
    assert metrics["bev_bike"] == 0
    assert metrics["bev_mAP"] == pytest.approx(0.5)
    assert "bev_bus" not in metrics
    assert metrics["3d_car_easy"] == 1  # the lifted one is ignored there, and so is what was found near it
    assert metrics["3d_car_hard"] == pytest.approx(0.5)
    assert metrics["empty_scans"] == 2
    assert _evaluate([_sample([], [], [])])["bev_mAP"] == 0


def test_threshold_of_each_class() -> None:
    box, moved = [5.0, 5, 0, 4, 2, 2, 0.0], [6.0, 5, 0, 4, 2, 2, 0.0]  # IoU 0.6
    sample = _sample([box], [0], [moved])
    assert _evaluate([sample], iou={"car": 0.59, "bike": 0.5, "bus": 0.5})["bev_car"] == 1
    assert _evaluate([sample], iou={"car": 0.61, "bike": 0.5, "bus": 0.5})["bev_car"] == 0


@pytest.mark.parametrize("points", [0, 50])
def test_pictures_show_the_boxes(tmp_path: Path, points: int) -> None:
    box = [5.0, 5, 0, 4, 2, 2, 0.3]
    sample = _sample([box, [9.0, 9, 0, 4, 2, 2, 0]], [0, 0], [[6.0, 6, *box[2:]]], ignored=[False, True])
    _evaluate([sample], points, picture_dir=str(tmp_path / "scans"))
    pixels = np.asarray(Image.open(tmp_path / "scans/scan.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0x2F, 0x9E, 0x44), (0xDD, 0x6B, 0x20), (0x86, 0x8E, 0x96)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) < 12).sum() > 100
