"""Reads LiDAR scans and their boxes in the layouts of KITTI and nuScenes, and in a plain one.

Nothing here unpickles or runs what it reads. Boxes are (x, y, z, length, width, height, yaw) in the LiDAR's frame, z at
the centre; those of nuScenes and of the plain layout may have (vx, vy) behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.layers.rotated_boxes import wrap_angle


class PointDataError(ValueError):
    """A file of a LiDAR data set cannot be used; the message names it, and the line or entry."""


@dataclass
class Objects:
    """What stands in a scan.

    Attributes:
        names: Class name of each object, as the data set has it.
        boxes: (M, 7 or 9), float32.
        difficulty: 0 easy, 1 moderate, 2 hard, 3 beyond, (M,), int64.
    """

    names: list[str]
    boxes: Tensor
    difficulty: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if len(self.difficulty) != len(self.names):
            self.difficulty = torch.zeros(len(self.names), dtype=torch.int64)


class ScanReader(Protocol):
    """Scans by index."""

    box_size: int

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a scan in a message and a file name."""

    def points(self, index: int) -> Tensor:
        """(N, F), float32, x y z first; may hold values that are not finite."""

    def objects(self, index: int) -> Objects:
        """The labelled objects."""


def read_bin(path: Path, columns: int) -> Tensor:
    """A file of float32 numbers, `columns` a point: (N, columns).

    Raises:
        PointDataError: The size is no multiple of a point.
        FileNotFoundError: There is no such file.
    """
    values = np.fromfile(path, "<f4")
    if path.stat().st_size % (4 * columns):
        raise PointDataError(
            f"{path} has {path.stat().st_size} bytes, no multiple of {columns} float32 numbers a point"
        )
    return torch.from_numpy(values.astype(np.float32, copy=False).reshape(-1, columns))


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top is a `kind`.

    Raises:
        PointDataError: It is not JSON, or its top is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise PointDataError(f"{path} is not JSON ({place})") from error
    if not isinstance(content, kind):
        raise PointDataError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def read_names(path: Path) -> list[str]:
    """One name a line, which must stay inside its folder.

    Raises:
        PointDataError: There is none, or one that leaves the folder.
    """
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    for number, name in enumerate(names, start=1):
        if "/" in name or "\\" in name or name in (".", ".."):
            raise PointDataError(f"{path}, name {number}: {name[:50]!r} is not a plain name")
    if not names:
        raise PointDataError(f"{path} lists no scan")
    return names


# KITTI: least height of the image box in pixels, most occlusion, most truncation of easy, moderate and hard objects.
_KITTI_LEVELS = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))


@dataclass
class KittiCalibration:
    """From the LiDAR to the left colour camera.

    Attributes:
        to_camera: (4, 4), LiDAR to the rectified camera frame.
        projection: (3, 4), rectified camera frame to pixels.
    """

    to_camera: np.ndarray
    projection: np.ndarray

    @classmethod
    def read(cls, path: Path) -> KittiCalibration:
        """Reads `calib/*.txt`.

        Raises:
            PointDataError: A matrix is missing or malformed.
        """
        found: dict[str, np.ndarray] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            key, _, rest = line.partition(":")
            if rest.strip():
                found[key.strip()] = np.array(_numbers(rest.split(), path, number))
        matrices = []
        for key, shape in (("R0_rect", (3, 3)), ("Tr_velo_to_cam", (3, 4)), ("P2", (3, 4))):
            if key not in found or found[key].size != math.prod(shape):
                raise PointDataError(f"{path}: {key} is missing or has not {math.prod(shape)} numbers")
            matrices.append(found[key].reshape(shape))
        turn, move = np.eye(4), np.eye(4)
        turn[:3, :3], move[:3] = matrices[0], matrices[1]
        to_camera = turn @ move
        if abs(np.linalg.det(to_camera)) < 1e-6:
            raise PointDataError(f"{path}: R0_rect and Tr_velo_to_cam make no invertible transformation")
        return cls(to_camera, matrices[2])

    def in_view(self, points: Tensor, width: int, height: int) -> Tensor:
        """Which points (N, 3 or more) the camera sees, (N,)."""
        homogeneous = np.concatenate([points[:, :3].double().numpy(), np.ones((len(points), 1))], axis=1)
        with np.errstate(all="ignore"):  # points that are not finite are in no view
            camera = homogeneous @ self.to_camera.T
            u, v, depth = (camera @ self.projection.T).T
            seen = (depth > 0) & (u >= 0) & (u < width * depth) & (v >= 0) & (v < height * depth)
        return torch.from_numpy(seen)


