"""Waymo's parquet layout into the plain one, on made-up files: geometry that is known, resumption, damage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.models.mm.point_readers import PlainReader
from vitrail.tools._common.waymo import Calibration, points_of_range_image
from vitrail.tools.convert_waymo import main

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TIMES = (1_500_000, 1_600_000, 1_700_000)
HEIGHT, WIDTH = 6, 90
WALL = 20.0  # metres ahead in the world


def pose(x: float = 0, y: float = 0, z: float = 0, yaw: float = 0, pitch: float = 0, roll: float = 0) -> np.ndarray:
    """(4, 4): turned about x, then y, then z, then moved."""
    c, s = np.cos, np.sin
    about_z = np.array([[c(yaw), -s(yaw), 0], [s(yaw), c(yaw), 0], [0, 0, 1]])
    about_y = np.array([[c(pitch), 0, s(pitch)], [0, 1, 0], [-s(pitch), 0, c(pitch)]])
    about_x = np.array([[1, 0, 0], [0, c(roll), -s(roll)], [0, s(roll), c(roll)]])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = about_z @ about_y @ about_x, (x, y, z)
    return matrix


def wall_image(extrinsic: np.ndarray, inclinations: np.ndarray, vehicle_at: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a laser sees of the plane x = WALL, pixel by pixel, and the pixels' poses.

    Args:
        extrinsic: Laser to vehicle.
        inclinations: Of the rows, the highest first.
        vehicle_at: Column -> (x, y, z, yaw, pitch, roll) of the vehicle in the world.
    """
    image = np.zeros((HEIGHT, WIDTH, 4), np.float32)
    poses = np.zeros((HEIGHT, WIDTH, 6), np.float32)
    laser_yaw = np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    for column in range(WIDTH):
        x, y, z, yaw, pitch, roll = vehicle_at(column)
        laser_to_world = pose(x, y, z, yaw, pitch, roll) @ extrinsic
        azimuth = np.pi - 2 * np.pi * (column + 0.5) / WIDTH - laser_yaw
        for row in range(HEIGHT):
            e = inclinations[row]
            ray = laser_to_world[:3, :3] @ [np.cos(e) * np.cos(azimuth), np.cos(e) * np.sin(azimuth), np.sin(e)]
            distance = (WALL - laser_to_world[0, 3]) / ray[0]
            seen = 0 < distance < 60
            image[row, column] = (distance, 0.5 + row, 0.1 * column, 1) if seen else (-1, -1, -1, -1)
            poses[row, column] = (roll, pitch, yaw, x, y, z)
    return image, poses


EXTRINSIC = pose(1.4, 0.2, 2.2, yaw=2.6, pitch=0.05, roll=-0.02)
BEAMS = np.array([-0.3, -0.2, -0.12, -0.05, -0.01, 0.04])  # as Waymo has them: from below


def still(_: int) -> tuple[float, ...]:
    return (0.0,) * 6


def driving(column: int) -> tuple[float, ...]:
    """Ten metres a second and a bend, over the tenth of a second of a turn."""
    share = column / WIDTH
    return (2.0 + share, 1.0 + 0.1 * share, 0.3, 0.2 + 0.05 * share, 0.01, -0.02)


def test_a_wall_stands_where_it_stood() -> None:
    calibration = Calibration(EXTRINSIC, 0.0, 0.0, BEAMS)
    image, _ = wall_image(EXTRINSIC, BEAMS[::-1], still)
    points = points_of_range_image(image, calibration)
    assert points.dtype == np.float32
    assert len(points) == (image[..., 0] > 0).sum() > 100
    np.testing.assert_allclose(points[:, 0], WALL, atol=2e-5)
    # Seen from the laser, the columns' middle is straight ahead of the vehicle and their first half to the left.
    row, column = np.nonzero(image[..., 0] > 0)
    left = points[:, 1] > EXTRINSIC[1, 3] + 1
    right = points[:, 1] < EXTRINSIC[1, 3] - 1
    assert (column[left] < WIDTH / 2).all()
    assert (column[right] >= WIDTH / 2).all()
    assert left.any()
    assert right.any()
    # The highest beam comes first.
    assert points[row == 0, 2].min() > points[row == HEIGHT - 1, 2].max()
    np.testing.assert_allclose(points[:, 3], 0.5 + row)
    np.testing.assert_allclose(points[:, 4], 0.1 * column, rtol=1e-6)


