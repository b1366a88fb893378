"""Triton kernels of sparse convolution: index map, tiling and numerics.

Index map. `table[tap, n]` is the row of the input that output n meets at a tap. Rows are read where they lie, with any
stride over the voxels; neither a copy for each tap nor a list of pairs is made.

Tiling. A program of the convolution has a tile of outputs and output channels. It goes through the taps, gathers the
tile's rows and multiplies them by the tap's matrix; a tap at which the whole tile has no neighbour costs one read of
the table. The gradient of the features is the same kernel with the transposed table and the transposed matrices, so
that it gathers too. The gradient of the weights is a sum over all outputs: programs take parts of it, at one tap each,
and the parts are added in a fixed order. The depth-wise kernels do the same without the matrix product; one of them
has three kernels at work on a quarter of the channels each.

Numerics. Sums are float32; products are those of the inputs' dtype, float32 inputs use full float32 products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch, unit_stride
from vitrail.kernels._common.triton import add_product, sum_of_parts

_ROWS = 64  # voxels of a tile
_TAPS = 3  # taps of a depth-wise kernel whose rows are under way at once
_ROWS_OF_A_PART = 4096  # outputs that one program sums up for the gradient of the weights
_MOST_PARTS = 32


@triton.jit
def _gather(x_ptr, stride, sources, channels, n_channels):
    """Rows `sources` of a (N, C) tensor, 0 where there is none: (sources, channels)."""
    mask = (sources >= 0)[:, None] & (channels < n_channels)[None, :]
    return tl.load(x_ptr + sources.to(tl.int64)[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _sources(table_ptr, tap, rows, end, n_outputs):
    """The table's entries for some outputs, -1 from `end` on."""
    return tl.load(table_ptr + tap * n_outputs + rows.to(tl.int64), mask=rows < end, other=-1)


