"""Decodes image files of every common kind to 8-bit RGB."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_BACKGROUND = "white"
_DEEP_GREY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class UnreadableImageError(ValueError):
    """An image file cannot be decoded; the message names the file."""


def load_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Decodes an image to mode "RGB", upright.

    - EXIF orientation is applied.
    - 16-bit grey is divided by 257, so that white stays white (a plain conversion would clip at 255).
    - Transparent pixels (alpha, or a palette's transparent entry) show a white background.
    - CMYK, palette, grey, bilevel and YCbCr images are converted; an embedded colour profile is not applied.

    Args:
        source: Path of a file, or the bytes of one.

    Raises:
        UnreadableImageError: The file is missing, empty, truncated, not an image, or of a kind that has no one
            meaning as RGB (32-bit floats, Lab).
    """
    name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(f"cannot read image {name}: {_reason(source, error)}") from error


def _reason(source: str | os.PathLike[str] | bytes, error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = not source if isinstance(source, bytes) else Path(source).stat().st_size == 0
        return "the file is empty" if empty else "its content is not that of an image file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_GREY_MODES:
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(deep, 0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("32-bit float pixels have no agreed range; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, _BACKGROUND)
        image.alpha_composite(layer)
    return image.convert("RGB")
