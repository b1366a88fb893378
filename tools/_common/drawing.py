"""Draws predictions: classes under an image, boxes and masks on it, or a colour for the class of each pixel."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

from vitrail.models.mm.inference import Classification, Detection, Result, Segmentation

_LEAST_SIDE = 480  # pixels of a picture's longer side: writing on a smaller one cannot be read
_OPACITY = 0.5
_TEXT = 14
_ROW = 22
_GOLDEN_RATIO = 0.618034


def draw(image: Image.Image, result: Result, classes: Sequence[str]) -> Image.Image:
    """A picture of an image with what was predicted for it; small images are enlarged.

    Args:
        image: As it was predicted, mode "RGB".
        result: The prediction.
        classes: Names by class number.
    """
    scale = max(1.0, _LEAST_SIDE / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    picture = image.resize(size, Image.Resampling.BICUBIC) if scale > 1 else image.copy()
    if isinstance(result, Classification):
        return _draw_classes(picture, result, classes)
    if isinstance(result, Detection):
        return _draw_objects(picture, result, classes, scale)
    return _draw_labels(picture, result, classes)


@cache
def colour(label: int) -> tuple[int, int, int]:
    """A colour for a class; neighbouring numbers get distant hues."""
    hue = label * _GOLDEN_RATIO % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9 - 0.3 * (label // 7 % 2), 0.95 - 0.25 * (label // 3 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


@cache
def font(weight: str = "normal") -> ImageFont.FreeTypeFont:
    """The font that all pictures are labelled in; `weight` is "normal" or "bold"."""
    return ImageFont.truetype(findfont(FontProperties("DejaVu Sans", weight=weight)), _TEXT)


def _draw_classes(picture: Image.Image, result: Classification, classes: Sequence[str]) -> Image.Image:
    """The image above rows of name, bar and percentage."""
    width = max(picture.width, _LEAST_SIDE)
    canvas = Image.new("RGB", (width, picture.height + _ROW * len(result.labels) + 8), "white")
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    start, room = width // 2, width // 2 - 70
    for row, (label, score) in enumerate(zip(result.labels, result.scores, strict=True)):
        top = picture.height + 4 + _ROW * row
        pen.text((8, top + 2), fitted(classes[label], start - 16), "black", font())
        pen.rectangle((start, top + 4, start + round(room * float(score)), top + _ROW - 5), colour(0))
        pen.text((width - 60, top + 2), f"{100 * score:5.1f} %", "black", font())
    return canvas


def _draw_objects(picture: Image.Image, result: Detection, classes: Sequence[str], scale: float) -> Image.Image:
    """Masks, then boxes, then names, the best object last and so on top."""
    order = range(len(result.labels) - 1, -1, -1)
    if result.masks is not None:
        pixels = np.asarray(picture).copy()
        for i in order:
            mask = Image.fromarray(result.masks[i]).resize(picture.size, Image.Resampling.NEAREST)
            _blend(pixels, np.asarray(mask), np.array(colour(int(result.labels[i]))))
        picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for i in order:
        pen.rectangle([float(x) * scale for x in result.boxes[i]], outline=colour(int(result.labels[i])), width=2)
    for i in order:
        left, top = (float(x) * scale for x in result.boxes[i][:2])
        text = f"{classes[result.labels[i]]} {100 * result.scores[i]:.0f}"
        _label(pen, picture.size, (left, top - _TEXT - 4), text, colour(int(result.labels[i])))
    return picture


def _draw_labels(picture: Image.Image, result: Segmentation, classes: Sequence[str]) -> Image.Image:
    """The image coloured by class, above the names of the classes that occur, largest first."""
    pixels = np.asarray(picture).copy()
    labels = np.asarray(Image.fromarray(result.labels.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST))
    present, counts = np.unique(labels, return_counts=True)
    for label in present:
        _blend(pixels, labels == label, np.array(colour(int(label))))
    entries = [
        (f"{classes[present[i]]} {100 * counts[i] / labels.size:.1f} %", colour(int(present[i])))
        for i in np.argsort(-counts, kind="stable")
    ]
    return _with_legend(Image.fromarray(pixels), entries)


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    places, left, row = [], 8, 0
    for text, _ in entries:
        width = round(font().getlength(text)) + 36
        if left + width > picture.width and left > 8:
            left, row = 8, row + 1
        places.append((left, picture.height + 4 + _ROW * row))
        left += width
    canvas = Image.new("RGB", (picture.width, picture.height + 8 + _ROW * (row + 1)), "white")
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    for (text, fill), (left, top) in zip(entries, places, strict=True):
        pen.rectangle((left, top + 4, left + 14, top + 18), fill)
        pen.text((left + 20, top + 2), text, "black", font())
    return canvas


def _label(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], corner: tuple[float, float], text: str, fill: tuple[int, int, int]
) -> None:
    """Text on a coloured ground, moved so that it stays inside the picture."""
    width, height = font().getlength(text) + 6, _TEXT + 4
    left = min(max(corner[0], 0), max(size[0] - width, 0))
    top = min(max(corner[1], 0), max(size[1] - height, 0))
    pen.rectangle((left, top, left + width, top + height), fill)
    is_light = np.dot(fill, (0.299, 0.587, 0.114)) > 140
    pen.text((left + 3, top + 1), text, "black" if is_light else "white", font())


def _blend(pixels: np.ndarray, where: np.ndarray, paint: np.ndarray) -> None:
    pixels[where] = (1 - _OPACITY) * pixels[where] + _OPACITY * paint


def fitted(text: str, width: float) -> str:
    """The text, shortened at its end to the width in pixels."""
    while font().getlength(text) > width and len(text) > 1:
        text = text.rstrip("…")[:-1] + "…"
    return text