def test_beams_are_evenly_spread_without_a_list() -> None:
    even = Calibration(np.eye(4), -0.4, 0.2, None)
    np.testing.assert_allclose(even.inclinations(3), [0.1, -0.1, -0.3])
    image, _ = wall_image(EXTRINSIC, even.inclinations(HEIGHT), still)
    points = points_of_range_image(image, Calibration(EXTRINSIC, -0.4, 0.2, None))
    np.testing.assert_allclose(points[:, 0], WALL, atol=2e-5)


def test_driving_while_the_laser_turns_is_undone() -> None:
    calibration = Calibration(EXTRINSIC, 0.0, 0.0, BEAMS)
    image, poses = wall_image(EXTRINSIC, BEAMS[::-1], driving)
    x, y, z, yaw, pitch, roll = driving(0)
    vehicle = pose(x, y, z, yaw, pitch, roll)
    points = points_of_range_image(image, calibration, poses, vehicle)[:, :3]
    in_world = points @ vehicle[:3, :3].T + vehicle[:3, 3]
    np.testing.assert_allclose(in_world[:, 0], WALL, atol=5e-5)
    left_alone = points_of_range_image(image, calibration)[:, :3] @ vehicle[:3, :3].T + vehicle[:3, 3]
    assert np.abs(left_alone[:, 0] - WALL).max() > 0.3


