"""Where a window's tokens are, and who sees whom."""

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
def near_border(window, height, width, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, PADS: tl.constexpr):
    """Whether a window may hold tokens that wrapped around; or padding, which a shift moves into the last but one."""
    rows = tl.cdiv(height, WINDOW_H)
    columns = tl.cdiv(width, WINDOW_W)
    local = window % (rows * columns)
    return (local // columns >= rows - (1 + PADS)) | (local % columns >= columns - (1 + PADS))
