"""Triton kernels of depth-wise convolution: index map, tiling and numerics.

Index map. Maps are read where they lie, with any stride over images and rows: the values inside a packed projection are
not copied. Positions outside the map are masked; at the bottom and right `pad_value` may take their place. The gradient
of the map is the same kernel with the filter turned by 180 degrees. Adding the input (`skip`) is a one added to the
filter's centre, so that it costs nothing, forward and backward.

Tiling. A thread owns two channels and a patch of `ROWS` x `COLUMNS` outputs; a tile's first axis are patches, which lie
anywhere in the batch. Triton cannot index into registers, so that a patch is a tuple of tiles, one for each pixel, and
all loops over pixels and taps are unrolled. Every input pixel of the patch and its halo is loaded and converted once,
then multiplied by all taps that meet it: for a 5x5 filter and patches of 4 x 4, 4 loads an output in place of 25. The
filter stays in registers, which two channels a thread allow for 7x7 (98 numbers), more do not. Halos are read again by
neighbouring patches, which run at about the same time, from the caches. The distance of pixels is a constant of the
kernel (it is the model's width), so that it becomes an immediate offset of the loads.

The gradients of the filter and the bias are sums over all pixels: a program takes every n-th tile of patches, keeps all
taps' sums in registers and leaves them in a workspace, and a second kernel adds the workspace up in a fixed order.

Numerics. Everything is accumulated in float32. GELU is exact; its backward recomputes the convolution. No atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_PROGRAMS = 264  # that sum up the filter's gradient: two for each multiprocessor of an H100
_PARTS = 64  # sums of programs that are read at once


class Tile(NamedTuple):
    """Outputs of a thread (rows, columns), channels of a thread, warps of a program."""

    rows: int
    columns: int
    channels: int
    warps: int


@triton.jit
def _places(program, n_patches, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATCHES: tl.constexpr):
    """A program's patches of a (B, height, width) map -> (image, first row, first column), (PATCHES,) each."""
    patch = program * PATCHES + tl.arange(0, PATCHES)
    columns = tl.cdiv(width, COLUMNS)
    rows = tl.cdiv(height, ROWS)
    image = patch // (rows * columns)
    # Patches behind the last one lie below every map: their masks are empty without a condition of their own.
    y = tl.where(patch < n_patches, (patch // columns) % rows * ROWS, 1 << 29)
    return image, y, patch % columns * COLUMNS


@triton.jit
def _channels(block, DIM: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels of a block and whether they exist, (PATCHES, CHANNELS) each.

    Whole tiles, also of what depends on channels only: loads then have one layout, and nothing is exchanged.
    """
    channels = tl.zeros((PATCHES, 1), tl.int32) + block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return channels, (channels < DIM) | (DIM % CHANNELS == 0)


@triton.jit
def _float32(tile, PAIRS: tl.constexpr):
    """Converts to float32. PAIRS: a thread holds pairs of bfloat16, which take one instruction each, not two."""
    if PAIRS and tile.dtype == tl.bfloat16:
        tile = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [tile], tl.float32, is_pure=True, pack=2
        )
    return tile.to(tl.float32)


@triton.jit
def _corner(ptr, stride_b, stride_y, image, y, x, channels, PIXEL: tl.constexpr):
    """Pointers to the channels of pixel (y, x) of every patch, (PATCHES, CHANNELS)."""
    base = image.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x * PIXEL
    return ptr + base[:, None] + channels


@triton.jit
def _load_row(
    corner, pad_ptr, y, x, channels, exists, height, width, pads,
    COUNT: tl.constexpr, PIXEL: tl.constexpr, HAS_PAD: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """COUNT pixels from (y, x) on, where `corner` points to, of every patch; a tuple of float32 tiles."""
    # Unsigned, a negative number is a large one.
    row_real = y.to(tl.uint32) < height.to(tl.uint32)
    tiles = ()
    for i in tl.static_range(COUNT):
        real = (row_real & ((x + i).to(tl.uint32) < width.to(tl.uint32)))[:, None] & exists
        tile = tl.load(corner + i * PIXEL, mask=real, other=0.0)
        if HAS_PAD:
            below = (y >= height) & (y < height + pads[0]) & (x + i >= 0) & (x + i < width + pads[1])
            beside = (x + i >= width) & (x + i < width + pads[1]) & (y >= 0) & (y < height)
            padded = (below | beside)[:, None] & exists
            tile = tl.where(padded, tl.load(pad_ptr + channels, mask=padded, other=0.0).to(tile.dtype), tile)
        tiles = tiles + (_float32(tile, PAIRS),)
    return tiles


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit(
    do_not_specialize=["height", "width", "pads", "out_height", "out_width", "origin_y", "origin_x", "n_patches"]
)
def _depthwise_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, pad_ptr, other_ptr, out_ptr, x_strides, other_strides, height, width, pads,
    out_height, out_width, origin_y, origin_x, n_patches,
    DIM: tl.constexpr, PIXEL: tl.constexpr, OTHER_PIXEL: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr,
    SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, GELU: tl.constexpr, OTHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One tile of patches. The output's first pixel is (origin_y, origin_x) of the input.

    OTHER: None, "add" to add a second map, or "slope" to multiply it by the slope of GELU at the convolution.
    """
    n_blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    channels, exists = _channels(tl.program_id(0) % n_blocks, DIM, PATCHES, CHANNELS)
    image, out_y, out_x = _places(
        tl.program_id(0) // n_blocks, n_patches, out_height, out_width, ROWS, COLUMNS, PATCHES
    )
    weights = ()
    for tap in tl.static_range(K * K):
        place = weight_ptr + channels + ((K * K - 1 - tap) if TURNED else tap) * DIM
        weight = _float32(tl.load(place, mask=exists, other=0.0), PAIRS)
        if SKIP and tap == K * K // 2:
            weight += 1.0
        weights = weights + (weight,)
    start = tl.zeros((PATCHES, CHANNELS), tl.float32)
    if HAS_BIAS:
        start = _float32(tl.load(bias_ptr + channels, mask=exists, other=0.0), PAIRS)
    sums = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        sums = sums + (start,)

    y = out_y + origin_y - K // 2
    x = out_x + origin_x - K // 2
    corner = _corner(x_ptr, x_strides[0], x_strides[1], image, y, x, channels, PIXEL)
    for row in tl.static_range(ROWS + K - 1):
        tiles = _load_row(
            corner + row * x_strides[1].to(tl.int64), pad_ptr, y + row, x, channels, exists, height, width, pads,
            COLUMNS + K - 1, PIXEL, HAS_PAD, PAIRS,
        )  # fmt: skip
        updated = ()
        for pixel in tl.static_range(ROWS * COLUMNS):
            total = sums[pixel]
            if row >= pixel // COLUMNS and row < pixel // COLUMNS + K:
                for dx in tl.static_range(K):
                    total += tiles[pixel % COLUMNS + dx] * weights[(row - pixel // COLUMNS) * K + dx]
            updated = updated + (total,)
        sums = updated

    corner = _corner(out_ptr, out_height.to(tl.int64) * out_width * DIM, out_width * DIM, image, out_y, out_x, channels, DIM)
    if OTHER is not None:
        other_corner = _corner(
            other_ptr, other_strides[0], other_strides[1], image, out_y, out_x, channels, OTHER_PIXEL
        )
    for row in tl.static_range(ROWS):
        others = ()
        if OTHER is not None:
            others = _load_row(
                other_corner + row * other_strides[1].to(tl.int64), pad_ptr, out_y + row, out_x, channels, exists,
                out_height, out_width, pads, COLUMNS, OTHER_PIXEL, False, PAIRS,
            )  # fmt: skip
        for column in tl.static_range(COLUMNS):
            total = sums[row * COLUMNS + column]
            if GELU:
                total = _gelu(total)
            if OTHER == "add":
                total += others[column]
            if OTHER == "slope":
                total = others[column] * _gelu_slope(total)
            inside = ((out_y + row < out_height) & (out_x + column < out_width))[:, None] & exists
            place = corner + row * (out_width.to(tl.int64) * DIM) + column * DIM
            tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["height", "width", "pads", "n_patches", "n_parts"])
def _filter_gradient_kernel(
    x_ptr, grad_ptr, pad_ptr, parts_ptr, x_strides, grad_strides, height, width, pads, n_patches, n_parts,
    DIM: tl.constexpr, PIXEL: tl.constexpr, GRAD_PIXEL: tl.constexpr, K: tl.constexpr, HAS_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program's sums of `grad * x` at every tap, then of `grad`: (parts, K * K + 1, DIM)."""
    n_blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    block = tl.program_id(0) % n_blocks
    part = tl.program_id(0) // n_blocks
    channels, exists = _channels(block, DIM, PATCHES, CHANNELS)
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (tl.zeros((PATCHES, CHANNELS), tl.float32),)
    for tile in range(part, tl.cdiv(n_patches, PATCHES), n_parts):
        image, out_y, out_x = _places(tile, n_patches, height, width, ROWS, COLUMNS, PATCHES)
        corner = _corner(grad_ptr, grad_strides[0], grad_strides[1], image, out_y, out_x, channels, GRAD_PIXEL)
        grads = ()
        for row in tl.static_range(ROWS):
            grads = grads + _load_row(
                corner + row * grad_strides[1].to(tl.int64), pad_ptr, out_y + row, out_x, channels, exists,
                height, width, pads, COLUMNS, GRAD_PIXEL, False, PAIRS,
            )  # fmt: skip
        y = out_y - K // 2
        x = out_x - K // 2
        corner = _corner(x_ptr, x_strides[0], x_strides[1], image, y, x, channels, PIXEL)
        for row in tl.static_range(ROWS + K - 1):
            tiles = _load_row(
                corner + row * x_strides[1].to(tl.int64), pad_ptr, y + row, x, channels, exists,
                height, width, pads, COLUMNS + K - 1, PIXEL, HAS_PAD, PAIRS,
            )  # fmt: skip
            updated = ()
            for tap in tl.static_range(K * K + 1):
                total = sums[tap]
                if tap < K * K and row >= tap // K and row < tap // K + ROWS:
                    for column in tl.static_range(COLUMNS):
                        total += tiles[column + tap % K] * grads[(row - tap // K) * COLUMNS + column]
                if tap == K * K and row < ROWS:
                    for column in tl.static_range(COLUMNS):
                        total += grads[row * COLUMNS + column]
                updated = updated + (total,)
            sums = updated
    outs = block * CHANNELS + tl.arange(0, CHANNELS)
    for tap in tl.static_range(K * K + 1):
        place = (part * (K * K + 1) + tap) * DIM + outs
        tl.store(parts_ptr + place, tl.sum(sums[tap], 0), mask=outs < DIM)


@triton.jit(do_not_specialize=["n_parts"])
def _add_parts_kernel(
    parts_ptr, d_weight_ptr, d_bias_ptr, n_parts, HAS_BIAS: tl.constexpr,
    DIM: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds up (parts, TAPS + 1, DIM) in order: gradients of the filter (DIM, TAPS) and of the bias (DIM,)."""
    tap = tl.program_id(0)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < DIM
    total = tl.zeros((PARTS, CHANNELS), tl.float32)
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        place = (parts * (TAPS + 1) + tap)[:, None] * DIM + channels[None, :]
        total += tl.load(parts_ptr + place, mask=(parts < n_parts)[:, None] & exists[None, :], other=0.0)
    gradient = tl.sum(total, 0)
    if tap < TAPS:
        tl.store(d_weight_ptr + channels * TAPS + tap, gradient.to(d_weight_ptr.dtype.element_ty), mask=exists)
    elif HAS_BIAS:
        tl.store(d_bias_ptr + channels, gradient.to(d_bias_ptr.dtype.element_ty), mask=exists)