def _write(path: Path, columns: dict[str, tuple[Any, list[Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(values, kind) for name, (kind, values) in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=4)


def _images(prefix: str, rows: list[list[np.ndarray | None]]) -> dict[str, tuple[Any, list[Any]]]:
    columns = {}
    for i, images in enumerate(zip(*rows, strict=True), start=1):
        flat = [None if image is None else image.flatten() for image in images]
        shapes = [None if image is None else list(image.shape) for image in images]
        columns[f"[{prefix}].range_image_return{i}.values"] = (pa.list_(pa.float32()), flat)
        columns[f"[{prefix}].range_image_return{i}.shape"] = (pa.list_(pa.int32(), 3), shapes)
    return columns


def make_data(root: Path, segment: str = "one", split: str = "training") -> Path:
    """A segment of three frames, a top laser that turns while the vehicle drives, and one in front that does not."""
    top, poses = wall_image(EXTRINSIC, BEAMS[::-1], driving)
    second = np.where(np.arange(WIDTH)[None, :, None] == WIDTH // 2, top + np.float32([1, 0, 0, 0]), np.float32(-1))
    front_extrinsic = pose(4.0, 0.0, 0.8, yaw=0.01)
    front, _ = wall_image(front_extrinsic, Calibration(front_extrinsic, -1.5, 0.5, None).inclinations(HEIGHT), still)

    def keys(rows: list[tuple[int, int]]) -> dict[str, tuple[Any, list[Any]]]:
        return {
            "key.segment_context_name": (pa.string(), [segment] * len(rows)),
            "key.frame_timestamp_micros": (pa.int64(), [time for time, _ in rows]),
            "key.laser_name": (pa.int8(), [laser for _, laser in rows]),
        }

    folder, both = root / split, [(time, laser) for time in TIMES for laser in (2, 1)]
    images: list[list[np.ndarray | None]] = [[front, None] if laser == 2 else [top, second] for _, laser in both]
    _write(folder / f"lidar/{segment}.parquet", {**keys(both), **_images("LiDARComponent", images)})
    rows = [(time, 1) for time in TIMES]
    _write(folder / f"lidar_pose/{segment}.parquet", {**keys(rows), **_images("LiDARPoseComponent", [[poses]] * 3)})
    matrix = pa.list_(pa.float64(), 16)
    x, y, z, yaw, pitch, roll = driving(0)
    vehicle = pose(x, y, z, yaw, pitch, roll).flatten()
    name = "[VehiclePoseComponent].world_from_vehicle.transform"
    _write(folder / f"vehicle_pose/{segment}.parquet", {**keys(rows), name: (matrix, [vehicle] * 3)})
    prefix = "[LiDARCalibrationComponent]."
    _write(folder / f"lidar_calibration/{segment}.parquet", {
        "key.laser_name": (pa.int8(), [1, 2]),
        f"{prefix}extrinsic.transform": (matrix, [EXTRINSIC.flatten(), front_extrinsic.flatten()]),
        f"{prefix}beam_inclination.min": (pa.float64(), [-0.3, -1.5]),
        f"{prefix}beam_inclination.max": (pa.float64(), [0.04, 0.5]),
        f"{prefix}beam_inclination.values": (pa.list_(pa.float64()), [BEAMS, None]),
    })  # fmt: skip
    box, number = "[LiDARBoxComponent].box.", pa.float64()
    _write(folder / f"lidar_box/{segment}.parquet", {
        "key.frame_timestamp_micros": (pa.int64(), [TIMES[0]] * 3 + [TIMES[2]]),
        "key.laser_object_id": (pa.string(), list("abcd")),
        **{f"{box}center.{axis}": (number, [10.0 + i, 1.0, 0.5, 0.0]) for i, axis in enumerate("xyz")},
        **{f"{box}size.{axis}": (number, [4.0 - i, 1.0, 2.0, 3.0]) for i, axis in enumerate("xyz")},
        f"{box}heading": (number, [0.3, 0.0, 1.0, -1.0]),
        "[LiDARBoxComponent].type": (pa.int8(), [1, 2, 4, 3]),
        "[LiDARBoxComponent].num_lidar_points_in_box": (pa.int64(), [40, 3, 6, 9]),
        "[LiDARBoxComponent].difficulty_level.detection": (pa.int8(), [2, 0, None, 1]),
    })  # fmt: skip
    return root


def test_segments_come_out_in_the_plain_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = make_data(tmp_path / "waymo"), tmp_path / "plain"
    make_data(root, "two", "validation")
    assert main([str(root), str(out)]) == 0
    assert "6 frames of 2 segments written" in capsys.readouterr().out
    reader = PlainReader(out, points="training/points", boxes="training/boxes")
    assert [reader.name(i) for i in range(len(reader))] == [f"one_{time}" for time in TIMES]
    points, objects = reader.points(0), reader.objects(0)
    x, y, z, yaw, pitch, roll = driving(0)
    world = points[:, :3].double() @ torch.from_numpy(pose(x, y, z, yaw, pitch, roll)[:3, :3]).T
    in_world = world[:, 0] + x
    top, _ = wall_image(EXTRINSIC, BEAMS[::-1], driving)
    n_first, n_second = int((top[..., 0] > 0).sum()), int((top[:, WIDTH // 2, 0] > 0).sum())
    torch.testing.assert_close(in_world[:n_first], torch.full((n_first,), WALL, dtype=torch.float64), rtol=0, atol=1e-4)
    # Second returns lie a metre further along their rays; the front laser's frame is the vehicle's own.
    assert (in_world[n_first : n_first + n_second] > WALL + 0.9).all()
    front = points[n_first + n_second :, 0]
    torch.testing.assert_close(front, torch.full_like(front, WALL), rtol=0, atol=1e-4)
    assert objects.names == ["Vehicle", "Pedestrian", "Cyclist"]
    assert objects.difficulty.tolist() == [1, 1, 0]
    torch.testing.assert_close(objects.boxes[0], torch.tensor([10.0, 11, 12, 4, 3, 2, 0.3]))
    assert json.loads((out / f"training/boxes/one_{TIMES[0]}.json").read_text())[0]["num_points"] == 40
    assert len(reader.objects(1).names) == 0
    squashed = PlainReader(out, points="training/points", boxes="training/boxes", squashed=(3, 4)).points(0)
    torch.testing.assert_close(squashed[:, 3:], points[:, 3:].tanh())
    marker = json.loads((out / "training/segments/one.json").read_text())
    assert [frame["timestamp_micros"] for frame in marker["frames"]] == list(TIMES)
    assert marker["frames"][0]["points"] == len(points)


def test_it_goes_on_behind_complete_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = make_data(tmp_path / "waymo"), tmp_path / "plain"
    make_data(root, "two")
    (root / "training/lidar_box/two.parquet").unlink()
    arguments = [str(root), str(out), "--splits", "training", "--every", "2", "--returns", "1"]
    assert main(arguments) == 1
    assert re.search(r"lidar_box/two\.parquet is missing", capsys.readouterr().err)
    first = out / f"training/points/one_{TIMES[0]}.npy"
    written = first.stat().st_mtime_ns
    (out / "training/points/.left.tmp").touch()
    make_data(root, "two")
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "2 segments in" in text
    assert "1 of them converted before" in text
    assert "2 frames of 1 segments written" in text
    assert first.stat().st_mtime_ns == written
    assert sorted(path.name for path in (out / "training/points").iterdir()) == sorted(
        f"{segment}_{time}.npy" for segment in ("one", "two") for time in TIMES[::2]
    )
    assert main(arguments[:-2]) == 2
    assert re.search(r"one\.json was converted with .*'returns': \[1\].*choose another folder", capsys.readouterr().err)


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _drop(path: Path, column: str) -> None:
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([column]), path)


def _cut(path: Path) -> None:
    name = "[LiDARComponent].range_image_return1.shape"
    table = pq.read_table(path)
    shapes = pa.array([[5, WIDTH, 4]] * len(table), pa.list_(pa.int32(), 3))
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, shapes), path)


def _keep(path: Path, rows: int) -> None:
    pq.write_table(pq.read_table(path).slice(0, rows), path)


@pytest.mark.parametrize(
    ("component", "harm", "message"),
    [
        ("lidar", _damage, r"lidar/one\.parquet cannot be read"),
        ("lidar", lambda p: _drop(p, "key.laser_name"), r"lidar/one\.parquet has no column key\.laser_name"),
        ("lidar", _cut, r"lidar/one\.parquet, time 1500000, laser 2: .*2160 values and shape \(5, 90, 4\)"),
        ("lidar_calibration", lambda p: _keep(p, 1), r"lidar_calibration/one\.parquet: no row for laser 2"),
        ("lidar_pose", lambda p: _keep(p, 2), "lidar_pose has no row at time 1700000"),
        ("lidar_pose", Path.unlink, r"lidar_pose/one\.parquet is missing"),
        ("vehicle_pose", lambda p: _keep(p, 1), r"vehicle_pose/one\.parquet: no row at time 1600000"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], component: str, harm: Any, message: str
) -> None:
    root = make_data(tmp_path / "waymo")
    harm(root / f"training/{component}/one.parquet")
    assert main([str(root), str(tmp_path / "plain"), "--splits", "training"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not list((tmp_path / "plain/training/segments").iterdir())


def test_poses_are_not_needed_for_points_as_they_were_measured(tmp_path: Path) -> None:
    root, out = make_data(tmp_path / "waymo"), tmp_path / "plain"
    for component in ("lidar_pose", "vehicle_pose"):
        (root / f"training/{component}/one.parquet").unlink()
    assert main([str(root), str(out), "--splits", "training", "--uncompensated", "--returns", "1"]) == 0
    points = np.load(out / f"training/points/one_{TIMES[0]}.npy")
    image, _ = wall_image(EXTRINSIC, BEAMS[::-1], driving)
    want = points_of_range_image(image, Calibration(EXTRINSIC, 0.0, 0.0, BEAMS))
    np.testing.assert_array_equal(points[: len(want)], want)


def test_wrong_arguments_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert re.search(r"training/lidar holds no \*\.parquet", capsys.readouterr().err)
    assert main([str(tmp_path), str(tmp_path / "out"), "--every", "0"]) == 2
    assert "--every is 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="squashed is"):
        PlainReader(tmp_path, squashed=(5,))
