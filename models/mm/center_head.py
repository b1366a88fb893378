"""Detection on a map seen from above: every object is a peak of its class's heat map, with its box beside it.

Source: Yin, Zhou, Kraehenbuehl, "Center-based 3D Object Detection and Tracking", CVPR 2021 (arXiv 2006.11275),
section 4, with ScatterFormer's additions: a branch for the box's IoU, by which scores are corrected, and an IoU loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from vitrail.layers.rotated_boxes import distance_iou_3d, paired_iou, rotated_nms

_EPS, _MOMENTUM = 1e-3, 0.01
_MAX_LOG_SIZE = 5.0  # 148 m: an untrained head must not overflow


class Targets(NamedTuple):
    """What one task's maps should be.

    Attributes:
        heat: (B, num_classes, H, W), 1 at an object's cell.
        scan: Scan of each object, (M,).
        cell: Row-major cell of each object, (M,).
        boxes: (M, 7 or 9).
    """

    heat: Tensor
    scan: Tensor
    cell: Tensor
    boxes: Tensor


def gaussian_radius(length: Tensor, width: Tensor, overlap: float) -> Tensor:
    """How many cells a box of `length` x `width` cells may be off and still overlap itself by `overlap` (CornerNet).

    As in CornerNet's released code, whose roots of the quadratic equations are the larger ones.
    """
    total, area = length + width, length * width
    r1 = (total + (total**2 - 4 * area * (1 - overlap) / (1 + overlap)).clamp(min=0).sqrt()) / 2
    r2 = (2 * total + (4 * total**2 - 16 * (1 - overlap) * area).clamp(min=0).sqrt()) / 2
    b3 = -2 * overlap * total
    r3 = (b3 + (b3**2 + 16 * overlap * (1 - overlap) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(r1, r2), r3)


def draw_gaussians(heat: Tensor, plane: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> None:
    """Raises maps to Gaussian bumps that are 1 at their cells, in place; where bumps meet, the larger counts.

    Args:
        heat: (P, H, W).
        plane: Map of each bump, (M,), int64.
        x: Column of its cell, (M,), int64.
        y: Row of its cell, (M,), int64.
        radius: Cells from the centre to the bump's border, (M,), int64; the deviation is a sixth of the diameter.
    """
    if not len(plane):
        return
    height, width = heat.shape[1:]
    reach = int(radius.max())
    steps = torch.arange(-reach, reach + 1, device=heat.device)
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    rows, columns = y[:, None, None] + dy, x[:, None, None] + dx  # (M, 2 reach + 1, 2 reach + 1)
    sigma = ((2 * radius + 1) / 6)[:, None, None]
    values = torch.exp(-(dx**2 + dy**2) / (2 * sigma**2))
    near = torch.maximum(dx.abs(), dy.abs()) <= radius[:, None, None]
    kept = near & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    place = ((plane[:, None, None] * height + rows) * width + columns)[kept]
    # The maximum does not depend on the order, so this is deterministic.
    heat.view(-1).scatter_reduce_(0, place, values.to(heat.dtype)[kept], "amax")


def heat_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Penalty-reduced focal loss over the number of objects (CenterNet's equation 1, alpha 2, beta 4).

    Args:
        logits: (B, C, H, W).
        heat: (B, C, H, W), in [0, 1].
    """
    is_peak = heat == 1
    p = logits.sigmoid()
    at_peaks = (1 - p) ** 2 * F.logsigmoid(logits)
    elsewhere = (1 - heat) ** 4 * p**2 * F.logsigmoid(-logits)
    return -torch.where(is_peak, at_peaks, elsewhere).sum() / is_peak.sum().clamp(min=1)


class CenterTask(nn.Module):
    """The branches of one group of classes.

    Args:
        dim: Channels in and between.
        outputs: Channels of each branch by its name.
    """

    def __init__(self, dim: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: _branch(dim, count) for name, count in outputs.items()})
        nn.init.constant_(self.branches["heat"][-1].bias, -2.19)  # a tenth: most cells are empty

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, dim, H, W) -> each branch's map, float32."""
        return {name: branch(x).float() for name, branch in self.branches.items()}


