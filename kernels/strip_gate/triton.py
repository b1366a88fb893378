"""Triton kernel of the strip gate: index map, tiling, numerics and roofline.

Index map. A program has some channels of one image, and of their maps a run of rows and a block of columns; it walks
down its rows by tiles (channels, rows, columns), read where they lie: any strides. One kernel serves both directions,
since the gradient of the map is the gate applied to the result's gradient; the backward also reads the map and sums the
products of both over rows and columns.

Tiling. Whichever of channels and columns is contiguous lies along the threads of a warp: all columns and rows of one or
a few channels, or a block of columns of many channels. Rows are split over programs until the device is busy. Sums over
a row that several blocks of columns hold, and over a column that several runs of rows hold, go to one slot a program
and are added in a fixed order: gradients are deterministic.

Numerics. Gates are rounded to the map's dtype, like the reference's; products and sums are float32.

Roofline. Moved bytes alone count: two maps forward, three backward. A compiler that fuses the reference reaches the
former; backward it reads two of the maps once for the sums over rows and once for those over columns.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, CUDA-graph replay), milliseconds forward / forward and
backward; then the reference, compiled and eager, and the bytes at 3 TB/s:

==========================  ==============  ==============  ==============  ==============
map                         fused           compiled        eager           bytes
==========================  ==============  ==============  ==============  ==============
64 x 256 x 56 x 56          0.076 / 0.254   0.085 / 0.283   0.310 / 1.050   0.069 / 0.171
... channels last           0.087 / 0.365   0.105 / 0.493   0.345 / 1.460   0.069 / 0.171
64 x 1024 x 14 x 14         0.028 / 0.078   0.042 / 0.094   0.093 / 0.304   0.017 / 0.043
2 x 256 x 200 x 304         0.051 / 0.220                   0.185 / 0.565   0.042 / 0.104
==========================  ==============  ==============  ==============  ==============

With tiles of 2,048 values the last takes 0.331 with its backward, the second last 0.093, the first 0.239.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch, multiprocessors
from vitrail.kernels._common.triton import sum_of_parts

_TILE = 4096  # values
_SMALL_TILE = 2048  # where more run out of registers: channels-last maps, and values that are loaded one by one
_MOST_COLUMNS = 256
_CHANNELS = 64  # of a tile where they are contiguous
_PROGRAMS = 8  # a multiprocessor that are wanted


@triton.jit
def _gate(ptr, offsets, mask, dtype: tl.constexpr):
    """(sigmoid, its derivative) of logits, float32; the sigmoid is rounded to the map's dtype."""
    gate = tl.sigmoid(tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32))
    return gate.to(dtype).to(tl.float32), gate * (1 - gate)