@triton.jit(do_not_specialize=["n_outputs", "taps"])
def _conv_kernel(
    x_ptr, weight_ptr, out_ptr, table_ptr, x_stride, out_channel_stride, tap_stride, in_channel_stride,
    n_outputs, taps, in_dim, out_dim, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """A tile of outputs (ROWS, OUT): `out[n] = sum_tap x[table[tap, n]] weight[:, tap]^T`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    total = tl.zeros((ROWS, OUT), tl.float32)
    for tap in range(taps):
        sources = _sources(table_ptr, tap, rows, n_outputs, n_outputs)
        if tl.max(sources, 0) >= 0:
            for start in range(0, in_dim, IN):
                channels = start + tl.arange(0, IN)
                x = _gather(x_ptr, x_stride, sources, channels, in_dim)
                offsets = channels[:, None] * in_channel_stride + outs[None, :] * out_channel_stride
                mask = (channels < in_dim)[:, None] & (outs < out_dim)[None, :]
                weight = tl.load(weight_ptr + tap * tap_stride + offsets, mask=mask, other=0.0)
                total = add_product(total, x, weight)
    places = out_ptr + rows.to(tl.int64)[:, None] * out_dim + outs[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=(rows < n_outputs)[:, None] & (outs < out_dim)[None, :])


@triton.jit(do_not_specialize=["n_outputs", "taps", "part_size"])
def _weight_gradient_kernel(
    grad_ptr, x_ptr, parts_ptr, table_ptr, grad_stride, x_stride, n_outputs, taps, part_size, in_dim, out_dim,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """One part's sum at one tap, a tile (OUT, IN) of `grad^T x[table[tap]]`: (parts, out_dim, taps, in_dim)."""
    part, tap = tl.program_id(0) // taps, tl.program_id(0) % taps
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    channels = tl.program_id(2) * IN + tl.arange(0, IN)
    total = tl.zeros((OUT, IN), tl.float32)
    first = part * part_size
    end = tl.minimum(first + part_size, n_outputs)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        sources = _sources(table_ptr, tap, rows, end, n_outputs)
        if tl.max(sources, 0) >= 0:
            x = _gather(x_ptr, x_stride, sources, channels, in_dim)
            grad = _gather(grad_ptr, grad_stride, tl.where(sources >= 0, rows, -1), outs, out_dim)
            total = add_product(total, tl.trans(grad), x)
    places = (part * out_dim + outs).to(tl.int64)[:, None] * (taps * in_dim) + tap * in_dim + channels[None, :]
    tl.store(parts_ptr + places, total, mask=(outs < out_dim)[:, None] & (channels < in_dim)[None, :])


@triton.jit
def _depthwise_sum(
    x_ptr, weight_ptr, table_ptr, x_stride, rows, channels, n_outputs, taps, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """`sum_tap x[table[tap, n]] * weight[tap]` of some outputs and channels, float32; TAPS taps run at once."""
    total = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(0, taps, TAPS):
        for step in tl.static_range(TAPS):
            tap = first + step
            # Beyond the last tap no row exists, so that nothing is read.
            sources = _sources(table_ptr, tap, rows, tl.where(tap < taps, n_outputs, 0), n_outputs)
            x = _gather(x_ptr, x_stride, sources, channels, dim)
            weight = tl.load(weight_ptr + tap * dim + channels, mask=(channels < dim) & (tap < taps), other=0.0)
            total += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["n_outputs", "taps"])
def _depthwise_kernel(
    x_ptr, weight_ptr, out_ptr, table_ptr, x_stride, n_outputs, taps, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """A tile of outputs (ROWS, DIM): `out[n] = sum_tap x[table[tap, n]] * weight[tap]`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * DIM + tl.arange(0, DIM)
    total = _depthwise_sum(
        x_ptr, weight_ptr, table_ptr, x_stride, rows, channels, n_outputs, taps, dim, ROWS, DIM, TAPS
    )
    places = out_ptr + rows.to(tl.int64)[:, None] * dim + channels[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=(rows < n_outputs)[:, None] & (channels < dim)[None, :])


@triton.jit(do_not_specialize=["n_voxels", "taps_a", "taps_b", "taps_c"])
def _mix_kernel(
    x_ptr, weight_a_ptr, weight_b_ptr, weight_c_ptr, out_ptr, table_a_ptr, table_b_ptr, table_c_ptr,
    x_stride, n_voxels, taps_a, taps_b, taps_c, dim, ROWS: tl.constexpr, DIM: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS, DIM) of a quarter of the channels, `dim` wide: the voxels and what the quarter's kernel gathers."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    quarter = tl.program_id(1)
    channels = tl.program_id(2) * DIM + tl.arange(0, DIM)
    x_ptr += quarter * dim
    itself = _gather(x_ptr, x_stride, tl.where(rows < n_voxels, rows, -1), channels, dim).to(tl.float32)
    if quarter == 0:
        gathered = _depthwise_sum(
            x_ptr, weight_a_ptr, table_a_ptr, x_stride, rows, channels, n_voxels, taps_a, dim, ROWS, DIM, TAPS
        )
    elif quarter == 1:
        gathered = _depthwise_sum(
            x_ptr, weight_b_ptr, table_b_ptr, x_stride, rows, channels, n_voxels, taps_b, dim, ROWS, DIM, TAPS
        )
    elif quarter == 2:
        gathered = _depthwise_sum(
            x_ptr, weight_c_ptr, table_c_ptr, x_stride, rows, channels, n_voxels, taps_c, dim, ROWS, DIM, TAPS
        )
    else:
        gathered = itself
    places = out_ptr + rows.to(tl.int64)[:, None] * (4 * dim) + (quarter * dim + channels)[None, :]
    mask = (rows < n_voxels)[:, None] & (channels < dim)[None, :]
    tl.store(places, (itself + gathered).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_outputs", "taps", "part_size"])
def _depthwise_weight_gradient_kernel(
    grad_ptr, x_ptr, parts_ptr, table_ptr, grad_stride, x_stride, n_outputs, taps, part_size, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One part's `sum_n grad[n] * x[table[tap, n]]` at one tap: (parts, taps, dim)."""
    part, tap = tl.program_id(0) // taps, tl.program_id(0) % taps
    channels = tl.program_id(1) * DIM + tl.arange(0, DIM)
    total = tl.zeros((DIM,), tl.float32)
    first = part * part_size
    end = tl.minimum(first + part_size, n_outputs)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        sources = _sources(table_ptr, tap, rows, end, n_outputs)
        x = _gather(x_ptr, x_stride, sources, channels, dim)
        grad = _gather(grad_ptr, grad_stride, tl.where(sources >= 0, rows, -1), channels, dim)
        total += tl.sum(x.to(tl.float32) * grad.to(tl.float32), 0)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * dim + channels, total, mask=channels < dim)


def _tile(dim: int, most: int) -> int:
    """Channels of a tile: a power of two from 16 to `most`."""
    return max(16, min(most, triton.next_power_of_2(dim)))


def _parts(n_outputs: int) -> tuple[int, int]:
    """Number and size of the parts of a sum over all outputs."""
    n_parts = min(_MOST_PARTS, max(1, math.ceil(n_outputs / _ROWS_OF_A_PART)))
    return n_parts, _ROWS * math.ceil(n_outputs / (n_parts * _ROWS))


def _run_conv(x: Tensor, weight: Tensor, table: Tensor, strides: tuple[int, ...], out_dim: int) -> Tensor:
    """`strides` of the weight: over the result's channels, the taps, the channels of `x`."""
    (x,) = unit_stride(x)
    taps, n_outputs = table.shape
    out = torch.empty((n_outputs, out_dim), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = _tile(out_dim, 128)
    grid = (triton.cdiv(n_outputs, _ROWS), triton.cdiv(out_dim, tile))
    options: dict[str, Any] = {"ROWS": _ROWS, "OUT": tile, "IN": _tile(x.shape[1], 64 if x.element_size() == 2 else 32)}
    launch(
        _conv_kernel, grid,
        x, weight, out, table.contiguous(), x.stride(0), *strides, n_outputs, taps, x.shape[1], out_dim,
        **options, num_warps=8 if tile > 64 else 4, num_stages=3,
    )  # fmt: skip
    return out


def sparse_conv_forward(features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Fused forward; arguments as in `sparse_conv_reference`."""
    return _run_conv(features, weight, table, weight.stride(), weight.shape[0])


def sparse_conv_backward(
    grad: Tensor, features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor
) -> tuple[Tensor, Tensor]:
    """Fused gradients of features and weight."""
    out_dim, taps, in_dim = weight.shape
    d_features = _run_conv(grad, weight, transposed, weight.stride()[::-1], in_dim)
    grad, features = unit_stride(grad, features)
    n_outputs = len(grad)
    n_parts, part_size = _parts(n_outputs)
    out_tile, in_tile = _tile(out_dim, 64), _tile(in_dim, 64)
    parts = torch.empty((n_parts, out_dim, taps, in_dim), dtype=torch.float32, device=grad.device)
    grid = (n_parts * taps, triton.cdiv(out_dim, out_tile), triton.cdiv(in_dim, in_tile))
    launch(
        _weight_gradient_kernel, grid,
        grad, features, parts, table.contiguous(), grad.stride(0), features.stride(0),
        n_outputs, taps, part_size, in_dim, out_dim, ROWS=_ROWS, OUT=out_tile, IN=in_tile, num_warps=4, num_stages=3,
    )  # fmt: skip
    return d_features, sum_of_parts(parts, weight.dtype)


def depthwise_forward(features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Fused forward; arguments as in `depthwise_reference`."""
    (features,) = unit_stride(features)
    taps, n_outputs = table.shape
    dim = features.shape[1]
    out = torch.empty((n_outputs, dim), dtype=features.dtype, device=features.device)
    if out.numel() == 0:
        return out
    tile = _tile(dim, 64)
    launch(
        _depthwise_kernel, (triton.cdiv(n_outputs, _ROWS), triton.cdiv(dim, tile)),
        features, weight.contiguous(), out, table.contiguous(), features.stride(0), n_outputs, taps, dim,
        ROWS=_ROWS, DIM=tile, TAPS=_TAPS, num_warps=4,
    )  # fmt: skip
    return out


def depthwise_backward(
    grad: Tensor, features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor
) -> tuple[Tensor, Tensor]:
    """Fused gradients of features and weight."""
    return depthwise_forward(grad, weight, transposed), _depthwise_weight_gradient(grad, features, weight, table)


def _depthwise_weight_gradient(grad: Tensor, features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    grad, features = unit_stride(grad, features)
    (taps, dim), n_outputs = weight.shape, len(grad)
    n_parts, part_size = _parts(n_outputs)
    tile = _tile(dim, 128)
    parts = torch.empty((n_parts, taps, dim), dtype=torch.float32, device=grad.device)
    launch(
        _depthwise_weight_gradient_kernel, (n_parts * taps, triton.cdiv(dim, tile)),
        grad, features, parts, table.contiguous(), grad.stride(0), features.stride(0), n_outputs, taps, part_size, dim,
        ROWS=_ROWS, DIM=tile, num_warps=4,
    )  # fmt: skip
    return sum_of_parts(parts, weight.dtype)


def mix_forward(features: Tensor, weights: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
    """Fused forward of `mixed_depthwise_conv`: three weights and their tables."""
    (features,) = unit_stride(features)
    n_voxels, dim = len(features), features.shape[1] // 4
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    if out.numel() == 0:
        return out
    tile = _tile(dim, 64)
    launch(
        _mix_kernel, (triton.cdiv(n_voxels, _ROWS), 4, triton.cdiv(dim, tile)),
        features, *(w.contiguous() for w in weights), out, *(t.contiguous() for t in tables),
        features.stride(0), n_voxels, *(len(w) for w in weights), dim, ROWS=_ROWS, DIM=tile, TAPS=_TAPS, num_warps=4,
    )  # fmt: skip
    return out


def mix_backward(
    grad: Tensor, features: Tensor, weights: Sequence[Tensor], tables: Sequence[Tensor], transposed: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Fused gradients of features and weights; the former is the forward with the transposed tables."""
    parts = zip(grad.chunk(4, 1), features.chunk(4, 1), weights, tables, strict=False)  # the last quarter has no weight
    return mix_forward(grad, weights, transposed), *(_depthwise_weight_gradient(*part) for part in parts)
