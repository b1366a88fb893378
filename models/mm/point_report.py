"""A scan from above as a picture, with the boxes that are there and those that were found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from vitrail.layers.rotated_boxes import box_corners_bev
from vitrail.models.mm.checkpoint import atomic_write

_TRUE, _FOUND, _IGNORED = "#2f9e44", "#dd6b20", "#868e96"
_INCHES = 10.0  # of the longer side


def draw_scan(
    path: str | Path,
    points: Tensor,
    boxes: Tensor,
    ignored: Tensor,
    found: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    title: str,
) -> None:
    """Draws points, true boxes (green; grey: ignored) and found ones (orange, with class and score) into a PNG.

    Args:
        path: Of the PNG.
        points: (N, 3 or more).
        boxes: True ones, (M, 7 or more).
        ignored: (M,), bool.
        found: (K, 7 or more).
        scores: (K,).
        labels: Of the found boxes, (K,).
        classes: Names by label.
        title: Above the picture.
    """
    spread = (points[:, :2].amax(0) - points[:, :2].amin(0)).clamp(min=1.0) if len(points) else points.new_ones(2)
    width, height = ((spread / spread.max()) * _INCHES).clamp(min=4).tolist()
    figure = Figure(figsize=(width, height + 0.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.set_xlabel("x / m")
    axes.set_ylabel("y / m")
    axes.scatter(points[:, 0], points[:, 1], s=0.3, c="#495057", linewidths=0, rasterized=True)
    _draw_boxes(axes, boxes[ignored], _IGNORED, 1.0)
    _draw_boxes(axes, boxes[~ignored], _TRUE, 2.2)
    _draw_boxes(axes, found, _FOUND, 1.1)
    for box, score, label in zip(found.tolist(), scores.tolist(), labels.tolist(), strict=True):
        axes.annotate(f"{classes[label]} {score:.2f}", box[:2], (4, 4), textcoords="offset points", fontsize=6)
    for name, colour in (("true", _TRUE), ("found", _FOUND), ("ignored", _IGNORED)):
        axes.plot([], [], color=colour, label=name)
    axes.legend(loc="upper right", fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_write(path, buffer.getvalue())


def _draw_boxes(axes: Axes, boxes: Tensor, colour: str, width: float) -> None:
    """Outlines, and a line from the centre to the front."""
    if not len(boxes):
        return
    corners = box_corners_bev(boxes)
    front = (corners[:, 0] + corners[:, 3]) / 2
    outlines = [[*box, box[0]] for box in corners.tolist()]
    headings = [[start, stop] for start, stop in zip(boxes[:, :2].tolist(), front.tolist(), strict=True)]
    axes.add_collection(LineCollection(outlines + headings, colors=colour, linewidths=width))
