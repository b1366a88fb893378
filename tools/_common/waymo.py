"""Reads Waymo's perception data in its parquet layout (v2): range images as points, boxes, one segment at a time.

Written from the public description of the layout (waymo-research/waymo-open-dataset, v2/perception) and tried on files
made up after it, not on Waymo's own, which cannot be had without registration.

Layout: `ROOT/SPLIT/COMPONENT/SEGMENT.parquet`. Used are the components

| component | row | columns |
|---|---|---|
| `lidar` | frame and laser | `range_image_return1.{values,shape}`, `range_image_return2...`: (H, W, 4) |
| `lidar_calibration` | laser | `extrinsic.transform`, `beam_inclination.{min,max,values}` |
| `lidar_pose` | frame and laser | `range_image_return1.{values,shape}`: (H, W, 6), of the top laser alone |
| `vehicle_pose` | frame | `world_from_vehicle.transform` |
| `lidar_box` | object in a frame | `box.{center,size}.{x,y,z}`, `box.heading`, `type`, `num_lidar_points_in_box`, ... |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.tools._common.cli import ToolError

TYPES = {0: "Unknown", 1: "Vehicle", 2: "Pedestrian", 3: "Sign", 4: "Cyclist"}
_TIME, _LASER = "key.frame_timestamp_micros", "key.laser_name"
_FEW_POINTS = 5  # of a box whose level is not given: Waymo counts it as level 2 up to here
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Calibration:
    """Of a laser.

    Attributes:
        extrinsic: (4, 4), laser to vehicle.
        low: Least inclination in radians, if the beams are evenly spread.
        high: Greatest one.
        values: Inclinations from the lowest beam to the highest, if they are not.
    """

    extrinsic: np.ndarray
    low: float
    high: float
    values: np.ndarray | None

    def inclinations(self, height: int) -> np.ndarray:
        """Of the rows of a range image, the highest first: (height,)."""
        if self.values is None:
            return (self.low + (np.arange(height) + 0.5) / height * (self.high - self.low))[::-1]
        return self.values[::-1]


@dataclass
class Frame:
    """Points and boxes at one time.

    Attributes:
        timestamp: Microseconds.
        points: x, y, z, intensity, elongation in the vehicle's frame, (N, 5), float32.
        objects: Entries of the plain layout (`vitrail.models.mm.point_readers.PlainReader`), with more keys of Waymo's.
    """

    timestamp: int
    points: np.ndarray
    objects: list[dict[str, Any]] = field(default_factory=list)


def points_of_range_image(
    image: np.ndarray,
    calibration: Calibration,
    pixel_pose: np.ndarray | None = None,
    vehicle_pose: np.ndarray | None = None,
) -> np.ndarray:
    """Points of the pixels that hold a range, in the vehicle's frame.

    Column 0 looks along +pi of the vehicle's yaw, the last along -pi. While the top laser turns, the vehicle drives:
    with both poses each pixel is brought to the world as the vehicle stood then, and back as it stands in the frame.

    Args:
        image: (H, W, 4): range in metres, intensity, elongation, and whether it lies in a zone without labels.
        calibration: Of the laser.
        pixel_pose: (H, W, 6): roll, pitch, yaw, x, y, z of the vehicle in the world.
        vehicle_pose: (4, 4), vehicle to world, at the frame's time.

    Returns:
        (N, 5): x, y, z, intensity, elongation, float32.
    """
    height, width = image.shape[:2]
    row, column = np.nonzero(image[..., 0] > 0)
    distance, intensity, elongation = image[row, column, :3].astype(np.float64).T
    turn = np.arctan2(calibration.extrinsic[1, 0], calibration.extrinsic[0, 0])
    azimuth = (2 * (width - column - 0.5) / width - 1) * np.pi - turn
    inclination = calibration.inclinations(height)[row]
    flat = distance * np.cos(inclination)
    xyz = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), distance * np.sin(inclination)], 1)
    xyz = _move(calibration.extrinsic, xyz)
    if pixel_pose is not None and vehicle_pose is not None:
        poses = pixel_pose[row, column].astype(np.float64)
        xyz = np.einsum("nij,nj->ni", _rotations(*poses[:, :3].T), xyz) + poses[:, 3:]
        xyz = _move(np.linalg.inv(vehicle_pose), xyz)
    return np.concatenate([xyz, intensity[:, None], elongation[:, None]], 1).astype(np.float32)


def _move(pose: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    return xyz @ pose[:3, :3].T + pose[:3, 3]


def _rotations(roll: np.ndarray, pitch: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """About x, then y, then z: (N, 3, 3)."""
    (cr, cp, cy), (sr, sp, sy) = ([f(angle) for angle in (roll, pitch, yaw)] for f in (np.cos, np.sin))
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


class Segment:
    """Twenty seconds of driving.

    Args:
        folder: Of the split, with a folder for each component.
        name: Of the segment.
        returns: Which returns of the lasers give points, of 1 and 2.
        every: Only each `every`-th frame is read, from the first on.
        compensated: Undo the vehicle's motion during a turn of the top laser.

    Raises:
        ToolError: A file is missing or is not in the layout.
    """

    def __init__(
        self, folder: Path, name: str, returns: Sequence[int], every: int = 1, compensated: bool = True
    ) -> None:
        self._folder, self._name, self._returns, self._compensated = folder, name, tuple(returns), compensated
        keys = self._table("lidar", [_TIME, _LASER])
        counts: dict[int, int] = {}
        for time in keys[_TIME]:
            counts[time] = counts.get(time, 0) + 1
        self._lasers_at = {time: counts[time] for time in sorted(counts)[::every]}
        self._calibrations = self._read_calibrations()
        self._objects = self._read_objects()
        self._vehicle_poses = self._read_vehicle_poses() if compensated else {}

    def __len__(self) -> int:
        return len(self._lasers_at)

    def frames(self) -> Iterator[Frame]:
        """Frames as they become complete; of a file in the order of time that is the order of time."""
        poses = _Later(self._images("lidar_pose", (1,), 6)) if self._compensated else None
        waiting: dict[int, list[tuple[int, np.ndarray]]] = {}
        for time, laser, images in self._images("lidar", self._returns, 4):
            pixel_pose = poses.take(time, laser) if poses is not None else None
            if laser not in self._calibrations:
                raise ToolError(f"{self._path('lidar_calibration')}: no row for laser {laser}")
            parts = [
                self._points(image, self._calibrations[laser], pixel_pose, time, laser)
                for image in images
                if image is not None
            ]
            found = waiting.setdefault(time, [])
            found.append((laser, np.concatenate([np.zeros((0, 5), np.float32), *parts])))
            if len(found) == self._lasers_at[time]:
                lasers = sorted(waiting.pop(time), key=lambda entry: entry[0])
                points = np.concatenate([points for _, points in lasers])
                yield Frame(time, points, self._objects.get(time, []))

    def _points(
        self, image: np.ndarray, calibration: Calibration, pixel_pose: np.ndarray | None, time: int, laser: int
    ) -> np.ndarray:
        place = f"{self._path('lidar')}, time {time}, laser {laser}"
        if calibration.values is not None and len(calibration.values) != len(image):
            raise ToolError(
                f"{place}: a range image of {len(image)} rows, {len(calibration.values)} beams in lidar_calibration"
            )
        if pixel_pose is not None and pixel_pose.shape[:2] != image.shape[:2]:
            raise ToolError(f"{place}: a range image of {image.shape[:2]} pixels, {pixel_pose.shape[:2]} in lidar_pose")
        vehicle_pose = self._vehicle_poses.get(time)
        if pixel_pose is not None and vehicle_pose is None:
            raise ToolError(f"{self._path('vehicle_pose')}: no row at time {time}")
        return points_of_range_image(image, calibration, pixel_pose, vehicle_pose)

    def _images(
        self, component: str, returns: Sequence[int], channels: int
    ) -> Iterator[tuple[int, int, list[np.ndarray | None]]]:
        """(time, laser, images of the returns) of the chosen frames' rows, in the file's order."""
        prefix = "LiDARComponent" if component == "lidar" else "LiDARPoseComponent"
        names = [f"[{prefix}].range_image_return{number}" for number in returns]
        path = self._path(component)
        columns = [_TIME, _LASER, *(f"{name}.{part}" for name in names for part in ("values", "shape"))]
        with _open_parquet(path, columns) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for i, (time, laser) in enumerate(
                    zip(*(batch[key].to_pylist() for key in (_TIME, _LASER)), strict=True)
                ):
                    if time in self._lasers_at:
                        place = f"{path}, time {time}, laser {laser}"
                        yield time, laser, [_image(batch, name, i, channels, place) for name in names]

    def _read_calibrations(self) -> dict[int, Calibration]:
        prefix = "[LiDARCalibrationComponent]."
        extrinsic, low, high, values = (
            prefix + name
            for name in (
                "extrinsic.transform",
                "beam_inclination.min",
                "beam_inclination.max",
                "beam_inclination.values",
            )
        )
        table = self._table("lidar_calibration", [_LASER, extrinsic, low, high, values])
        return {
            laser: Calibration(
                np.array(table[extrinsic][i], np.float64).reshape(4, 4),
                table[low][i],
                table[high][i],
                np.array(table[values][i], np.float64) if table[values][i] else None,
            )
            for i, laser in enumerate(table[_LASER])
        }

    def _read_vehicle_poses(self) -> dict[int, np.ndarray]:
        name = "[VehiclePoseComponent].world_from_vehicle.transform"
        table = self._table("vehicle_pose", [_TIME, name])
        poses = zip(table[_TIME], table[name], strict=True)
        return {time: np.array(pose, np.float64).reshape(4, 4) for time, pose in poses}

    def _read_objects(self) -> dict[int, list[dict[str, Any]]]:
        prefix = "[LiDARBoxComponent]."
        box = [f"{prefix}box.{what}.{axis}" for what in ("center", "size") for axis in "xyz"] + [f"{prefix}box.heading"]
        kind, count = f"{prefix}type", f"{prefix}num_lidar_points_in_box"
        level, identity = f"{prefix}difficulty_level.detection", "key.laser_object_id"
        table = self._table("lidar_box", [_TIME, identity, *box, kind, count, level])
        objects: dict[int, list[dict[str, Any]]] = {}
        for i, time in enumerate(table[_TIME]):
            number = int(table[count][i] or 0)
            entry = {
                "name": TYPES.get(table[kind][i], TYPES[0]),
                "box": [float(table[name][i]) for name in box],
                "difficulty": (table[level][i] or (1 if number > _FEW_POINTS else 2)) - 1,
                "num_points": number,
                "id": table[identity][i],
            }
            objects.setdefault(time, []).append(entry)
        return objects

    def _table(self, component: str, columns: list[str]) -> dict[str, list[Any]]:
        """Whole columns, as Python's values."""
        with _open_parquet(self._path(component), columns) as file:
            return file.read(columns=columns).to_pydict()

    def _path(self, component: str) -> Path:
        return self._folder / component / f"{self._name}.parquet"


