"""Paints panels over images: one PNG of all, and a page that holds every picture inside itself."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vitrail.tools._common.draw import KINDS, Panel, upsampled
from vitrail.tools._common.drawing import fitted, font

_PALETTE = ("#ffffff", "#ff4d4d", "#4dc3ff", "#ffd24d", "#6be675", "#d98cff", "#ff9f40", "#40e0d0", "#ff80bf")
_PANELS_IN_ROW = 6
_WIDTH = 264  # pixels of a panel
_DPI = 110
_HEAD = 40  # pixels for two lines above a panel
_GAP = 10
_MOST_OUTSIDE = 0.3  # of the image's size
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; background: #fafafa; color: #1c1c1c; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
.side { display: flex; gap: 1.5rem; align-items: flex-start; overflow-x: auto; }
.model { min-width: 14rem; flex: 1; } .model h3 { font-size: 1rem; margin: .4rem 0; }
.panels { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; width: 200px; } figure img { width: 100%; border-radius: 4px; display: block; }
figcaption, p { font-size: .85rem; color: #444; } p { margin: .2rem 0; } .none { color: #777; }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #eee; } figcaption, p, .none { color: #aaa; } h2 { border-color: #444; } }
"""


class Drawn(NamedTuple):
    """Pictures of one model on one image.

    Attributes:
        model: Name of the model, and what to know of its weights.
        image_name: Name of the image.
        photo: The image as the model saw it.
        pictures: By kind, as `draw.all_panels` returns them: titles and painted panels.
    """

    model: str
    image_name: str
    photo: Image.Image
    pictures: dict[str, list[tuple[str, Image.Image]]]


def paint(model: str, image_name: str, pixels: np.ndarray, panels: dict[str, list[Panel]]) -> Drawn:
    """Paints the panels of a model over its image.

    Args:
        model: See `Drawn`.
        image_name: See `Drawn`.
        pixels: The image as the model saw it, (H, W, 3), 0 to 1.
        panels: By kind, as `draw.all_panels` returns them.
    """
    pictures = {kind: [(p.title, _painted(pixels, p)) for p in of_kind] for kind, of_kind in panels.items()}
    return Drawn(model, image_name, _painted(pixels, None), pictures)


def write_png(path: Path, drawn: Sequence[Drawn]) -> None:
    """One picture: for every kind of panel of every model and image a row, or several where there are many panels."""
    rows = [
        (one, kind, pictures[start : start + _PANELS_IN_ROW])
        for one in drawn
        for kind, pictures in one.pictures.items()
        for start in range(0, len(pictures), _PANELS_IN_ROW)
    ]
    columns = 1 + max((len(pictures) for _, _, pictures in rows), default=0)
    height = sum(_HEAD + one.photo.height + _GAP for one, _, _ in rows)
    canvas = Image.new("RGB", (columns * (_WIDTH + _GAP) + _GAP, height + _GAP), "white")
    pen, top = ImageDraw.Draw(canvas), _GAP
    for one, kind, pictures in rows:
        for line, text in enumerate((one.model, kind)):
            pen.text((_GAP, top + line * _HEAD // 2), text, "black", font("bold"))
        canvas.paste(one.photo, (_GAP, top + _HEAD))
        for column, (title, picture) in enumerate(pictures, start=1):
            left = _GAP + column * (_WIDTH + _GAP)
            pen.text((left, top + _HEAD // 2), fitted(title, _WIDTH), "black", font())
            canvas.paste(picture, (left, top + _HEAD))
        top += _HEAD + one.photo.height + _GAP
    canvas.save(path)


def write_html(path: Path, drawn: Sequence[Drawn], title: str) -> None:
    """A page without outside resources: for every image and kind the models side by side."""
    parts = []
    for image_name in dict.fromkeys(one.image_name for one in drawn):
        of_image = [one for one in drawn if one.image_name == image_name]
        photo = _figure(of_image[0].photo, "as the models see it")
        parts.append(f"<h1>{html.escape(image_name)}</h1><div class=panels>{photo}</div>")
        for kind in dict.fromkeys(kind for one in of_image for kind in one.pictures):
            models = "".join(_model_cell(one, kind) for one in of_image)
            meaning = html.escape((KINDS[kind].__doc__ or "").partition("\n")[0])
            parts.append(f"<h2>{html.escape(kind.capitalize())}</h2><p>{meaning}</p><div class=side>{models}</div>")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    page = (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    path.write_text(page + "\n", encoding="utf-8")


def _model_cell(one: Drawn, kind: str) -> str:
    figures = "".join(_figure(picture, title) for title, picture in one.pictures.get(kind, []))
    body = f"<div class=panels>{figures}</div>" if figures else "<p class=none>this model has none</p>"
    return f"<div class=model><h3>{html.escape(one.model)}</h3>{body}</div>"


def _figure(picture: Image.Image, title: str) -> str:
    data = io.BytesIO()
    picture.save(data, format="png")
    text = html.escape(title, quote=True)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'


def _painted(pixels: np.ndarray, panel: Panel | None) -> Image.Image:
    """A panel over its image, or the image alone; all of one image have the same size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / _DPI, round(_WIDTH * pixels.shape[0] / pixels.shape[1]) / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _paint(axes, pixels, panel or Panel(""))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _paint(axes: Any, pixels: np.ndarray, panel: Panel) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    height, width = pixels.shape[:2]
    gray = pixels.mean(2, keepdims=True).repeat(3, 2)
    axes.imshow(pixels if panel.heat is None else 0.35 + 0.65 * gray, extent=(0, 1, 1, 0), aspect=height / width)
    if panel.heat is not None:
        heat = upsampled(panel.heat, height, width).numpy()
        # Where there is nothing the photo stays as it is; a little heat is visible already.
        axes.imshow(heat, cmap="inferno", alpha=0.85 * heat**0.5, extent=(0, 1, 1, 0), aspect=height / width)
    for box in panel.boxes:
        color = _PALETTE[box.color % len(_PALETTE)]
        size = (box.right - box.left, box.bottom - box.top)
        fill = {"facecolor": "#ffd24d", "alpha": 0.45} if box.filled else {"facecolor": "none"}
        outline = Rectangle((box.left, box.top), *size, edgecolor=color, linewidth=1.2, **fill)
        outline.set_path_effects([withStroke(linewidth=2.2, foreground="#00000080")])  # seen on any ground
        axes.add_patch(outline)
    if panel.query is not None:
        axes.plot(*panel.query, marker="o", color="#00ffff", markersize=8, markeredgewidth=1.2, fillstyle="none")
    # Windows that reach out of the image are shown, as far as they do not make it small.
    axes.set_xlim(*_limits([edge for box in panel.boxes for edge in (box.left, box.right)]))
    axes.set_ylim(*reversed(_limits([edge for box in panel.boxes for edge in (box.top, box.bottom)])))


def _limits(edges: Sequence[float]) -> tuple[float, float]:
    low, high = max(min([0.0, *edges]), -_MOST_OUTSIDE), min(max([1.0, *edges]), 1 + _MOST_OUTSIDE)
    return low - (0.02 if low < 0 else 0), high + (0.02 if high > 1 else 0)
