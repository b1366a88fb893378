"""What a training run leaves behind: weights, figures as JSON, and one picture."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timm.data import ImageNetInfo
from torch import nn

from vitrail.models.mm.checkpoint import atomic_write
from vitrail.models.mm.datasets import ClassificationDataset
from vitrail.models.mm.images import UnreadableImageError
from vitrail.models.mm.metrics import Predictions, lowest_classes

_LARGEST_CONFUSION = 50  # classes; beyond that the picture shows the classes that go worst
_NUMBERED_CONFUSION = 20  # classes; beyond that the cells carry no numbers
_MISTAKE_ROWS, _MISTAKE_COLUMNS = 2, 10
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#718096"


def save_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON atomically."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def draw_report(
    path: str | Path,
    title: str,
    curve: Sequence[Mapping[str, float]],
    predictions: Predictions,
    dataset: ClassificationDataset,
) -> None:
    """Draws learning curve, confusion matrix (or, with many classes, the worst ones) and mistakes into one PNG.

    Args:
        path: Of the PNG.
        title: First line of the picture.
        curve: Rows of `CurveHook`; an empty one leaves its panel out.
        predictions: On the held-out data.
        dataset: The held-out data.
    """
    mistakes = int(np.sum(predictions.predicted != predictions.labels))
    rows = min(_MISTAKE_ROWS, max(1, -(-mistakes // _MISTAKE_COLUMNS)))
    figure = Figure(figsize=(14, 7.2 + 1.9 * rows), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=14)
    upper, lower = figure.subfigures(2, 1, height_ratios=[6.6, 0.6 + 1.9 * rows])
    panels = upper.subplots(1, 2 if curve else 1, squeeze=False, width_ratios=[1, 1.15] if curve else None)[0]
    if curve:
        _draw_curve(panels[0], curve)
    names = readable_names(dataset.source.classes)
    draw = _draw_confusion if len(names) <= _LARGEST_CONFUSION else _draw_worst_classes
    draw(panels[-1], predictions, names)
    _draw_mistakes(lower, predictions, dataset, names, rows)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    atomic_write(path, _png(canvas))


def readable_names(classes: Sequence[str]) -> list[str]:
    """Class names for a picture: ImageNet's numbers (n01440764) become the first of their words (tench)."""
    info = ImageNetInfo()
    known = set(info.label_names())
    return [info.label_name_to_description(name).split(",")[0] if name in known else name for name in classes]


@torch.inference_mode()
def measure_throughput(model: nn.Module, image_shape: tuple[int, int, int], batch: int, seconds: float = 1.0) -> float:
    """Images a second of inference on the model's device, from the median of batches run for about `seconds`.

    Args:
        model: Put in evaluation mode.
        image_shape: (C, H, W).
        batch: Images in a batch.
        seconds: How long to measure, after two batches of warm-up.
    """
    device = next(model.parameters()).device
    images = torch.randn(batch, *image_shape, device=device)
    model.eval()
    durations: list[float] = []
    while len(durations) < 5 or sum(durations) < seconds:
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return batch / float(np.median(durations[2:]))


def _draw_curve(axes: Axes, curve: Sequence[Mapping[str, float]]) -> None:
    axes.set_title("learning curve")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    marker = "o" if len(curve) < 40 else ""
    _plot(axes, curve, "train_loss", color=_BLUE, label="training loss", marker=marker)
    _plot(axes, curve, "val_loss", color=_ORANGE, label="held-out loss", marker=marker)
    losses = [row[name] for row in curve for name in ("train_loss", "val_loss") if name in row]
    axes.set_ylim(0, 1.06 * max(losses))
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.set_ylabel("accuracy, %")
    _plot(right, curve, "train_accuracy", color=_BLUE, label="training accuracy", linestyle="--")
    _plot(right, curve, "val_top1", color=_ORANGE, label="held-out accuracy", linestyle="--")
    right.set_ylim(0, 102)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="center right", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _plot(axes: Axes, curve: Sequence[Mapping[str, float]], name: str, **style: Any) -> None:
    points = [(row["epoch"], row[name]) for row in curve if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), markersize=3, linewidth=1.6, **style)


def _draw_confusion(axes: Axes, predictions: Predictions, classes: Sequence[str]) -> None:
    count = len(classes)
    confusion = predictions.confusion(count)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)  # the root makes rare confusions visible
    axes.set_title("confusion on held-out images")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    names = [_shorten(name, 16) for name in classes]
    small = 9 if count <= _NUMBERED_CONFUSION else 6
    rotation = 0 if max(map(len, names)) <= 2 else 60
    axes.set_xticks(range(count), names, rotation=rotation, ha="right" if rotation else "center", fontsize=small)
    axes.set_yticks(range(count), names, fontsize=small)
    axes.tick_params(length=0)
    if count <= _NUMBERED_CONFUSION:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=9, color=colour)


def _draw_worst_classes(axes: Axes, predictions: Predictions, classes: Sequence[str], shown: int = 25) -> None:
    worst, heading = lowest_classes(predictions.per_class(classes), shown)
    axes.barh([_shorten(row["class"], 28) for row in worst], [row["recall"] for row in worst], color=_BLUE)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_title(heading, fontsize=11)
    axes.set_xlabel("held-out accuracy of the class, %")


def _draw_mistakes(
    figure: Any, predictions: Predictions, dataset: ClassificationDataset, names: Sequence[str], rows: int
) -> None:
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    wrong = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")]
    total = f"{len(wrong)} of {len(predictions.labels)} held-out images"
    shown = wrong[: rows * _MISTAKE_COLUMNS]
    which = "the most confident ones" if len(wrong) > len(shown) else "all shown"
    figure.suptitle(f"mistakes: {total}" + (f", {which} (true → predicted)" if len(wrong) else ""), fontsize=12)
    grid = figure.subplots(rows, _MISTAKE_COLUMNS)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, place in zip(grid.flat, shown, strict=False):
        axes.imshow(_thumbnail(dataset, int(predictions.indices[place])))
        true, predicted = names[predictions.labels[place]], names[predictions.predicted[place]]
        label = f"{_shorten(true, 14)} → {_shorten(predicted, 14)}"
        if len(label) > 16:
            label = label.replace(" → ", "\n→ ")
        axes.set_title(f"{label}\n{100 * predictions.confidence[place]:.0f} %", fontsize=8)


def _thumbnail(dataset: ClassificationDataset, index: int) -> np.ndarray:
    try:
        image = dataset.source.load(index)
    except UnreadableImageError:
        return np.zeros((8, 8, 3), dtype=np.uint8)
    image.thumbnail((160, 160))
    return np.asarray(image)


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _png(canvas: FigureCanvasAgg) -> bytes:
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
