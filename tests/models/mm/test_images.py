"""Image files of every kind decode to the RGB that a viewer shows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.models.mm.images import UnreadableImageError, load_image


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    image = load_image(data)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("deep", "shallow"), [(0, 0), (257 * 100, 100), (65535, 255)])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str, deep: int, shallow: int) -> None:
    image = Image.fromarray(np.full((4, 4), deep, dtype=np.uint16))
    assert _pixel(_encoded(image, kind)) == (shallow,) * 3


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.allclose(_pixel(_encoded(red, "JPEG", quality=100)), (255, 0, 0), atol=3)


def test_cmyk_tiff_black() -> None:
    assert _pixel(_encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF")) == (0, 0, 0)


def test_palette() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert _pixel(_encoded(image, "PNG")) == (10, 20, 30)


def test_transparent_palette_entry_shows_the_background() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert _pixel(_encoded(image, "PNG", transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 40)])
def test_alpha_shows_white(alpha: int, expected: int) -> None:
    assert _pixel(_encoded(Image.new("RGBA", (4, 4), (40, 40, 40, alpha)), "PNG")) == (expected,) * 3
    assert _pixel(_encoded(Image.new("LA", (4, 4), (40, alpha)), "PNG")) == (expected,) * 3


@pytest.mark.parametrize(("mode", "colour", "expected"), [("L", 77, 77), ("1", 1, 255)])
def test_grey_and_bilevel(mode: str, colour: int, expected: int) -> None:
    assert _pixel(_encoded(Image.new(mode, (4, 4), colour), "PNG")) == (expected,) * 3


# Where the stored top left corner belongs: orientation -> place in the upright image of a stored 4x2 image.
@pytest.mark.parametrize(("orientation", "place"), [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3)), (2, (3, 0))])
def test_exif_rotation_is_applied(orientation: int, place: tuple[int, int]) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encoded(image, "PNG", exif=exif)
    assert load_image(data).size == ((2, 4) if orientation in (6, 8) else (4, 2))
    assert _pixel(data, *place) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"not an image", "its content is not that of an image file"), (None, "truncated")],
    ids=["empty", "text", "truncated"],
)
def test_unreadable_file_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        content = _encoded(Image.fromarray(noise), "JPEG")[:-600]
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for source, name in ((path, str(path)), (content, "<bytes>")):
        with pytest.raises(UnreadableImageError, match=rf"^cannot read image {name}: .*{reason}"):
            load_image(source)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"absent.png.*No such file"):
        load_image(tmp_path / "absent.png")


def test_float_pixels_are_refused() -> None:
    with pytest.raises(UnreadableImageError, match="float"):
        load_image(_encoded(Image.new("F", (4, 4), 0.5), "TIFF"))
