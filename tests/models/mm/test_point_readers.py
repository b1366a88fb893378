"""Readers of LiDAR data sets: the samples, made-up tables, and files that are damaged or hostile."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.layers.rotated_boxes import points_in_boxes, wrap_angle
from vitrail.models.mm.point_readers import KittiReader, NuScenesReader, PlainReader, PointDataError

CALIB = """P2: 700 0 600 0 0 700 180 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0
"""
LABEL = """Car 0.00 0 1.85 387.63 181.54 423.81 222.12 1.6 1.8 4.0 -2.0 1.5 10.0 0.3
DontCare -1 -1 -10 0 0 1 1 -1 -1 -1 -1000 -1000 -1000 -10
"""


def _kitti(root: Path, label: str = LABEL, calib: str = CALIB, points: Any = None) -> Path:
    for name in ("velodyne", "label_2", "calib"):
        (root / "training" / name).mkdir(parents=True, exist_ok=True)
    points = np.array([[10, 2, -0.7, 0.5], [-10, 2, -0.7, 0.5]], np.float32) if points is None else points
    (root / "training/velodyne/000001.bin").write_bytes(points if isinstance(points, bytes) else points.tobytes())
    (root / "training/label_2/000001.txt").write_text(label)
    (root / "training/calib/000001.txt").write_text(calib)
    return root


def test_kitti_box_by_hand(tmp_path: Path) -> None:
    reader = KittiReader(_kitti(tmp_path))
    objects = reader.objects(0)
    assert objects.names == ["Car"]
    want = torch.tensor([[10.0, 2.0, -0.7, 4.0, 1.8, 1.6, -0.3 - math.pi / 2]])
    torch.testing.assert_close(objects.boxes, want)
    assert objects.difficulty.tolist() == [0]
    assert reader.points(0)[:, 0].tolist() == [10]  # the other is behind the camera
    assert len(KittiReader(tmp_path, view_only=False).points(0)) == 2


def test_kitti_samples_have_the_known_boxes(data_dir: Path) -> None:
    root = data_dir / "pointclouds/kitti"
    known = json.loads((data_dir / "pointclouds/boxes.json").read_text())
    folders = {"points": "velodyne_reduced", "labels": "label_2", "calib": "calib"}
    reader = KittiReader(root, **folders, images="image_2")
    assert [reader.name(i) for i in range(len(reader))] == ["000000", "000001", "000002", "000008"]
    for i in range(len(reader)):
        key = f"kitti/velodyne_reduced/{reader.name(i)}.bin"
        entries = known.get(key) or known[key.replace("_reduced", "")]
        objects = reader.objects(i)
        assert objects.names == [entry["name"] for entry in entries]
        want = torch.tensor([entry["box"] for entry in entries])
        torch.testing.assert_close(objects.boxes, want, rtol=0, atol=2e-3)
        inside = points_in_boxes(KittiReader(root, **folders, view_only=False).points(i), objects.boxes).sum(1)
        counted = torch.tensor([entry["num_points"] for entry in entries])
        assert (inside - counted).abs().max() <= 3
    whole = KittiReader(root, **{**folders, "points": "velodyne"}, images="image_2", ann_file=None)
    everything = KittiReader(root, **{**folders, "points": "velodyne"}, view_only=False)
    seen, there, cut = whole.points(1), everything.points(1), reader.points(1)
    assert there.shape == (120268, 4)
    assert len(seen) == pytest.approx(len(cut), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "Car 0 0\n"}, r"000001\.txt, line 1: 3 fields"),
        ({"label": LABEL.replace("10.0", "ten")}, r"000001\.txt, line 1: .*ten"),
        ({"label": "\n" + LABEL.replace("10.0", "nan")}, r"000001\.txt, line 2: a number is not finite"),
        ({"label": LABEL.replace("4.0", "-4.0")}, r"line 1: a box of -4 x 1\.8 x 1\.6 m"),
        ({"calib": "P2: 1 2 3\n"}, r"000001\.txt: R0_rect is missing"),
        ({"calib": CALIB.replace("R0_rect: 1", "R0_rect: one")}, r"000001\.txt, line 2: "),
        ({"calib": CALIB.replace("1 0 0 0 1 0 0 0 1", "0 0 0 0 0 0 0 0 0")}, "no invertible"),
        ({"points": b"12345"}, r"000001\.bin has 5 bytes"),
    ],
)
def test_damaged_kitti_files_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    reader = KittiReader(_kitti(tmp_path, **changes))
    with pytest.raises(PointDataError, match=message):
        reader.objects(0), reader.points(0)


def test_lists_of_scans(tmp_path: Path) -> None:
    _kitti(tmp_path)
    (tmp_path / "train.txt").write_text("../../etc/passwd\n")
    with pytest.raises(PointDataError, match="not a plain name"):
        KittiReader(tmp_path, "train.txt")
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(PointDataError, match="lists no scan"):
        KittiReader(tmp_path, "train.txt")
    with pytest.raises(PointDataError, match=r"has no \*\.txt"):
        KittiReader(tmp_path, labels="nowhere")
    (tmp_path / "train.txt").write_text("000007\n")
    with pytest.raises(FileNotFoundError, match="000007"):
        KittiReader(tmp_path, "train.txt").points(0)


def test_empty_and_unfinite_scans(tmp_path: Path) -> None:
    assert KittiReader(_kitti(tmp_path, points=b"")).points(0).shape == (0, 4)
    points = np.array([[np.nan, 0, 0, 0], [10, 0, 0, 0], [np.inf, 0, 0, 0]], np.float32)
    assert len(KittiReader(_kitti(tmp_path, points=points)).points(0)) == 3


def _plain(root: Path, points: Any, boxes: Any) -> Path:
    (root / "points").mkdir(parents=True)
    (root / "boxes").mkdir()
    np.save(root / "points/a.npy", points, allow_pickle=True)
    (root / "boxes/a.json").write_text(boxes if isinstance(boxes, str) else json.dumps(boxes))
    return root


def test_plain_layout(tmp_path: Path) -> None:
    box = [1.0, 2.0, 3.0, 4.0, 2.0, 1.5, 0.1]
    entries = [{"name": "Vehicle", "box": box, "velocity": [1, 2], "difficulty": 1}, {"name": "Sign", "box": box}]
    root = _plain(tmp_path, np.ones((6, 5)), entries)
    reader = PlainReader(root, with_velocity=True)
    assert reader.points(0).shape == (6, 5)
    assert reader.points(0).dtype == torch.float32
    objects = reader.objects(0)
    assert objects.names == ["Vehicle", "Sign"]
    torch.testing.assert_close(objects.boxes, torch.tensor([[*box, 1, 2], [*box, 0, 0]]))
    assert objects.difficulty.tolist() == [1, 0]
    assert PlainReader(root).objects(0).boxes.shape == (2, 7)


class _Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize(
    ("points", "boxes", "message"),
    [
        (np.array([_Trap()], dtype=object), [], r"a\.npy is no array of numbers"),
        (np.ones((3, 4)), [], r"a\.npy has 4 numbers a point, expected 5"),
        (np.ones(5), [], r"a\.npy holds no array of floats"),
        (np.ones((3, 5)), "[1,", r"a\.json is not JSON \(line 1"),
        (np.ones((3, 5)), {}, r"a\.json holds a dict, expected a list"),
        (np.ones((3, 5)), [{"box": []}], r"a\.json, entry 0: expected an object"),
        (np.ones((3, 5)), [{"name": "x", "box": [1, 2]}], r"entry 0: box is \[1, 2\], expected 7"),
        (np.ones((3, 5)), [{"name": "x", "box": [1, 2, 3, 0, 1, 1, 0]}], "extents must be positive"),
    ],
)
def test_damaged_plain_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: Any, boxes: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = PlainReader(_plain(tmp_path, points, boxes))
    with pytest.raises(PointDataError, match=message):
        reader.points(0), reader.objects(0)
    assert not Path("trapped").exists()


def test_pickles_are_refused(tmp_path: Path) -> None:
    root = _plain(tmp_path, np.ones((3, 5)), [])
    (root / "points/a.npy").write_bytes(pickle.dumps(np.ones((3, 5))))
    with pytest.raises(PointDataError, match="is no array of numbers"):
        PlainReader(root).points(0)


def _quaternion(yaw: float) -> list[float]:
    return [math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)]


def _nuscenes(root: Path, **changes: Any) -> Path:
    """Two keyframes half a second apart with a sweep between; the car drives 2 m along global x and turns left."""
    (root / "v1.0-mini").mkdir(parents=True)
    (root / "sweeps").mkdir()
    points = np.array([[0.1, 0.1, 0, 1, 0], [3, 4, 1, 9, 2]], np.float32)
    for name in ("a", "b", "c"):
        (root / f"sweeps/LIDAR_TOP_{name}.bin").write_bytes(points.tobytes())
    common = {"calibrated_sensor_token": "cs"}
    sweeps = [("a", "s1", True, 0, ""), ("b", "s1", False, 250000, "a"), ("c", "s2", True, 500000, "b")]
    tables = {
        "scene": [{"token": "sc", "name": "scene-0001"}, {"token": "other", "name": "scene-0002"}],
        "sample": [
            {"token": "s1", "timestamp": 0, "scene_token": "sc"},
            {"token": "s2", "timestamp": 500000, "scene_token": "sc"},
        ],
        "sample_data": [
            {"token": t, "sample_token": s, "is_key_frame": k, "timestamp": at, "prev": p, "ego_pose_token": f"e{t}"}
            | {"filename": f"sweeps/LIDAR_TOP_{t}.bin", **common}
            for t, s, k, at, p in sweeps
        ]
        + [{"token": "camera", "filename": "samples/CAM_FRONT/x.jpg"}],
        "ego_pose": [
            {"token": "ea", "translation": [0, 0, 0], "rotation": _quaternion(0)},
            {"token": "eb", "translation": [1, 0, 0], "rotation": _quaternion(0)},
            {"token": "ec", "translation": [2, 0, 0], "rotation": _quaternion(math.pi / 2)},
        ],
        "calibrated_sensor": [{"token": "cs", "translation": [0, 0, 2], "rotation": _quaternion(0)}],
        "category": [{"token": "cat", "name": "vehicle.bus.rigid"}],
        "instance": [{"token": "i", "category_token": "cat"}],
        "sample_annotation": [
            {"token": "n1", "sample_token": "s1", "instance_token": "i", "translation": [10, 5, 1], "prev": ""}
            | {"rotation": _quaternion(0.2), "size": [2, 9, 3], "next": "n2"},
            {"token": "n2", "sample_token": "s2", "instance_token": "i", "translation": [11, 5, 1], "prev": "n1"}
            | {"rotation": _quaternion(0.2), "size": [2, 9, 3], "next": ""},
        ],
    }
    for name, rows in {**tables, **changes}.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return root


def test_nuscenes_tables(tmp_path: Path) -> None:
    reader = NuScenesReader(_nuscenes(tmp_path), "v1.0-mini", sweeps=10)
    assert [reader.name(i) for i in range(len(reader))] == ["a", "c"]
    first = reader.objects(0)
    assert first.names == ["bus"]
    torch.testing.assert_close(first.boxes, torch.tensor([[10.0, 5, -1, 9, 2, 3, 0.2, 2, 0]]))
    # From the second pose, global (11, 5) lies 9 m to the right of its heading +y and 5 m ahead.
    second = reader.objects(1).boxes
    want = torch.tensor([[5.0, -9, -1, 9, 2, 3, 0.2 - math.pi / 2, 0, -2]])
    torch.testing.assert_close(second, want, rtol=0, atol=1e-5)
    points = reader.points(1)  # the near point of each sweep is gone
    want = torch.tensor([[3.0, 4, 1, 9, 0], [4, -2, 1, 9, 0.25], [4, -1, 1, 9, 0.5]])
    torch.testing.assert_close(points, want, rtol=0, atol=1e-5)
    assert len(NuScenesReader(tmp_path, "v1.0-mini", sweeps=1).points(1)) == 1


# A category of the data set for each of the names in boxes.json.
CATEGORIES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "trailer": "vehicle.trailer",
    "bus": "vehicle.bus.bendy",
    "construction_vehicle": "vehicle.construction",
    "bicycle": "vehicle.bicycle",
    "motorcycle": "vehicle.motorcycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
    "barrier": "movable_object.barrier",
    "other": "movable_object.debris",
}


def _sample_tables(root: Path, scan: Path, objects: list[dict[str, Any]]) -> None:
    """The sample's keyframe as `v1.0-trainval` has it: boxes in the world, which a turned sensor on a turned car sees.

    Each object has an annotation half a second before and after, so far off as its velocity says.
    """
    yaw, at = {"ego": 0.7, "sensor": -1.2}, {"ego": [400.0, -30.0, 1.0], "sensor": [0.9, 0.1, 1.8]}
    turn = yaw["ego"] + yaw["sensor"]

    def rotate(x: float, y: float, angle: float) -> tuple[float, float]:
        return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)

    sensor_x, sensor_y = rotate(*at["sensor"][:2], yaw["ego"])
    annotations, instances = [], []
    for i, entry in enumerate(objects):
        x, y = rotate(*entry["box"][:2], turn)
        vx, vy = rotate(*(v if math.isfinite(v) else 0.0 for v in entry["velocity"]), turn)
        place = [x + sensor_x + at["ego"][0], y + sensor_y + at["ego"][1], entry["box"][2] + 2.8]
        length, width, height, heading = entry["box"][3:]
        instances.append({"token": f"i{i}", "category_token": entry["name"]})
        for step in (-1, 0, 1):
            annotations.append({
                "token": f"a{i}{step}",
                "sample_token": f"s{step}",
                "instance_token": f"i{i}",
                "translation": [place[0] + vx * step / 2, place[1] + vy * step / 2, place[2]],
                "size": [width, length, height],
                "rotation": _quaternion(heading + turn),
                "prev": f"a{i}{step - 1}" if step > -1 else "",
                "next": f"a{i}{step + 1}" if step < 1 else "",
            })  # fmt: skip
    time = 1_532_402_927_647_951
    tables: dict[str, list[dict[str, Any]]] = {
        "scene": [{"token": "sc", "name": "scene-0061"}],
        "sample": [
            {"token": f"s{step}", "timestamp": time + 500_000 * step, "scene_token": "sc"} for step in (-1, 0, 1)
        ],
        "sample_data": [{
            "token": "d", "sample_token": "s0", "is_key_frame": True, "timestamp": time, "prev": "",
            "ego_pose_token": "e", "calibrated_sensor_token": "c", "filename": f"samples/LIDAR_TOP/{scan.name}",
        }],
        "ego_pose": [{"token": "e", "translation": at["ego"], "rotation": _quaternion(yaw["ego"])}],
        "calibrated_sensor": [{"token": "c", "translation": at["sensor"], "rotation": _quaternion(yaw["sensor"])}],
        "category": [{"token": name, "name": category} for name, category in CATEGORIES.items()],
        "instance": instances,
        "sample_annotation": annotations,
    }  # fmt: skip
    (root / "v1.0-trainval").mkdir()
    for name, rows in tables.items():
        (root / f"v1.0-trainval/{name}.json").write_text(json.dumps(rows))
    (root / "samples/LIDAR_TOP").mkdir(parents=True)
    (root / "samples/LIDAR_TOP" / scan.name).write_bytes(scan.read_bytes())


def test_nuscenes_sample_keyframe_in_the_data_sets_own_layout(tmp_path: Path, data_dir: Path) -> None:
    (path,) = (data_dir / "pointclouds/nuscenes").glob("n015*.pcd.bin")
    known = json.loads((data_dir / "pointclouds/boxes.json").read_text())[f"nuscenes/{path.name}"]
    _sample_tables(tmp_path, path, known)
    (tmp_path / "train.txt").write_text("scene-0061\n")
    reader = NuScenesReader(tmp_path, "v1.0-trainval", "train.txt", near=0)
    assert len(reader) == 1
    points, objects = reader.points(0), reader.objects(0)
    assert points.shape == (34688, 5)
    assert (points[:, 4] == 0).all()  # seconds before the keyframe
    named = [entry["name"] if entry["name"] != "other" else CATEGORIES["other"] for entry in known]
    assert objects.names == named
    want = torch.tensor([entry["box"] for entry in known])
    torch.testing.assert_close(objects.boxes[:, :6], want[:, :6], rtol=0, atol=1e-3)
    assert wrap_angle(objects.boxes[:, 6] - want[:, 6]).abs().max() < 1e-3
    moving = torch.tensor([[v if math.isfinite(v) else 0.0 for v in entry["velocity"]] for entry in known])
    torch.testing.assert_close(objects.boxes[:, 7:], moving, rtol=0, atol=2e-3)
    inside = points_in_boxes(points, objects.boxes).sum(1)
    assert inside.tolist() == pytest.approx([entry["num_points"] for entry in known], abs=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scene": "{"}, r"scene\.json is not JSON"),
        ({"scene": []}, "no LiDAR keyframe"),
        ({"sample": [{"token": "s1"}]}, r"sample\.json, entry 0: no timestamp, scene_token"),
        ({"instance": [3]}, r"instance\.json, entry 0: a int, expected an object"),
        ({"ego_pose": []}, r"ego_pose\.json has no token ea"),
        (
            {"calibrated_sensor": [{"token": "cs", "translation": [0, 0], "rotation": [1, 0, 0, 0]}]},
            r"calibrated_sensor\.json, token cs: translation is \[0, 0\], expected 3 finite numbers",
        ),
        (
            {"calibrated_sensor": [{"token": "cs", "translation": [0, 0, 0], "rotation": [0, 0, 0, 0]}]},
            "rotation is no quaternion",
        ),
    ],
)
def test_damaged_nuscenes_tables_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _nuscenes(tmp_path, **changes)
    with pytest.raises(PointDataError, match=message):
        NuScenesReader(tmp_path, "v1.0-mini").objects(0)


def test_nuscenes_files_stay_inside(tmp_path: Path) -> None:
    _nuscenes(tmp_path)
    table = tmp_path / "v1.0-mini/sample_data.json"
    table.write_text(table.read_text().replace("sweeps/LIDAR_TOP_a.bin", "../../LIDAR_TOP_secret"))
    with pytest.raises(PointDataError, match=r"token a: filename leaves"):
        NuScenesReader(tmp_path, "v1.0-mini").points(0)
    (tmp_path / "val.txt").write_text("scene-0001\nscene-0009\n")
    with pytest.raises(PointDataError, match="1 scenes are not in"):
        NuScenesReader(tmp_path, "v1.0-mini", "val.txt")
