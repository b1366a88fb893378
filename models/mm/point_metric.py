"""Average precision of boxes from above and in space, as KITTI counts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from vitrail.layers.rotated_boxes import pairwise_iou
from vitrail.models.mm.point_data import COUNTS
from vitrail.models.mm.point_report import draw_scan

LEVELS = ("easy", "moderate", "hard")
_RECALLS = 40  # KITTI's recall positions 1/40, 2/40, ..., 1
_POINTS_DRAWN = 60_000


def match_scan(iou: np.ndarray, scores: np.ndarray, ignored: np.ndarray, threshold: float) -> np.ndarray:
    """What each found box of a scan is: 1 right, 0 wrong, -1 does not count; all of one class.

    By falling score a box takes the free true box that it overlaps most, by `threshold` at least. If none is left, it
    does not count where it lies on an ignored box, and is wrong elsewhere.

    Args:
        iou: (K, M), of found and true boxes.
        scores: (K,).
        ignored: (M,), bool.
        threshold: Least IoU.
    """
    verdicts = np.zeros(len(scores), np.int64)
    free = ~ignored
    for k in np.argsort(-scores, kind="stable"):
        candidates = np.where(free, iou[k], -1.0)
        best = int(candidates.argmax()) if candidates.size else -1
        if best >= 0 and candidates[best] >= threshold:
            free[best] = False
            verdicts[k] = 1
        elif (iou[k][ignored] >= threshold).any():
            verdicts[k] = -1
    return verdicts


def average_precision(scores: np.ndarray, verdicts: np.ndarray, count: int) -> float:
    """Mean over 40 recalls of the best precision at that recall or a higher one.

    Args:
        scores: (K,), of all scans.
        verdicts: (K,), of `match_scan`.
        count: True boxes that count; without any the result is NaN.
    """
    if count == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    counted = verdicts[order]
    counted = counted[counted >= 0]
    right = np.cumsum(counted == 1)
    precision = right / np.arange(1, len(counted) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # right[k] / count >= i / 40, in whole numbers
    places = np.searchsorted(right * _RECALLS, np.arange(1, _RECALLS + 1) * count)
    return float(np.append(best, 0.0)[np.minimum(places, len(best))].sum() / _RECALLS)


@METRICS.register_module()
class PointAveragePrecision(BaseMetric):
    """AP by class, from above ("bev_Car") and in space ("3d_Car"), and their means ("bev_mAP", "3d_mAP").

    Classes without a true box that counts have no AP and are left out of the means; without any the means are 0. What
    KITTI's own evaluation does with the boxes in the image (small ones, DontCare regions) is not done here.

    Args:
        iou: Least overlap of a right box, one number for all or one a class.
        by_difficulty: Add "bev_Car_easy" and so on: objects beyond a level are ignored there.
        num_pictures: Scans that are kept for pictures.
        picture_dir: Where to draw them after each evaluation; None: `draw` does it.
    """

    default_prefix = None

    def __init__(
        self,
        iou: float | Mapping[str, float] = 0.5,
        by_difficulty: bool = False,
        num_pictures: int = 8,
        picture_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.iou, self.by_difficulty = iou, by_difficulty
        self.num_pictures, self.picture_dir = num_pictures, picture_dir
        self._pictures: list[tuple[Tensor, dict[str, Any]]] = []

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keeps what counts of one batch."""
        if not self.results:
            self._pictures = []
        for points, sample in zip(data_batch["inputs"], data_samples, strict=True):
            sample = _to_cpu(sample)
            self.results.append(self._overlaps(sample))
            if len(self._pictures) < self.num_pictures:
                step = max(1, len(points) // _POINTS_DRAWN)
                self._pictures.append((points[::step, :3].cpu(), sample))

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """AP over all scans of all processes."""
        classes = self.dataset_meta["classes"]
        metrics: dict[str, float] = {}
        for view in ("bev", "3d"):
            values = []
            for label, name in enumerate(classes):
                value = self._ap(results, view, label, name, None)
                if value == value:
                    metrics[f"{view}_{name}"] = value
                    values.append(value)
                metrics |= self._by_level(results, view, label, name) if self.by_difficulty else {}
            metrics[f"{view}_mAP"] = sum(values) / len(values) if values else 0.0
        metrics |= {name: float(sum(result["counts"][name] for result in results)) for name in COUNTS}
        if self.picture_dir is not None:
            self.draw(Path(self.picture_dir))
        return metrics

    def draw(self, folder: Path) -> int:
        """Draws the kept scans into a folder; returns how many there were."""
        if self._pictures:
            folder.mkdir(parents=True, exist_ok=True)
        for points, sample in self._pictures:
            found, name = sample["predicted"], sample["name"]
            draw_scan(
                folder / f"{name}.png", points, sample["boxes"], sample["ignored"], found["boxes"], found["scores"],
                found["labels"], self.dataset_meta["classes"], f"{name}: {len(points):,} points from above",
            )  # fmt: skip
        return len(self._pictures)

    def _overlaps(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        found, boxes = sample["predicted"], sample["boxes"]
        kept = {
            "scores": found["scores"],
            "found": found["labels"],
            "labels": sample["labels"],
            "ignored": sample["ignored"],
            "difficulty": sample["difficulty"],
            "bev": pairwise_iou(found["boxes"].double(), boxes.double()),
            "3d": pairwise_iou(found["boxes"].double(), boxes.double(), in_3d=True),
        }
        return {name: value.numpy() for name, value in kept.items()} | {"counts": sample["counts"]}

    def _by_level(self, results: list[dict[str, Any]], view: str, label: int, name: str) -> dict[str, float]:
        values = {level: self._ap(results, view, label, name, i) for i, level in enumerate(LEVELS)}
        return {f"{view}_{name}_{level}": value for level, value in values.items() if value == value}

    def _ap(self, results: list[dict[str, Any]], view: str, label: int, name: str, level: int | None) -> float:
        threshold = self.iou if isinstance(self.iou, (int, float)) else self.iou[name]
        scores, verdicts, count = [np.zeros(0)], [np.zeros(0, np.int64)], 0
        for result in results:
            own, found = result["labels"] == label, result["found"] == label
            ignored = result["ignored"] | (False if level is None else result["difficulty"] > level)
            scores.append(result["scores"][found])
            verdicts.append(match_scan(result[view][found][:, own], scores[-1], ignored[own], threshold))
            count += int((~ignored[own]).sum())
        return average_precision(np.concatenate(scores), np.concatenate(verdicts), count)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return {key: _to_cpu(item) for key, item in value.items()} if isinstance(value, Mapping) else value
