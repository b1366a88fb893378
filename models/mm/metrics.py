"""What a classifier got right: gathered over processes, one entry an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Predictions:
    """The outcome of an evaluation, sorted by place in the data set.

    Attributes:
        indices: (N,) places in the data set, without repeats.
        labels: (N,) true classes.
        predicted: (N,) classes of the largest logit.
        confidence: (N,) probability of the predicted class.
        in_top5: (N,) whether the true class is among the five largest logits.
        losses: (N,) cross entropy.
        unreadable: (M,) places of images that could not be decoded.
    """

    indices: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    in_top5: np.ndarray
    losses: np.ndarray
    unreadable: np.ndarray

    @classmethod
    def from_batches(cls, batches: Sequence[Mapping[str, np.ndarray]]) -> Predictions:
        """Joins the results of `judge`, from any process and in any order.

        Raises:
            ValueError: No image could be decoded.
        """
        joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        if not len(joined["indices"]):
            raise ValueError(f"none of the {len(joined['unreadable'])} images can be read")
        order = np.argsort(joined["indices"], kind="stable")
        unreadable = np.unique(joined.pop("unreadable"))
        return cls(unreadable=unreadable, **{key: values[order] for key, values in joined.items()})

    @property
    def top1(self) -> float:
        """Share of images whose class was predicted, in percent."""
        return 100.0 * float(np.mean(self.predicted == self.labels))

    @property
    def top5(self) -> float:
        """Share of images whose class is among the five most probable, in percent."""
        return 100.0 * float(np.mean(self.in_top5))

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return float(np.mean(self.losses))

    def confusion(self, num_classes: int) -> np.ndarray:
        """Counts by (true class, predicted class)."""
        pairs = self.labels * num_classes + self.predicted
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """For every class its images, precision, recall and F1 in percent (0 where a share has no denominator)."""
        confusion = self.confusion(len(classes))
        hits, support, answers = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        recall = 100.0 * hits / np.maximum(support, 1)
        precision = 100.0 * hits / np.maximum(answers, 1)
        f1 = 200.0 * hits / np.maximum(support + answers, 1)
        return [
            {
                "class": name,
                "images": int(support[i]),
                "precision": round(float(precision[i]), 3),
                "recall": round(float(recall[i]), 3),
                "f1": round(float(f1[i]), 3),
            }
            for i, name in enumerate(classes)
        ]


def lowest_classes(rows: Sequence[Mapping[str, Any]], places: int) -> tuple[list[Mapping[str, Any]], str]:
    """The classes of lowest recall, and a heading for them; classes without images do not count.

    Where classes of equal recall compete for the last places none of them is listed: to pick some would mean nothing.

    Args:
        rows: Of `Predictions.per_class`.
        places: How many classes there is space for.
    """
    ranked = sorted((row for row in rows if row["images"]), key=lambda row: row["recall"])
    if len(ranked) <= places:
        return ranked, f"all {len(ranked)} classes that have images, of {len(rows)}"
    bound = ranked[places]["recall"]
    lowest = [row for row in ranked[:places] if row["recall"] < bound]
    if len(lowest) == places:
        return lowest, f"the {_classes_go(places)} worst, of {len(rows)}"
    tied = sum(row["recall"] == bound for row in ranked)
    if not lowest:
        return [], f"{tied} of {len(rows)} classes go worst, each with a recall of {bound:.1f} %: too many to list"
    return lowest, f"the {_classes_go(len(lowest))} worst, of {len(rows)}; the next {tied} all have {bound:.1f} %"


def _classes_go(count: int) -> str:
    return "1 class that goes" if count == 1 else f"{count} classes that go"


def judge(logits: Tensor, labels: Tensor, indices: Tensor, unreadable: Tensor) -> dict[str, np.ndarray]:
    """Reduces one batch of logits (B, num_classes) to what `Predictions` keeps of each image."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    kept = {
        "indices": indices,
        "labels": labels,
        "predicted": top[:, 0],
        "confidence": logits.softmax(dim=1).amax(dim=1),
        "in_top5": (top == labels[:, None]).any(dim=1),
        "losses": F.cross_entropy(logits, labels, reduction="none"),
        "unreadable": unreadable,
    }
    return {name: values.cpu().numpy() for name, values in kept.items()}


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """Top-1, top-5 and loss on the validation data, every image counted once whatever the number of processes.

    mmengine's own gathering assumes equal shares and drops the rest. `last` keeps the latest `Predictions`.
    """

    default_prefix = "accuracy"

    def __init__(self) -> None:
        super().__init__()
        self.last: Predictions | None = None

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        """Keeps what counts of one batch."""
        self.results.extend(judge(**sample) for sample in data_samples)

    def compute_metrics(self, results: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Joins the batches of all processes."""
        self.last = Predictions.from_batches(results)
        return {"top1": self.last.top1, "top5": self.last.top5, "loss": self.last.loss}

    def evaluate(self, size: int) -> dict[str, float]:
        """Gathers from all processes and computes.

        Args:
            size: Images in the data set.

        Raises:
            RuntimeError: Images were lost or counted twice.
        """
        batches = [batch for part in all_gather_object(self.results) for batch in part]
        self.results.clear()
        metrics = self.compute_metrics(batches)
        seen = np.concatenate([self.last.indices, self.last.unreadable])
        if len(seen) != size or len(np.unique(seen)) != size:
            raise RuntimeError(f"evaluated {len(seen)} images ({len(np.unique(seen))} different) of {size}")
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}


@torch.inference_mode()
def evaluate(model: torch.nn.Module, loader: Any, device: torch.device, on_batch: Any = None) -> Predictions:
    """Runs a plain classifier over a loader of `ClassificationDataset` batches in one process.

    Args:
        model: From images to logits.
        loader: Yields what `collate_classification` returns.
        device: Where the model is.
        on_batch: Called with each batch's number of images, for a progress display.
    """
    model.eval()
    batches = []
    for batch in loader:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        images = moved.pop("images")
        logits = model(images).float() if len(images) else images.new_zeros(0, 1)
        batches.append(judge(logits, **moved))
        if on_batch is not None:
            on_batch(len(logits))
    return Predictions.from_batches(batches)