class KittiReader:
    """KITTI's 3D object data: `velodyne/*.bin`, `label_2/*.txt`, `calib/*.txt`, `ImageSets/*.txt`.

    Args:
        root: Folder of all.
        ann_file: List of scans, a name a line; None for all that have labels.
        points: Folder of the scans.
        labels: Folder of the labels.
        calib: Folder of the calibrations.
        images: Folder of the images, of which only the size is read; None, or one without the image: 1242 x 375 pixels.
        view_only: Leave out points that the camera does not see, where nothing is labelled.

    Raises:
        PointDataError: No scan is found.
    """

    box_size = 7

    def __init__(
        self,
        root: str | Path,
        ann_file: str | None = None,
        points: str = "training/velodyne",
        labels: str = "training/label_2",
        calib: str = "training/calib",
        images: str | None = None,
        view_only: bool = True,
    ) -> None:
        self.root = Path(root)
        self._points, self._labels, self._calib = self.root / points, self.root / labels, self.root / calib
        self._images = None if images is None else self.root / images
        self.view_only = view_only
        if ann_file is not None:
            self._names = read_names(self.root / ann_file)
        else:
            self._names = sorted(path.stem for path in self._labels.glob("*.txt"))
        if not self._names:
            raise PointDataError(f"{self._labels} has no *.txt")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The scan's number."""
        return self._names[index]

    def points(self, index: int) -> Tensor:
        """(N, 4): x y z intensity."""
        name = self._names[index]
        points = read_bin(self._points / f"{name}.bin", 4)
        if not self.view_only:
            return points
        finite = points.isfinite().all(dim=1)  # what is not finite stays, to be counted
        return points[~finite | self._calibration(name).in_view(points, *self._image_size(name))]

    def objects(self, index: int) -> Objects:
        """Labels but DontCare, in the LiDAR's frame."""
        name = self._names[index]
        path = self._labels / f"{name}.txt"
        to_lidar = np.linalg.inv(self._calibration(name).to_camera)
        names, boxes, levels = [], [], []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            fields = line.split()
            if not fields or fields[0] == "DontCare":
                continue
            if len(fields) not in (15, 16):
                raise PointDataError(f"{path}, line {number}: {len(fields)} fields, expected 15: {line[:60]!r}")
            values = _numbers(fields[1:15], path, number)
            names.append(fields[0])
            boxes.append(_check_box(_kitti_box(values, to_lidar), f"{path}, line {number}"))
            levels.append(_kitti_level(values))
        return Objects(names, _stack(boxes, 7), torch.tensor(levels, dtype=torch.int64))

    def _calibration(self, name: str) -> KittiCalibration:
        return KittiCalibration.read(self._calib / f"{name}.txt")

    def _image_size(self, name: str) -> tuple[int, int]:
        for suffix in (".png", ".jpg"):
            path = self._images / f"{name}{suffix}" if self._images else None
            if path is not None and path.is_file():
                try:
                    with Image.open(path) as image:
                        return image.size
                except OSError as error:
                    raise PointDataError(f"{path} is no image: {error}") from error
        return 1242, 375


def _kitti_box(values: Sequence[float], to_lidar: np.ndarray) -> list[float]:
    height, width, length, x, y, z, ry = values[7:14]
    centre = to_lidar @ np.array([x, y - height / 2, z, 1.0])  # the label has the bottom's centre, y points down
    yaw = float(wrap_angle(torch.tensor(-ry - math.pi / 2, dtype=torch.float64)))
    return [*centre[:3].tolist(), length, width, height, yaw]


def _kitti_level(values: Sequence[float]) -> int:
    truncation, occlusion, box_height = values[0], values[1], values[6] - values[4]
    for level, (least, occluded, truncated) in enumerate(_KITTI_LEVELS):
        if box_height >= least and occlusion <= occluded and truncation <= truncated:
            return level
    return len(_KITTI_LEVELS)


