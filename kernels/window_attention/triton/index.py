"""Where a window's tokens are, and which of them see each other."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(
    tokens, window, height, width,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
):  # fmt: skip
    """Tokens of one window -> (batch, y, x, whether the pixel exists, region whose tokens see each other)."""
    rows = tl.cdiv(height, WINDOW_H)
    columns = tl.cdiv(width, WINDOW_W)
    padded_height = rows * WINDOW_H
    padded_width = columns * WINDOW_W
    per_image = rows * columns
    local = window % per_image
    y = (local // columns) * WINDOW_H + tokens // WINDOW_W
    x = (local % columns) * WINDOW_W + tokens % WINDOW_W
    is_token = tokens < WINDOW_H * WINDOW_W
    wraps_y = y >= padded_height - SHIFT_Y
    wraps_x = x >= padded_width - SHIFT_X
    region = wraps_y.to(tl.int32) * 2 + wraps_x.to(tl.int32)
    if ROLL_FIRST:
        real = (y < height) & (x < width) & is_token
        y = (y + SHIFT_Y) % height
        x = (x + SHIFT_X) % width
    else:
        y = tl.where(wraps_y, y + SHIFT_Y - padded_height, y + SHIFT_Y)
        x = tl.where(wraps_x, x + SHIFT_X - padded_width, x + SHIFT_X)
        real = (y < height) & (x < width) & is_token
    return window // per_image, y, x, real, region


@triton.jit
def offsets(batch, y, x, head, strides, HEAD_DIM: tl.constexpr):
    """Element offsets (tokens, HEAD_DIM) into a (B, H, W, heads, D) tensor whose last stride is 1."""
    stride_b, stride_y, stride_x, stride_h = strides
    rows = batch.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x + head * stride_h
    return rows[:, None] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def mask_class(window, height, width, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, N_CLASSES: tl.constexpr):
    """Number of a window's class, of N_CLASSES ** 2: those of one class hide the same keys from the same queries.

    Along each axis the last window is of a class of its own, and the last but one where there are three.
    """
    rows = tl.cdiv(height, WINDOW_H)
    columns = tl.cdiv(width, WINDOW_W)
    local = window % (rows * columns)
    row_class = tl.maximum(local // columns - (rows - N_CLASSES), 0)
    column_class = tl.maximum(local % columns - (columns - N_CLASSES), 0)
    return row_class * N_CLASSES + column_class


@triton.jit
def window_of_class(number, height, width, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, N_CLASSES: tl.constexpr):
    """A window of some class; any where there is none."""
    rows = tl.cdiv(height, WINDOW_H)
    columns = tl.cdiv(width, WINDOW_W)
    row = tl.maximum(rows - N_CLASSES + number // N_CLASSES, 0)
    column = tl.maximum(columns - N_CLASSES + number % N_CLASSES, 0)
    return row * columns + column