@MODELS.register_module()
class CenterHead(nn.Module):
    """Heat maps and boxes from a map seen from above.

    Args:
        in_channels: Of the map.
        tasks: Groups of class names; each has its own branches. Labels count through the groups.
        point_range: (x, y, z, x, y, z), lower and upper corner of the space that the map shows, in metres.
        dim: Channels of the branches.
        with_velocity: Predict (vx, vy) as well.
        iou_weights: Share of the predicted IoU in the score of each class, from 0 to 1; None: no IoU branch.
        nms_thresholds: For each class, the IoU above which the lower-scored of two boxes goes.
        loss_weights: Of "heat", "box", "iou" and "velocity" (relative to "box"); those left out are 1.
        iou_loss: Add an IoU loss to the boxes'.
        min_overlap: Overlap that sets the bumps' radius.
        min_radius: Smallest radius of a bump, in cells.
        score_threshold: Boxes below it are dropped.
        max_candidates: Cells of a task that are looked at.
        max_boxes: Boxes kept of a scan.

    Raises:
        ValueError: Numbers of classes disagree, or the range is empty.
    """

    def __init__(
        self,
        in_channels: int,
        tasks: Sequence[Sequence[str]],
        point_range: Sequence[float],
        dim: int = 64,
        with_velocity: bool = False,
        iou_weights: Sequence[float] | None = None,
        nms_thresholds: Sequence[float] | float = 0.2,
        loss_weights: Mapping[str, float] | None = None,
        iou_loss: bool = True,
        min_overlap: float = 0.1,
        min_radius: int = 2,
        score_threshold: float = 0.1,
        max_candidates: int = 500,
        max_boxes: int = 500,
    ) -> None:
        super().__init__()
        self.tasks = [tuple(task) for task in tasks]
        self.classes = tuple(name for task in self.tasks for name in task)
        self.num_classes = len(self.classes)
        self.point_range = _check_range(point_range)
        self.with_velocity = with_velocity
        self.iou_weights = None if iou_weights is None else self._per_class("iou_weights", iou_weights)
        self.nms_thresholds = self._per_class("nms_thresholds", nms_thresholds)
        self.loss_weights = {"heat": 1.0, "box": 1.0, "iou": 1.0, "velocity": 1.0, **(loss_weights or {})}
        self.iou_loss = iou_loss
        self.min_overlap, self.min_radius = min_overlap, min_radius
        self.score_threshold = score_threshold
        self.max_candidates, self.max_boxes = max_candidates, max_boxes
        self.shared = _conv_norm(in_channels, dim)
        outputs = {"center": 2, "z": 1, "size": 3, "heading": 2}
        outputs |= {"velocity": 2} if with_velocity else {}
        outputs |= {"iou": 1} if iou_weights is not None else {}
        self.heads = nn.ModuleList(CenterTask(dim, {"heat": len(task), **outputs}) for task in self.tasks)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """(B, in_channels, H, W) -> the maps of every task."""
        x = self.shared(x)
        return [head(x) for head in self.heads]

    def loss(self, x: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            x: (B, in_channels, H, W).
            boxes: (M_i, 7 or 9) of each scan, in metres.
            labels: (M_i,) of each scan.
        """
        losses: dict[str, Tensor] = {}
        first = 0
        for maps, task in zip(self(x), self.tasks, strict=True):
            own = [(label >= first) & (label < first + len(task)) for label in labels]
            targets = self.make_targets(
                [b[mask] for b, mask in zip(boxes, own, strict=True)],
                [label[mask] - first for label, mask in zip(labels, own, strict=True)],
                len(task),
                (maps["heat"].shape[2], maps["heat"].shape[3]),
            )
            for name, value in self._task_loss(maps, targets).items():
                losses[name] = losses[name] + value if name in losses else value
            first += len(task)
        return losses

    def make_targets(
        self, boxes: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, size: tuple[int, int]
    ) -> Targets:
        """Heat maps and the objects' cells; objects whose centre is outside of the map are left out.

        Args:
            boxes: (M_i, 7 or 9) of each scan.
            labels: (M_i,) of each scan, counted within the task.
            num_classes: Of the task.
            size: (H, W) of the map.
        """
        scan = torch.cat([torch.full_like(label, i) for i, label in enumerate(labels)])
        merged, kinds = torch.cat(list(boxes)).float(), torch.cat(list(labels))
        cell_x, cell_y = self._cell_size(size)
        x = ((merged[:, 0] - self.point_range[0]) / cell_x).floor().long()
        y = ((merged[:, 1] - self.point_range[1]) / cell_y).floor().long()
        seen = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
        merged, kinds, scan, x, y = merged[seen], kinds[seen], scan[seen], x[seen], y[seen]
        radius = gaussian_radius(merged[:, 3] / cell_x, merged[:, 4] / cell_y, self.min_overlap).floor().long()
        heat = merged.new_zeros(len(labels) * num_classes, *size)
        draw_gaussians(heat, scan * num_classes + kinds, x, y, radius.clamp(min=self.min_radius))
        return Targets(heat.view(len(labels), num_classes, *size), scan, y * size[1] + x, merged)

    def predict(self, x: Tensor) -> list[dict[str, Tensor]]:
        """(B, in_channels, H, W) -> for each scan `boxes` (K, 7 or 9), `scores` (K,) and `labels` (K,), best first."""
        found = [self._candidates(maps, first) for maps, first in zip(self(x), self._first_labels(), strict=True)]
        return [
            self._suppress(*(torch.cat(parts) for parts in zip(*scan, strict=True)))
            for scan in zip(*found, strict=True)
        ]

    def decode(self, maps: Mapping[str, Tensor], scan: Tensor, cell: Tensor) -> Tensor:
        """Boxes (M, 7 or 9) that the maps of a task hold at cells (M,) of scans (M,)."""
        size = (maps["heat"].shape[2], maps["heat"].shape[3])
        cell_x, cell_y = self._cell_size(size)
        at = {name: _gather(maps[name], scan, cell) for name in maps if name not in ("heat", "iou")}
        x = (cell % size[1] + at["center"][:, 0]) * cell_x + self.point_range[0]
        y = (cell // size[1] + at["center"][:, 1]) * cell_y + self.point_range[1]
        yaw = torch.atan2(at["heading"][:, 1], at["heading"][:, 0])
        extents = at["size"].clamp(-_MAX_LOG_SIZE, _MAX_LOG_SIZE).exp()
        parts = [x[:, None], y[:, None], at["z"], extents, yaw[:, None]]
        return torch.cat(parts + ([at["velocity"]] if self.with_velocity else []), dim=1)

    def _task_loss(self, maps: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        weights, scan, cell, boxes = self.loss_weights, targets.scan, targets.cell, targets.boxes
        count = max(len(boxes), 1)
        losses = {"loss_heat": weights["heat"] * heat_loss(maps["heat"], targets.heat)}
        errors = {
            name: (_gather(maps[name], scan, cell) - wanted).abs().sum() / count
            for name, wanted in self._encode(targets, (maps["heat"].shape[2], maps["heat"].shape[3])).items()
        }
        if self.with_velocity:
            losses["loss_velocity"] = weights["box"] * weights["velocity"] * errors.pop("velocity")
        losses["loss_box"] = weights["box"] * torch.stack(list(errors.values())).sum()
        decoded = self.decode(maps, scan, cell)
        if self.iou_loss:
            losses["loss_overlap"] = weights["box"] * (1 - distance_iou_3d(decoded, boxes)).sum() / count
        if self.iou_weights is not None:
            wanted = 2 * paired_iou(decoded.detach(), boxes, in_3d=True) - 1
            got = _gather(maps["iou"], scan, cell)[:, 0]
            losses["loss_iou"] = weights["iou"] * (got - wanted).abs().sum() / count
        return losses

    def _encode(self, targets: Targets, size: tuple[int, int]) -> dict[str, Tensor]:
        """What the regression maps should hold at the objects' cells."""
        cell_x, cell_y = self._cell_size(size)
        boxes, cell = targets.boxes, targets.cell
        x = (boxes[:, 0] - self.point_range[0]) / cell_x - cell % size[1]
        y = (boxes[:, 1] - self.point_range[1]) / cell_y - cell // size[1]
        wanted = {
            "center": torch.stack([x, y], dim=1),
            "z": boxes[:, 2:3],
            "size": boxes[:, 3:6].clamp(min=1e-3).log(),
            "heading": torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin()], dim=1),
        }
        return wanted | ({"velocity": boxes[:, 7:9]} if self.with_velocity else {})

    def _candidates(self, maps: Mapping[str, Tensor], first: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each scan the boxes, scores and labels of a task's hottest cells."""
        heat = maps["heat"].sigmoid().flatten(1)
        cells = maps["heat"].shape[2] * maps["heat"].shape[3]
        scores, places = heat.topk(min(self.max_candidates, heat.shape[1]), dim=1)
        found = []
        for i, (score, place) in enumerate(zip(scores, places, strict=True)):
            kept = score > self.score_threshold
            score, place = score[kept], place[kept]
            label, cell, scan = first + place // cells, place % cells, torch.full_like(place, i)
            if self.iou_weights is not None:
                iou = ((_gather(maps["iou"], scan, cell)[:, 0] + 1) / 2).clamp(0, 1)
                share = score.new_tensor(self.iou_weights)[label]
                score = score ** (1 - share) * iou**share
            found.append((self.decode(maps, scan, cell), score, label))
        return found

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        kept = []
        for label, threshold in enumerate(self.nms_thresholds):
            own = torch.nonzero((labels == label) & (scores > self.score_threshold))[:, 0]
            kept.append(own[rotated_nms(boxes[own], scores[own], threshold)])
        index = torch.cat(kept)
        index = index[scores[index].argsort(descending=True, stable=True)[: self.max_boxes]]
        return {"boxes": boxes[index], "scores": scores[index], "labels": labels[index]}

    def _first_labels(self) -> list[int]:
        return [sum(len(task) for task in self.tasks[:i]) for i in range(len(self.tasks))]

    def _cell_size(self, size: tuple[int, int]) -> tuple[float, float]:
        low, high = self.point_range[:3], self.point_range[3:]
        return (high[0] - low[0]) / size[1], (high[1] - low[1]) / size[0]

    def _per_class(self, name: str, values: Sequence[float] | float) -> tuple[float, ...]:
        given = (values,) * self.num_classes if isinstance(values, (int, float)) else tuple(values)
        if len(given) != self.num_classes or not all(0 <= value <= 1 for value in given):
            raise ValueError(f"{name} is {values}; allowed: {self.num_classes} numbers from 0 to 1, one a class")
        return given


def _check_range(point_range: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(value) for value in point_range)
    is_box = len(values) == 6 and all(math.isfinite(v) for v in values)
    if not is_box or any(low >= high for low, high in zip(values[:3], values[3:], strict=True)):
        raise ValueError(f"point_range is {values}; allowed: lower corner (x, y, z), then upper corner")
    return values


def _gather(x: Tensor, scan: Tensor, cell: Tensor) -> Tensor:
    """Values (M, C) of a (B, C, H, W) map at cells of scans."""
    return x.flatten(2)[scan, :, cell]


def _conv_norm(in_channels: int, dim: int) -> nn.Sequential:
    norm = nn.BatchNorm2d(dim, eps=_EPS, momentum=_MOMENTUM)
    return nn.Sequential(nn.Conv2d(in_channels, dim, 3, padding=1, bias=False), norm, nn.ReLU())


def _branch(dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(dim, dim), nn.Conv2d(dim, outputs, 3, padding=1))