@triton.jit
def _offsets(image, channels, rows, columns, strides, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Element offsets (channels, rows, columns) into a (B, C, H, W) tensor."""
    # Tells the compiler what strides that it knows nothing of are divisible by.
    at = image.to(tl.int64) * (strides[0] // VECTOR * VECTOR)
    at_rows = rows.to(tl.int64) * (strides[2] // VECTOR * VECTOR)
    if CHANNELS_LAST:
        at_channels = channels.to(tl.int64) * strides[1]
        at_columns = columns.to(tl.int64) * (strides[3] // VECTOR * VECTOR)
    else:
        at_channels = channels.to(tl.int64) * (strides[1] // VECTOR * VECTOR)
        at_columns = columns.to(tl.int64) * strides[3]
    return at + at_channels[:, None, None] + at_rows[None, :, None] + at_columns[None, None, :]


@triton.jit(do_not_specialize=["batch", "channels", "height", "width", "n_runs", "run"])
def _strip_gate_kernel(
    source_ptr, x_ptr, h_ptr, w_ptr, out_ptr, d_h_ptr, d_w_ptr, source_strides, x_strides, out_strides,
    batch, channels, height, width, n_runs, run,
    SKIP: tl.constexpr, BACKWARD: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Gates `source`; backward, `source` is the result's gradient, and the sums over strips are made too."""
    if CHANNELS_LAST:
        channels = channels // VECTOR * VECTOR
    else:
        width = width // VECTOR * VECTOR
    n_blocks, n_groups = tl.cdiv(width, BLOCK_W), tl.cdiv(channels, BLOCK_C)
    block, index = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    group, index = index % n_groups, index // n_groups
    image, part = index // n_runs, index % n_runs
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    j = block * BLOCK_W + tl.arange(0, BLOCK_W)
    planes = image.to(tl.int64) * channels + c
    at_w = (planes * width)[:, None] + j[None, :]
    has_w = (c < channels)[:, None] & (j < width)[None, :]
    gate_w, slope_w = _gate(w_ptr, at_w, has_w, source_ptr.dtype.element_ty)
    d_w = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    for start in range(part * run, tl.minimum(part * run + run, height), BLOCK_H):
        i = start + tl.arange(0, BLOCK_H)
        at_h = (planes * height)[:, None] + i[None, :]
        has_h = (c < channels)[:, None] & (i < height)[None, :]
        inside = has_h[:, :, None] & has_w[:, None, :]
        gate_h, slope_h = _gate(h_ptr, at_h, has_h, source_ptr.dtype.element_ty)
        at = _offsets(image, c, i, j, source_strides, CHANNELS_LAST, VECTOR)
        source = tl.load(source_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gated = source * gate_h[:, :, None] * gate_w[:, None, :]
        if SKIP:
            gated += source
        at = _offsets(image, c, i, j, out_strides, CHANNELS_LAST, VECTOR)
        tl.store(out_ptr + at, gated.to(out_ptr.dtype.element_ty), mask=inside)
        if BACKWARD:
            at = _offsets(image, c, i, j, x_strides, CHANNELS_LAST, VECTOR)
            d_gate = source * tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            d_h = tl.sum(d_gate * gate_w[:, None, :], 2) * slope_h
            slot = d_h_ptr + block.to(tl.int64) * batch * channels * height
            tl.store(slot + at_h, d_h.to(d_h_ptr.dtype.element_ty), mask=has_h)
            d_w += tl.sum(d_gate * gate_h[:, :, None], 1)
    if BACKWARD:
        slot = d_w_ptr + part.to(tl.int64) * batch * channels * width
        tl.store(slot + at_w, (d_w * slope_w).to(d_w_ptr.dtype.element_ty), mask=has_w)


class _Tiling(NamedTuple):
    """How a map (B, C, H, W) is cut: channels of a program, rows and columns of a tile, and rows of a program."""

    block_c: int
    block_h: int
    block_w: int
    run: int


def _tiling(x: Tensor) -> _Tiling:
    batch, channels, height, width = x.shape
    rows, columns = triton.next_power_of_2(height), triton.next_power_of_2(width)
    tile = _SMALL_TILE if _channels_last(x) or _divisor(x) == 1 else _TILE
    if _channels_last(x):
        block_c = min(_CHANNELS, triton.next_power_of_2(channels))
        block_w = min(columns, tile // block_c)
    else:
        block_w = min(columns, _MOST_COLUMNS)
        block_c = min(triton.next_power_of_2(channels), max(1, tile // (rows * block_w)))
    block_h = min(rows, max(1, tile // (block_c * block_w)))
    others = batch * math.ceil(channels / block_c) * math.ceil(width / block_w)
    wanted = math.ceil(_PROGRAMS * multiprocessors(x.device) / others)
    run = block_h * math.ceil(height / block_h / wanted)
    return _Tiling(block_c, block_h, block_w, run)


def _run(
    source: Tensor, x: Tensor, strips: tuple[Tensor, Tensor], out: Tensor, sums: tuple[Tensor | None, Tensor | None],
    tiling: _Tiling, skip: bool,
) -> None:  # fmt: skip
    """Gates `source` into `out`; makes the sums over strips if there is a place for them."""
    batch, channels, height, width = source.shape
    n_runs, n_blocks = math.ceil(height / tiling.run), math.ceil(width / tiling.block_w)
    launch(
        _strip_gate_kernel, (batch * math.ceil(channels / tiling.block_c) * n_runs * n_blocks,),
        source, x, *(strip.contiguous() for strip in strips), out, *sums, source.stride(), x.stride(), out.stride(),
        batch, channels, height, width, n_runs, tiling.run,
        SKIP=skip, BACKWARD=sums[0] is not None, CHANNELS_LAST=_channels_last(x), VECTOR=_divisor(source, x, out),
        BLOCK_C=tiling.block_c, BLOCK_H=tiling.block_h, BLOCK_W=tiling.block_w, num_warps=4, num_stages=1,
    )  # fmt: skip


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _divisor(*tensors: Tensor) -> int:
    """The most values, up to 8, that lie side by side in all of some (B, C, H, W) of one shape, wherever one starts."""
    fast = 1 if all(_channels_last(t) for t in tensors) else 3
    if any(t.stride(fast) != 1 for t in tensors):
        return 1
    others = (stride for t in tensors for dim, stride in enumerate(t.stride()) if dim != fast)
    return math.gcd(8, tensors[0].shape[fast], *others)


def strip_gate_forward(x: Tensor, logits_h: Tensor, logits_w: Tensor, out: Tensor, skip: bool) -> None:
    """Fused forward: fills `out`, of any strides; arguments as in `strip_gate_reference`."""
    if x.numel():
        _run(x, x, (logits_h, logits_w), out, (None, None), _tiling(x), skip)


def strip_gate_backward(
    grad: Tensor, x: Tensor, logits_h: Tensor, logits_w: Tensor, d_x: Tensor, skip: bool
) -> tuple[Tensor, Tensor]:
    """Fused backward: fills `d_x`, of any strides; returns the gradients of both strips, contiguous."""
    if x.numel() == 0:
        return torch.zeros_like(logits_h), torch.zeros_like(logits_w)
    tiling = _tiling(x)
    d_h = _slots(logits_h, math.ceil(x.shape[3] / tiling.block_w))
    d_w = _slots(logits_w, math.ceil(x.shape[2] / tiling.run))
    _run(grad, x, (logits_h, logits_w), d_x, (d_h, d_w), tiling, skip)
    return sum_of_parts(d_h, logits_h.dtype), sum_of_parts(d_w, logits_w.dtype)


def _slots(logits: Tensor, n_slots: int) -> Tensor:
    """Room for so many partial gradients of a strip, in float32 where they are still to be added up."""
    dtype = logits.dtype if n_slots == 1 else torch.float32
    return torch.empty((n_slots, *logits.shape), dtype=dtype, device=logits.device)