class _Later:
    """Pixel poses by time and laser, from a file that is read along with that of the range images."""

    def __init__(self, rows: Iterator[tuple[int, int, list[np.ndarray | None]]]) -> None:
        self._rows = rows
        self._waiting: dict[tuple[int, int], np.ndarray | None] = {}

    def take(self, time: int, laser: int) -> np.ndarray | None:
        """The pose image, None for lasers without one, of which Waymo compensates none but the top laser."""
        if laser != 1:
            return None
        while (time, laser) not in self._waiting:
            row = next(self._rows, None)
            if row is None:
                raise ToolError(f"lidar_pose has no row at time {time} for laser {laser}")
            self._waiting[row[:2]] = row[2][0]
        return self._waiting.pop((time, laser))


def _image(batch: Any, name: str, i: int, channels: int, place: str) -> np.ndarray | None:
    """A range image (H, W, channels) of a row, None where the row has none."""
    values, shape = batch[f"{name}.values"][i], batch[f"{name}.shape"][i]
    if not values.is_valid or not shape.is_valid:
        return None
    flat, dims = values.values.to_numpy(zero_copy_only=False), tuple(shape.as_py())
    if len(dims) != 3 or dims[2] != channels or flat.size != np.prod(dims):
        raise ToolError(f"{place}: {name} has {flat.size} values and shape {dims}; expected (H, W, {channels})")
    return flat.reshape(dims)


@contextmanager
def _open_parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """An open file that has the columns; what goes wrong inside is told with the file's name."""
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise ToolError(f"{path} is missing")
    try:
        with parquet.ParquetFile(path) as file:
            lacking = sorted(set(columns) - set(file.schema_arrow.names))
            if lacking:
                raise ToolError(f"{path} has no column {', '.join(lacking)}; its version is not 2.0 of the layout")
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ToolError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
