"""Augmentations of LiDAR scans: whole scenes flipped, turned, scaled and moved, and objects put in from other scans.

Source: Yan, Mao, Li, "SECOND", Sensors 2018, section 3.4, with the sizes of ScatterFormer's recipes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitrail.layers.rotated_boxes import pairwise_iou, points_in_boxes, wrap_angle
from vitrail.models.mm.checkpoint import atomic_write
from vitrail.models.mm.point_readers import PointDataError, ScanReader

_TRIES = 4  # objects that are looked at for each that is wanted


def flip(points: Tensor, boxes: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Mirrors a scene: "x" at the x axis (y changes its sign), "y" at the y axis."""
    column = {"x": 1, "y": 0}[axis]
    points, boxes = points.clone(), boxes.clone()
    points[:, column] *= -1
    boxes[:, column] *= -1
    boxes[:, 6] = wrap_angle(-boxes[:, 6] if axis == "x" else math.pi - boxes[:, 6])
    boxes[:, 7 + column : 8 + column] *= -1
    return points, boxes


def rotate(points: Tensor, boxes: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """Turns a scene counter-clockwise about z."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = points.new_tensor([[cos, sin], [-sin, cos]])  # rows times this
    points, boxes = points.clone(), boxes.clone()
    points[:, :2] = points[:, :2] @ turn
    boxes[:, :2] = boxes[:, :2] @ turn
    boxes[:, 6] = wrap_angle(boxes[:, 6] + angle)
    if boxes.shape[1] > 7:
        boxes[:, 7:9] = boxes[:, 7:9] @ turn
    return points, boxes


def scale(points: Tensor, boxes: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Scales a scene about its origin, velocities included."""
    points, boxes = points.clone(), boxes.clone()
    points[:, :3] *= factor
    boxes[:, :6] *= factor
    boxes[:, 7:] *= factor
    return points, boxes


def translate(points: Tensor, boxes: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Moves a scene by (x, y, z)."""
    points, boxes = points.clone(), boxes.clone()
    points[:, :3] += offset
    boxes[:, :3] += offset
    return points, boxes


class SceneAugmentation:
    """Random flips, rotation, scale and translation of a whole scene, in this order.

    Args:
        flips: Axes at which a scene is mirrored with a chance of one half each: "x", "y".
        rotation: Largest angle in radians.
        scaling: Smallest and largest factor.
        translation: Standard deviation along each axis, in metres.

    Raises:
        ValueError: An axis is unknown, or a size is out of range.
    """

    def __init__(
        self,
        flips: Sequence[str] = ("x", "y"),
        rotation: float = math.pi / 4,
        scaling: Sequence[float] = (0.95, 1.05),
        translation: float = 0.5,
    ) -> None:
        if not set(flips) <= {"x", "y"}:
            raise ValueError(f"flips is {tuple(flips)}; allowed: 'x', 'y'")
        if not 0 < scaling[0] <= scaling[1]:
            raise ValueError(f"scaling is {tuple(scaling)}; allowed: a positive smallest factor and a larger one")
        self.flips, self.rotation, self.scaling, self.translation = tuple(flips), rotation, tuple(scaling), translation

    def __call__(self, points: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points (N, F) and boxes (M, 7 or 9), changed."""
        draws = torch.rand(4, generator=generator).tolist()
        offset = torch.randn(3, generator=generator) * self.translation
        for axis, draw in zip("xy", draws[:2], strict=True):
            if axis in self.flips and draw < 0.5:
                points, boxes = flip(points, boxes, axis)
        points, boxes = rotate(points, boxes, (2 * draws[2] - 1) * self.rotation)
        points, boxes = scale(points, boxes, self.scaling[0] + draws[3] * (self.scaling[1] - self.scaling[0]))
        return translate(points, boxes, offset)


class ObjectSampling:
    """Puts labelled objects of other scans where they are in those scans and touch nothing.

    Which objects there are is known from the labels; an object's points are cut out of its scan when it is drawn, and
    kept in `cache` (arrays of numbers, one a file) if that is given, so nothing has to be prepared.

    Args:
        reader: The scans.
        label_of: From a class name to a label; negative for classes that are not learned.
        counts: For each label, how many objects a scene should have at least.
        min_points: Objects with fewer points are not used.
        stop_epoch: First epoch without this augmentation; None: none.
        cache: Folder of the objects' points; None keeps none.
    """

    def __init__(
        self,
        reader: ScanReader,
        label_of: Callable[[str], int],
        counts: Mapping[int, int],
        min_points: int = 5,
        stop_epoch: int | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.reader, self.counts, self.min_points, self.stop_epoch = reader, dict(counts), min_points, stop_epoch
        self.cache = None if cache is None else Path(cache)
        self._pool: dict[int, list[tuple[int, int]]] = {label: [] for label in self.counts}
        self._boxes: dict[tuple[int, int], Tensor] = {}
        for scan in range(len(reader)):
            objects = reader.objects(scan)
            for place, name in enumerate(objects.names):
                label = label_of(name)
                if label in self._pool:
                    self._pool[label].append((scan, place))
                    self._boxes[scan, place] = objects.boxes[place]

    def __call__(
        self, points: Tensor, boxes: Tensor, labels: Tensor, index: int, epoch: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds objects to a scene.

        Args:
            points: (N, F).
            boxes: (M, 7 or 9), of all objects, also of those that are not learned.
            labels: (M,).
            index: The scene's scan, from which nothing is taken.
            epoch: Now.
            generator: Of the choice.
        """
        if self.stop_epoch is not None and epoch >= self.stop_epoch:
            return points, boxes, labels
        for label, wanted in self.counts.items():
            missing = wanted - int((labels == label).sum())
            pool = self._pool[label]
            if missing <= 0 or not pool:
                continue
            drawn = torch.randperm(len(pool), generator=generator)[: missing * _TRIES].tolist()
            for key in (pool[i] for i in drawn):
                box = self._boxes[key][None]
                if missing == 0 or key[0] == index or (len(boxes) and bool((pairwise_iou(box, boxes) > 0).any())):
                    continue
                cut = self._points_of(key)
                if len(cut) < self.min_points:
                    continue
                points = torch.cat([points[~points_in_boxes(points, box)[0]], cut])
                boxes, labels = torch.cat([boxes, box]), torch.cat([labels, labels.new_tensor([label])])
                missing -= 1
        return points, boxes, labels

    def _points_of(self, key: tuple[int, int]) -> Tensor:
        scan, place = key
        path = None if self.cache is None else self.cache / f"{self.reader.name(scan)}_{place}.npy"
        if path is not None and path.is_file():
            try:
                return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
            except (ValueError, EOFError) as error:
                raise PointDataError(f"{path} is no array of numbers ({error}); remove it") from error
        points = self.reader.points(scan)
        points = points[points.isfinite().all(dim=1)]
        cut = points[points_in_boxes(points, self._boxes[key][None])[0]]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.save(buffer, cut.numpy())
            atomic_write(path, buffer.getvalue())
        return cut