class PlainReader:
    """A layout for what has no reader: `points/NAME.npy` and `boxes/NAME.json`.

    `points/NAME.npy` is a float array (N, F), x y z first. `boxes/NAME.json` is a list of
    {"name": class, "box": [x, y, z, length, width, height, yaw], "velocity": [vx, vy], "difficulty": 0}; the last two
    are optional.

    Args:
        root: Folder of both.
        ann_file: List of scans, a name a line; None for all that have boxes.
        points: Folder of the arrays.
        boxes: Folder of the lists.
        columns: F.
        squashed: Columns without bounds, such as intensities, that tanh brings between -1 and 1.
        with_velocity: Boxes have nine numbers; those without a velocity get 0.

    Raises:
        PointDataError: No scan is found.
    """

    def __init__(
        self,
        root: str | Path,
        ann_file: str | None = None,
        points: str = "points",
        boxes: str = "boxes",
        columns: int = 5,
        squashed: Sequence[int] = (),
        with_velocity: bool = False,
    ) -> None:
        if not all(0 <= column < columns for column in squashed):
            raise ValueError(f"squashed is {tuple(squashed)}; allowed: columns from 0 to {columns - 1}")
        self.root, self.columns, self.squashed = Path(root), columns, list(squashed)
        self.box_size = 9 if with_velocity else 7
        self._points, self._boxes = self.root / points, self.root / boxes
        self._names = (
            read_names(self.root / ann_file) if ann_file else sorted(p.stem for p in self._boxes.glob("*.json"))
        )
        if not self._names:
            raise PointDataError(f"{self._boxes} has no *.json")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The files' stem."""
        return self._names[index]

    def points(self, index: int) -> Tensor:
        """(N, F)."""
        path = self._points / f"{self._names[index]}.npy"
        try:
            values = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise PointDataError(f"{path} is no array of numbers: {error}") from error
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.ndim != 2:
            raise PointDataError(f"{path} holds no array of floats with two dimensions")
        if values.shape[1] != self.columns:
            raise PointDataError(f"{path} has {values.shape[1]} numbers a point, expected {self.columns}")
        points = torch.from_numpy(values.astype(np.float32))
        points[:, self.squashed] = points[:, self.squashed].tanh()
        return points

    def objects(self, index: int) -> Objects:
        """The labelled objects."""
        path = self._boxes / f"{self._names[index]}.json"
        names, boxes, levels = [], [], []
        for number, entry in enumerate(read_json(path, list)):
            place = f"{path}, entry {number}"
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise PointDataError(f"{place}: expected an object with a name and a box")
            box = _number_list(entry, "box", 7, place)
            if self.box_size == 9:
                box += _number_list(entry, "velocity", 2, place) if "velocity" in entry else [0.0, 0.0]
            names.append(entry["name"])
            boxes.append(_check_box(box, place))
            levels.append(int(_number_list({"d": [entry.get("difficulty", 0)]}, "d", 1, place)[0]))
        return Objects(names, _stack(boxes, self.box_size), torch.tensor(levels, dtype=torch.int64))


# nuScenes: the ten classes of its detection task, by the categories that they are made of.
NUSCENES_CLASSES = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}
_MAX_SECONDS = 1.5  # neighbouring annotations further apart give no velocity


