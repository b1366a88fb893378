"""LiDAR samples: what is left out and counted, augmentations that keep points and boxes together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.layers.rotated_boxes import pairwise_iou, points_in_boxes
from vitrail.models.mm.datasets import SampleKey
from vitrail.models.mm.point_augment import ObjectSampling, SceneAugmentation, flip, rotate, scale, translate
from vitrail.models.mm.point_data import PointDataset, collate_scans
from vitrail.models.mm.point_readers import PlainReader, PointDataError

RANGE = (-20.0, -20.0, -3.0, 20.0, 20.0, 3.0)
CLASSES = ("car", "bike")


def _scene(seed: int, boxes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(boxes, 9, generator=generator)
    centre = (corners[:, :3] - 0.5) * torch.tensor([30.0, 30.0, 1.0])
    rest = [corners[:, 3:6] * 3 + 0.5, corners[:, 6:7] * 8 - 4, corners[:, 7:9] * 6 - 3]
    points = torch.rand(3000, 5, generator=generator) * 40 - 20
    points[:, 2] /= 10
    return points, torch.cat([centre, *rest], dim=1)


def _write(root: Path, scans: dict[str, tuple[Any, list[dict[str, Any]]]]) -> Path:
    for name in ("points", "boxes"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, (points, boxes) in scans.items():
        np.save(root / f"points/{name}.npy", np.asarray(points, np.float32))
        (root / f"boxes/{name}.json").write_text(json.dumps(boxes))
    return root


def _object(name: str, x: float, y: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "box": [x, y, 0.0, 4.0, 2.0, 2.0, 0.0], **more}


def _filled(x: float, y: float, count: int, value: float = 0.0) -> np.ndarray:
    """Points inside the box of `_object`."""
    offsets = np.random.default_rng(0).uniform(-0.9, 0.9, (count, 5))
    return offsets * [2, 1, 1, 0, 0] + [x, y, 0, value, value]


def _dataset(root: Path, **changes: Any) -> PointDataset:
    return PointDataset(
        **{"reader": "plain", "data_root": str(root), "classes": CLASSES, "point_range": RANGE, **changes}
    )


@pytest.mark.parametrize("change", ["x", "y", "rotate", "scale", "translate", "all"])
def test_points_stay_in_their_boxes(change: str) -> None:
    points, boxes = _scene(0)
    before = points_in_boxes(points.double(), boxes.double())
    changed = {
        "x": lambda: flip(points, boxes, "x"),
        "y": lambda: flip(points, boxes, "y"),
        "rotate": lambda: rotate(points, boxes, 0.7),
        "scale": lambda: scale(points, boxes, 1.3),
        "translate": lambda: translate(points, boxes, torch.tensor([1.0, -2.0, 0.5])),
        "all": lambda: SceneAugmentation()(points, boxes, torch.Generator().manual_seed(3)),
    }[change]()
    assert before.any()
    assert not torch.equal(changed[0], points)
    after = points_in_boxes(changed[0].double(), changed[1].double())
    assert (before != after).sum() <= 1  # a point on a face may change sides by rounding
    torch.testing.assert_close(points, _scene(0)[0], rtol=0, atol=0)  # the input is as it was
    torch.testing.assert_close(boxes, _scene(0)[1], rtol=0, atol=0)
    assert torch.equal(changed[0][:, 3:], points[:, 3:])


@pytest.mark.parametrize("change", ["x", "y", "rotate", "scale"])
def test_velocities_move_the_boxes(change: str) -> None:
    points, boxes = _scene(1)
    later = boxes.clone()
    later[:, :2] += boxes[:, 7:9]
    function = {"rotate": rotate, "scale": scale}.get(change, flip)
    argument = {"rotate": -2.0, "scale": 0.5}.get(change, change)
    now, then = function(points, boxes, argument)[1], function(points, later, argument)[1]
    torch.testing.assert_close(now[:, :2] + now[:, 7:9], then[:, :2], rtol=1e-5, atol=1e-5)
    nose = boxes.clone()
    nose[:, 0] += boxes[:, 6].cos()
    nose[:, 1] += boxes[:, 6].sin()
    step = function(points, nose, argument)[1][:, :2] - now[:, :2]
    torch.testing.assert_close(torch.atan2(step[:, 1], step[:, 0]).cos(), now[:, 6].cos(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.atan2(step[:, 1], step[:, 0]).sin(), now[:, 6].sin(), rtol=1e-4, atol=1e-4)


def test_augmentation_covers_its_ranges() -> None:
    augmentation = SceneAugmentation(rotation=0.5, scaling=(0.9, 1.1), translation=0.0)
    box = torch.tensor([[10.0, 0, 0, 1, 1, 1, 0]])
    angles, factors = [], []
    for seed in range(300):
        x, y, _, length = augmentation(torch.zeros(0, 4), box, torch.Generator().manual_seed(seed))[1][0, :4].tolist()
        angles.append(math.atan2(y, abs(x)))
        factors.append(length)
    assert max(map(abs, angles)) <= 0.5 + 1e-6
    assert max(map(abs, angles)) > 0.47
    assert min(factors) == pytest.approx(0.9, abs=0.01)
    assert max(factors) == pytest.approx(1.1, abs=0.01)
    with pytest.raises(ValueError, match="flips is"):
        SceneAugmentation(flips=("z",))
    with pytest.raises(ValueError, match="scaling is"):
        SceneAugmentation(scaling=(1.1, 0.9))


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    nan = [np.nan, 0, 0, 0, 0]
    far = [100, 0, 0, 0, 0]
    boxes = [
        _object("car", 5, 5),
        _object("car", -5, 5),
        _object("bike", 50, 0),
        _object("van", 5, -5),
        _object("x", 0, 9),
    ]
    scans = {
        "a": (np.concatenate([_filled(5, 5, 7), _filled(5, -5, 6), [nan, far, far]]), boxes),
        "b": (np.zeros((0, 5)), [_object("car", 1, 1)]),
    }
    root = _write(tmp_path, scans)
    changes = {"neighbours": {"van": "car"}}
    points, sample = _dataset(root, **changes)[0].values()
    assert points.shape == (13, 5)
    assert sample["counts"] == {
        "nonfinite_points": 1, "outside_points": 2, "empty_scans": 0, "boxes_without_points": 1, "boxes_outside": 1,
    }  # fmt: skip
    assert sample["labels"].tolist() == [0, 0, 1, 0]  # "x" is nothing
    assert sample["ignored"].tolist() == [False, True, True, True]
    trained = _dataset(root, training=True, **changes)[0]["data_samples"]
    assert trained["labels"].tolist() == [0]
    torch.testing.assert_close(trained["boxes"][0], torch.tensor(boxes[0]["box"]))
    empty = _dataset(root, training=True, scene={})[1]
    assert empty["inputs"].shape == (0, 5)
    assert empty["data_samples"]["boxes"].shape == (0, 7)
    assert empty["data_samples"]["counts"]["empty_scans"] == 1
    batch = collate_scans([empty, empty])
    assert [len(points) for points in batch["inputs"]] == [0, 0]
    assert len(batch["data_samples"]) == 2


def _sampling_root(tmp_path: Path) -> Path:
    scans = {
        "a": (_filled(5, 5, 20, 1), [_object("car", 5, 5)]),
        "b": (
            np.concatenate([_filled(5.5, 5, 20, 2), _filled(-9, 0, 9, 2)]),
            [_object("car", 5.5, 5), _object("car", -9, 0)],
        ),
        "c": (_filled(9, -9, 3, 3), [_object("car", 9, -9), _object("bike", 0, 0)]),
    }
    return _write(tmp_path, scans)


def test_objects_come_from_other_scans(tmp_path: Path) -> None:
    reader = PlainReader(_sampling_root(tmp_path / "data"))
    cache = tmp_path / "cache"
    sampling = ObjectSampling(reader, lambda name: int(name != "car"), {0: 3, 1: 2}, 5, stop_epoch=7, cache=cache)
    boxes = reader.objects(0).boxes
    points = torch.cat([reader.points(0), torch.tensor(_filled(-9, 0, 4, 1)).float()])
    for _ in range(2):  # the second time from the cache
        generator = torch.Generator().manual_seed(0)
        new_points, new_boxes, labels = sampling(points, boxes, torch.tensor([0]), 0, 0, generator)
        # The car of b at (5.5, 5) touches ours, the one of c has too few points, the bicycle none.
        torch.testing.assert_close(new_boxes[:, 0], torch.tensor([5.0, -9.0]))
        assert labels.tolist() == [0, 0]
        inside = points_in_boxes(new_points, new_boxes)
        assert (new_points[inside[1]][:, 3] == 2).all()  # what stood there is gone
        assert inside.sum(1).tolist() == [20, 9]
        assert (pairwise_iou(new_boxes, new_boxes) > 0).sum() == 2
    assert "b_1.npy" in {path.name for path in cache.iterdir()}
    assert sampling(points, boxes, torch.tensor([0]), 0, 7, generator)[0] is points
    (cache / "b_1.npy").write_bytes(b"damaged")
    with pytest.raises(PointDataError, match=r"b_1\.npy is no array"):
        sampling(points, boxes, torch.tensor([0]), 0, 0, torch.Generator().manual_seed(0))


def test_samples_depend_on_seed_epoch_and_position_alone(tmp_path: Path) -> None:
    root = _sampling_root(tmp_path)
    arguments = {"training": True, "scene": {}, "objects": {"counts": {"car": 3}}, "repeat": 4}
    one, two = _dataset(root, **arguments), _dataset(root, **arguments)
    assert len(one) == 12
    two[5]
    keys = [SampleKey(1, 2, 0), SampleKey(1, 3, 0), SampleKey(2, 2, 0), SampleKey(1, 2, 9)]
    first = [one[key]["inputs"] for key in keys]
    again = [two[key]["inputs"] for key in reversed(keys)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][:5], first[1][:5])
    assert not torch.equal(first[0][:5], first[2][:5])
    assert torch.equal(first[0], first[3])  # scan 9 is scan 0 once more


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": "waymo"}, "reader is 'waymo'; allowed: kitti, nuscenes, plain"),
        ({"sweep": 3}, "reader 'plain': .*sweep"),
        ({"objects": {"counts": {"bus": 3}}}, r"objects\.counts has bus; classes: car, bike"),
        ({"repeat": 0}, "repeat is 0"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _dataset(_sampling_root(tmp_path), **changes)
