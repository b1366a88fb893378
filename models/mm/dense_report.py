"""The picture that the training of a detector or segmenter leaves behind."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitrail.models.mm.checkpoint import atomic_write

_BLUE, _ORANGE = "#2b6cb0", "#dd6b20"


def draw_curve(path: str | Path, title: str, curve: Sequence[Mapping[str, Any]], score: str) -> None:
    """Draws the training loss and the held-out score over the iterations into a PNG.

    Args:
        path: Of the PNG.
        title: First line of the picture.
        curve: Rows of `DenseCurveHook`.
        score: Key of the score in the rows.
    """
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots()
    axes.set_xlabel("iteration")
    axes.set_ylabel("training loss", color=_BLUE)
    axes.plot(
        [row["iterations"] for row in curve],
        [row["train_loss"] for row in curve],
        color=_BLUE,
        marker="o",
        markersize=3,
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.set_ylabel(f"held-out {score}", color=_ORANGE)
    known = [(row["iterations"], row[score]) for row in curve if row.get(score) is not None]
    if known:
        right.plot(*zip(*known, strict=True), color=_ORANGE, marker="o", markersize=3)
    right.set_ylim(bottom=0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_write(path, buffer.getvalue())