class NuScenesReader:
    """nuScenes' own layout: a folder of JSON tables, and the sweeps in `samples` and `sweeps`.

    Points are (x, y, z, intensity, seconds before the keyframe), all in the keyframe's LiDAR frame.

    Args:
        root: Folder with `samples`, `sweeps` and the tables' folder.
        version: Folder of the tables, such as "v1.0-trainval".
        ann_file: List of scenes by name, a line each; None for all. The data set's development kit has the official
            lists (`nuscenes.utils.splits`).
        sweeps: LiDAR sweeps that are joined, the keyframe's among them.
        near: Points nearer than this to the sensor in x and y belong to the car and go.

    Raises:
        PointDataError: A table is missing, damaged or contradicts another.
    """

    box_size = 9

    def __init__(
        self, root: str | Path, version: str, ann_file: str | None = None, sweeps: int = 10, near: float = 1.0
    ) -> None:
        if sweeps < 1:
            raise ValueError(f"sweeps is {sweeps}; allowed: at least 1")
        self.root, self.sweeps, self.near = Path(root), sweeps, near
        self._folder = self.root / version
        wanted = set(read_names(self.root / ann_file)) if ann_file else None
        scenes = self._table("scene", ("token", "name"))
        chosen = {token for token, row in scenes.items() if wanted is None or row["name"] in wanted}
        if wanted is not None and len(chosen) < len(wanted):
            raise PointDataError(f"{self.root / ann_file}: {len(wanted) - len(chosen)} scenes are not in {version}")
        self._load_sweeps(self._table("sample", ("token", "timestamp", "scene_token")), chosen)
        self._load_boxes()
        if not self._keyframes:
            raise PointDataError(f"{self._folder}: no LiDAR keyframe in the chosen scenes")

    def __len__(self) -> int:
        return len(self._keyframes)

    def name(self, index: int) -> str:
        """The keyframe's token."""
        return self._keyframes[index]

    def points(self, index: int) -> Tensor:
        """(N, 5): x y z intensity seconds."""
        token = self._keyframes[index]
        key = self._sweeps[token]
        from_global = np.linalg.inv(self._to_global(key))
        parts = []
        for _ in range(self.sweeps):
            sweep = self._sweeps[token]
            points = read_bin(self._path(sweep), 5)
            points = points[~((points[:, 0].abs() < self.near) & (points[:, 1].abs() < self.near))]
            move = torch.from_numpy(from_global @ self._to_global(sweep))
            xyz = points[:, :3].double() @ move[:3, :3].T + move[:3, 3]
            ago = torch.full((len(points), 1), (key["timestamp"] - sweep["timestamp"]) * 1e-6)
            parts.append(torch.cat([xyz.float(), points[:, 3:4], ago.float()], dim=1))
            token = sweep["prev"]
            if token not in self._sweeps:
                break
        return torch.cat(parts)

    def objects(self, index: int) -> Objects:
        """The annotations of the keyframe's sample, in its LiDAR frame."""
        key = self._sweeps[self._keyframes[index]]
        from_global = np.linalg.inv(self._to_global(key))
        names, boxes = [], []
        for row in self._boxes.get(key["sample_token"], ()):
            width, length, height = _number_list(row, "size", 3, f"{self._folder}/sample_annotation.json")
            pose = from_global @ self._pose(row, "sample_annotation")
            yaw = math.atan2(pose[1, 0], pose[0, 0])
            velocity = from_global[:3, :3] @ self._velocity(row)
            box = [*pose[:3, 3].tolist(), length, width, height, yaw, *velocity[:2].tolist()]
            names.append(self._class_of(row))
            boxes.append(_check_box(box, f"{self._folder}/sample_annotation.json, token {row['token']}"))
        return Objects(names, _stack(boxes, 9))

    def _load_sweeps(self, samples: Mapping[str, Any], chosen: set[str]) -> None:
        """Keeps of all sensor data the LiDAR's, in the chosen scenes."""
        self._samples = {token: row for token, row in samples.items() if row["scene_token"] in chosen}
        keys = ("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "filename", "prev")
        rows = self._table("sample_data", (*keys, "is_key_frame"), lambda row: "LIDAR_TOP" in str(row.get("filename")))
        self._sweeps = {token: row for token, row in rows.items() if row["sample_token"] in self._samples}
        keyframes = [token for token, row in self._sweeps.items() if row["is_key_frame"]]
        self._keyframes = sorted(keyframes, key=lambda token: (self._sweeps[token]["timestamp"], token))
        poses = {row["ego_pose_token"] for row in self._sweeps.values()}
        self._ego = self._table("ego_pose", ("token", "translation", "rotation"), lambda row: row.get("token") in poses)
        self._sensors = self._table("calibrated_sensor", ("token", "translation", "rotation"))

    def _load_boxes(self) -> None:
        categories = self._table("category", ("token", "name"))
        instances = self._table("instance", ("token", "category_token"))
        self._category = {
            token: categories.get(row["category_token"], {}).get("name", "") for token, row in instances.items()
        }
        keys = ("token", "sample_token", "instance_token", "translation", "rotation", "size", "prev", "next")
        self._annotations = self._table("sample_annotation", keys, lambda row: row.get("sample_token") in self._samples)
        self._boxes: dict[str, list[dict[str, Any]]] = {}
        for row in self._annotations.values():
            self._boxes.setdefault(row["sample_token"], []).append(row)

    def _table(
        self, name: str, keys: Sequence[str], keep: Callable[[Mapping[str, Any]], bool] = lambda row: True
    ) -> dict[str, dict[str, Any]]:
        """Rows of a table by their token, with the keys that are needed."""
        path = self._folder / f"{name}.json"
        rows = {}
        for number, row in enumerate(read_json(path, list)):
            if not isinstance(row, dict):
                raise PointDataError(f"{path}, entry {number}: a {type(row).__name__}, expected an object")
            if not keep(row):
                continue
            lacking = [key for key in keys if key not in row]
            if lacking:
                raise PointDataError(f"{path}, entry {number}: no {', '.join(lacking)}")
            rows[row["token"]] = {key: row[key] for key in keys}
        return rows

    def _path(self, sweep: Mapping[str, Any]) -> Path:
        path = (self.root / str(sweep["filename"])).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise PointDataError(
                f"{self._folder}/sample_data.json, token {sweep['token']}: filename leaves {self.root}"
            )
        return path

    def _to_global(self, sweep: Mapping[str, Any]) -> np.ndarray:
        rows = []
        for table, rows_by_token in (("ego_pose", self._ego), ("calibrated_sensor", self._sensors)):
            token = sweep[f"{table}_token"]
            if token not in rows_by_token:
                raise PointDataError(f"{self._folder}/{table}.json has no token {token}, which sample_data.json names")
            rows.append(self._pose(rows_by_token[token], table))
        return rows[0] @ rows[1]

    def _pose(self, row: Mapping[str, Any], table: str) -> np.ndarray:
        """(4, 4) of a translation and a quaternion (w, x, y, z)."""
        place = f"{self._folder}/{table}.json, token {row['token']}"
        w, x, y, z = _number_list(row, "rotation", 4, place)
        norm = w * w + x * x + y * y + z * z
        if norm < 1e-12:
            raise PointDataError(f"{place}: rotation is no quaternion")
        s = 2 / norm
        pose = np.eye(4)
        pose[:3, :3] = [
            [1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)],
            [s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x)],
            [s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)],
        ]
        pose[:3, 3] = _number_list(row, "translation", 3, place)
        return pose

    def _velocity(self, row: Mapping[str, Any]) -> np.ndarray:
        """Metres a second in the global frame, from the neighbouring annotations; 0 where it is unknown."""
        first = self._annotations.get(row["prev"], row)
        last = self._annotations.get(row["next"], row)
        times = [self._samples[r["sample_token"]]["timestamp"] * 1e-6 for r in (first, last)]
        seconds = times[1] - times[0]
        if not 0 < seconds <= _MAX_SECONDS * (2 if first is not row and last is not row else 1):
            return np.zeros(3)
        place = f"{self._folder}/sample_annotation.json, token {row['token']}"
        ends = [np.array(_number_list(r, "translation", 3, place)) for r in (first, last)]
        return (ends[1] - ends[0]) / seconds

    def _class_of(self, row: Mapping[str, Any]) -> str:
        category = self._category.get(row["instance_token"], "")
        return NUSCENES_CLASSES.get(category, category or "unknown")


def _numbers(fields: Sequence[str], path: Path, line: int) -> list[float]:
    try:
        values = [float(value) for value in fields]
    except ValueError as error:
        raise PointDataError(f"{path}, line {line}: {error}") from error
    if not all(math.isfinite(value) for value in values):
        raise PointDataError(f"{path}, line {line}: a number is not finite")
    return values


def _number_list(row: Mapping[str, Any], key: str, count: int, place: str) -> list[float]:
    values = row.get(key)
    is_list = isinstance(values, list) and len(values) == count
    if not is_list or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise PointDataError(f"{place}: {key} is {str(values)[:60]}, expected {count} finite numbers")
    return [float(value) for value in values]


def _check_box(box: list[float], place: str) -> list[float]:
    if min(box[3:6]) <= 0:
        raise PointDataError(f"{place}: a box of {box[3]:g} x {box[4]:g} x {box[5]:g} m; extents must be positive")
    return box


def _stack(boxes: list[list[float]], size: int) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, size)
