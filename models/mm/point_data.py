"""LiDAR data sets: scans from a reader, augmented in training, as samples and batches.

A sample is {"inputs": points (N, F), "data_samples": {...}} with `name`, `boxes` (M, 7 or 9), `labels` (M,), `ignored`
(M,), `difficulty` (M,) and `counts`: what was left out (see `COUNTS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.registry import DATASETS, FUNCTIONS
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.layers.rotated_boxes import points_in_boxes
from vitrail.models.mm.datasets import SampleKey
from vitrail.models.mm.point_augment import ObjectSampling, SceneAugmentation
from vitrail.models.mm.point_readers import KittiReader, NuScenesReader, PlainReader, ScanReader
from vitrail.models.mm.seeding import derive_seed

READERS = {"kitti": KittiReader, "nuscenes": NuScenesReader, "plain": PlainReader}

# What a sample counts: points that are not finite, points out of range, scans without a point in range, boxes of
# learned classes without a point, and such boxes out of range.
COUNTS = ("nonfinite_points", "outside_points", "empty_scans", "boxes_without_points", "boxes_outside")


@DATASETS.register_module()
class PointDataset(Dataset[dict[str, Any]]):
    """Scans with boxes.

    Args:
        reader: Layout of the files: "kitti", "nuscenes" or "plain".
        data_root: Folder of all files.
        classes: Names of the classes that are learned.
        point_range: (x, y, z, x, y, z), lower and upper corner of the space that is seen.
        data_prefix: Folders below `data_root`, arguments of the reader.
        ann_file: List of what belongs to this part of the data, below `data_root`.
        training: Leave out boxes from which nothing can be learned; otherwise they stay, marked as ignored.
        neighbours: Classes that count as neither right nor wrong where this class is meant, such as Van for Car.
        min_points: Boxes with fewer points are treated as ones without.
        scene: Arguments of `SceneAugmentation`; None for none.
        objects: Arguments of `ObjectSampling`, with `counts` by class name; None for none.
        repeat: How often an epoch has each scan.
        seed: Of the augmentations.
        **options: Other arguments of the reader.

    Raises:
        ValueError: An argument is wrong.
        PointDataError: The files are.
    """

    def __init__(
        self,
        reader: str,
        data_root: str,
        classes: Sequence[str],
        point_range: Sequence[float],
        data_prefix: Mapping[str, str] | None = None,
        ann_file: str | None = None,
        training: bool = False,
        neighbours: Mapping[str, str] | None = None,
        min_points: int = 1,
        scene: Mapping[str, Any] | None = None,
        objects: Mapping[str, Any] | None = None,
        repeat: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if reader not in READERS:
            raise ValueError(f"reader is {reader!r}; allowed: {', '.join(READERS)}")
        if repeat < 1 or len(point_range) != 6:
            raise ValueError(f"repeat is {repeat}, point_range {tuple(point_range)}; allowed: at least 1, 6 numbers")
        self.metainfo = {"classes": tuple(classes)}
        self.point_range, self.training, self.min_points = tuple(point_range), training, min_points
        self.neighbours, self.repeat, self.seed = dict(neighbours or {}), repeat, seed
        given = {**options, **(data_prefix or {})}
        try:
            self.reader: ScanReader = READERS[reader](data_root, ann_file=ann_file, **given)
        except TypeError as error:
            raise ValueError(f"reader {reader!r}: {error}") from error
        self.scene = None if scene is None else SceneAugmentation(**scene)
        self.objects = None if objects is None else self._object_sampling(objects)

    def __len__(self) -> int:
        return len(self.reader) * self.repeat

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        key = SampleKey(0, key, key) if isinstance(key, int) else key
        index = key.index % len(self.reader)
        found = self.reader.objects(index)
        counts = dict.fromkeys(COUNTS, 0)
        points = self._finite(self.reader.points(index), counts)
        labels, ignored = self._labels(found.names)
        boxes, difficulty = found.boxes, found.difficulty
        if self.training:
            points, boxes, labels = self._augment(points, boxes, labels, index, key)
            ignored = torch.cat([ignored, ignored.new_zeros(len(boxes) - len(ignored))])
            difficulty = torch.cat([difficulty, difficulty.new_zeros(len(boxes) - len(difficulty))])
        points = self._in_range(points, counts)
        useless = self._useless(points, boxes, (labels >= 0) & ~ignored, counts)
        ignored = ignored | useless
        kept = (labels >= 0) & ~ignored if self.training else labels >= 0
        sample = {"name": self.reader.name(index), "counts": counts, "boxes": boxes[kept], "labels": labels[kept]}
        sample |= {"ignored": ignored[kept], "difficulty": difficulty[kept]}
        return {"inputs": points, "data_samples": sample}

    def _object_sampling(self, given: Mapping[str, Any]) -> ObjectSampling:
        arguments = dict(given)
        counts = arguments.pop("counts")
        unknown = sorted(set(counts) - set(self.metainfo["classes"]))
        if unknown:
            raise ValueError(f"objects.counts has {', '.join(unknown)}; classes: {', '.join(self.metainfo['classes'])}")
        by_label = {self._label(name): count for name, count in counts.items()}
        return ObjectSampling(self.reader, self._label, by_label, **arguments)

    def _label(self, name: str) -> int:
        classes = self.metainfo["classes"]
        return classes.index(name) if name in classes else -1

    def _labels(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Labels, and which of them stand for a neighbouring class only."""
        near = [name in self.neighbours and self._label(name) < 0 for name in names]
        meant = [self._label(self.neighbours[n] if is_near else n) for n, is_near in zip(names, near, strict=True)]
        return torch.tensor(meant, dtype=torch.int64), torch.tensor(near, dtype=torch.bool)

    def _augment(
        self, points: Tensor, boxes: Tensor, labels: Tensor, index: int, key: SampleKey
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = derive_seed("scan", self.seed, key.epoch, key.position)
        generator = torch.Generator().manual_seed(seed)
        if self.objects is not None:
            points, boxes, labels = self.objects(points, boxes, labels, index, key.epoch, generator)
        if self.scene is not None:
            points, boxes = self.scene(points, boxes, generator)
        return points, boxes, labels

    def _finite(self, points: Tensor, counts: dict[str, int]) -> Tensor:
        finite = points.isfinite().all(dim=1)
        counts["nonfinite_points"] = int((~finite).sum())
        return points[finite]

    def _in_range(self, points: Tensor, counts: dict[str, int]) -> Tensor:
        low, high = points.new_tensor(self.point_range[:3]), points.new_tensor(self.point_range[3:])
        inside = ((points[:, :3] >= low) & (points[:, :3] < high)).all(dim=1)
        counts["outside_points"] = int((~inside).sum())
        counts["empty_scans"] = int(not inside.any())
        return points[inside]

    def _useless(self, points: Tensor, boxes: Tensor, learned: Tensor, counts: dict[str, int]) -> Tensor:
        """Boxes out of range or without points, (M,); counted where they are `learned`."""
        low, high = boxes.new_tensor(self.point_range[:3]), boxes.new_tensor(self.point_range[3:])
        outside = ~((boxes[:, :3] >= low) & (boxes[:, :3] < high))[:, :2].all(dim=1)
        bare = points_in_boxes(points, boxes).sum(dim=1) < self.min_points
        counts["boxes_outside"] = int((outside & learned).sum())
        counts["boxes_without_points"] = int((bare & ~outside & learned).sum())
        return outside | bare


@FUNCTIONS.register_module()
def collate_scans(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Samples of `PointDataset` as one batch of lists."""
    return {key: [sample[key] for sample in samples] for key in ("inputs", "data_samples")}
