"""Triton kernels of scattered linear attention: index map, tiling and numerics.

Index map. Voxels stay in their order in memory. Position p in the order by window stands for voxel `order[p]`, whose
row of every tensor is read and written where it lies, with any strides over (N, heads).

Tiling. `Windows.parts` cuts the positions into parts of similar length, whatever the windows; there are three kinds. A
unit of work is one part in one head; the heads of a part, whose channels share memory lines, are neighbours. As only
the device knows the number of parts, a fixed number of programs goes through them.

- A whole window: one program makes the sums over its keys and values, keeps them in registers, and applies them. The
  backward makes the gradients of the sums and applies them in the same program, too.
- A part of a crowded window: its own sums go to a workspace, the sums of a window's parts are added in their order into
  the slot of the first, and its parts read the total from there.
- Small windows: their sums are never made. Tiles of queries meet tiles of keys, and products between different windows
  are masked.

Results do not depend on the schedule.

Numerics. Sums, denominators and gradients of logits are float32. Where they meet half-precision rows in a product, both
are rounded to TF32, which has the range of a sum over a window, which float16 has not. float32 inputs use full float32
products. Where terms cancel, as the gradient of the only key of a window does, the error is relative to the terms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch, multiprocessors, unit_stride
from vitrail.kernels._common.triton import relu
from vitrail.kernels.scattered_linear_attention.windows import chunk_size, most_parts

_BLOCK = 32  # positions of a tile
_WARPS = 64  # of a kernel on each multiprocessor, more than fit: the second half evens out the first
_JOINED = 16  # parts whose sums are read at once
_JOINED_COLUMNS = 256


@triton.jit
def _rows(ptr, voxels, exists, head, strides, HEAD_DIM: tl.constexpr):
    """One head of some voxels' rows, (voxels, HEAD_DIM), zeros where none exists."""
    offsets = voxels.to(tl.int64)[:, None] * strides[0] + head * strides[1] + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(ptr + offsets, mask=exists[:, None], other=0.0)


@triton.jit
def _store_rows(ptr, x, voxels, exists, head, strides, HEAD_DIM: tl.constexpr):
    offsets = voxels.to(tl.int64)[:, None] * strides[0] + head * strides[1] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _unit(parts_ptr, unit, heads):
    """(head, first position, end, start and end of the first position's window) of a unit of work."""
    row = parts_ptr + (1 + unit // heads) * 4
    return unit % heads, tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _tile(order_ptr, first, end, BLOCK: tl.constexpr):
    """Positions from `first` to below `end`: (exist, voxel)."""
    positions = first + tl.arange(0, BLOCK)
    exists = positions < end
    return exists, tl.load(order_ptr + positions, mask=exists, other=0)


@triton.jit
def _windows_of(starts_ptr, first, end, nothing, BLOCK: tl.constexpr):
    """Start of the window of each position from `first` to below `end`, `nothing` behind it."""
    positions = first + tl.arange(0, BLOCK)
    return tl.load(starts_ptr + positions, mask=positions < end, other=nothing)


@triton.jit
def _extent(starts_ptr, ends_ptr, first, end, BLOCK: tl.constexpr):
    """Positions that the windows of a tile span: from, to."""
    return tl.load(starts_ptr + first), tl.load(ends_ptr + tl.minimum(first + BLOCK, end) - 1)


@triton.jit
def _slot(sums_ptr, first, heads, head, chunk_size, HEAD_DIM: tl.constexpr):
    """Where the sums of a crowded window's part stand, which starts at `first`: a (D, D) matrix, then a vector.

    Such parts have at least half a chunk of positions, so that no two share a slot.
    """
    number = first // (chunk_size // 2) * heads + head
    return sums_ptr + number.to(tl.int64) * ((HEAD_DIM + 1) * HEAD_DIM)


@triton.jit
def _load_sums(slot, HEAD_DIM: tl.constexpr):
    channels = tl.arange(0, HEAD_DIM)
    matrix = tl.load(slot + channels[:, None] * HEAD_DIM + channels[None, :])
    return matrix, tl.load(slot + HEAD_DIM * HEAD_DIM + channels)


@triton.jit
def _store_sums(slot, matrix, vector, HEAD_DIM: tl.constexpr):
    channels = tl.arange(0, HEAD_DIM)
    tl.store(slot + channels[:, None] * HEAD_DIM + channels[None, :], matrix)
    tl.store(slot + HEAD_DIM * HEAD_DIM + channels, vector)


@triton.jit
def _make_sums(
    k_ptr, v_ptr, order_ptr, k_strides, v_strides, head, first, end, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """`relu(k)^T v` and `sum relu(k)` over the positions from `first` to below `end`."""
    products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    key_sums = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(first, end, BLOCK):
        exists, voxels = _tile(order_ptr, start, end, BLOCK)
        k = relu(_rows(k_ptr, voxels, exists, head, k_strides, HEAD_DIM))
        v = _rows(v_ptr, voxels, exists, head, v_strides, HEAD_DIM)
        products = tl.dot(tl.trans(k), v, acc=products, input_precision="ieee")
        key_sums += tl.sum(k.to(tl.float32), 0)
    return products, key_sums


@triton.jit(do_not_specialize=["heads", "chunk_size"])
def _sums_kernel(
    k_ptr, v_ptr, order_ptr, parts_ptr, sums_ptr, k_strides, v_strides, heads, chunk_size,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The sums of the parts of crowded windows."""
    for unit in range(tl.program_id(0), tl.load(parts_ptr) * heads, tl.num_programs(0)):
        head, first, end, window, window_end = _unit(parts_ptr, unit, heads)
        if (first > window) | (end < window_end):
            products, key_sums = _make_sums(
                k_ptr, v_ptr, order_ptr, k_strides, v_strides, head, first, end, BLOCK, HEAD_DIM
            )
            _store_sums(_slot(sums_ptr, first, heads, head, chunk_size, HEAD_DIM), products, key_sums, HEAD_DIM)


@triton.jit(do_not_specialize=["heads", "chunk_size"])
def _join_kernel(
    parts_ptr, sums_ptr, heads, chunk_size, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Adds up, in their order, the sums of the parts of crowded windows into the slot of the first."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    size: tl.constexpr = (HEAD_DIM + 1) * HEAD_DIM
    for unit in range(tl.program_id(0), tl.load(parts_ptr) * heads, tl.num_programs(0)):
        head, first, end, window, window_end = _unit(parts_ptr, unit, heads)
        if (first == window) & (end < window_end):
            n_parts = (window_end - window - chunk_size // 2) // chunk_size + 1
            total = tl.zeros((COLUMNS,), tl.float32)
            for start in range(0, n_parts, PARTS):
                parts = start + tl.arange(0, PARTS)
                firsts = window + parts * chunk_size
                slots = (firsts // (chunk_size // 2) * heads + head).to(tl.int64) * size
                mask = (parts < n_parts)[:, None] & (columns < size)[None, :]
                total += tl.sum(tl.load(sums_ptr + slots[:, None] + columns[None, :], mask=mask, other=0.0), 0)
            # Each program adds up its own columns, so that nobody else reads what is written here.
            slot = _slot(sums_ptr, first, heads, head, chunk_size, HEAD_DIM)
            tl.store(slot + columns, total, mask=columns < size)


@triton.jit
def _among_small(
    q, windows, low, high, head, k_ptr, v_ptr, order_ptr, starts_ptr, k_strides, v_strides,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Numerator (BLOCK, D) and sum of weights (BLOCK,) of a tile of rectified queries in small windows."""
    numerator = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    weights_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(low, high, BLOCK):
        exists, voxels = _tile(order_ptr, start, high, BLOCK)
        k = relu(_rows(k_ptr, voxels, exists, head, k_strides, HEAD_DIM))
        v = _rows(v_ptr, voxels, exists, head, v_strides, HEAD_DIM)
        together = windows[:, None] == _windows_of(starts_ptr, start, high, -2, BLOCK)[None, :]
        weights = tl.where(together, tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
        numerator += _dot(weights, v, PRECISION)
        weights_sum += tl.sum(weights, 1)
    return numerator, weights_sum


@triton.jit(do_not_specialize=["heads", "chunk_size"])
def _apply_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, order_ptr, starts_ptr, ends_ptr, parts_ptr, sums_ptr,
    q_strides, k_strides, v_strides, out_strides, heads, chunk_size, eps,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The result of all parts."""
    for unit in range(tl.program_id(0), tl.load(parts_ptr) * heads, tl.num_programs(0)):
        head, first, end, window, window_end = _unit(parts_ptr, unit, heads)
        if end <= window_end:
            if (first > window) | (end < window_end):
                products, key_sums = _load_sums(_slot(sums_ptr, window, heads, head, chunk_size, HEAD_DIM), HEAD_DIM)
            else:
                products, key_sums = _make_sums(
                    k_ptr, v_ptr, order_ptr, k_strides, v_strides, head, first, end, BLOCK, HEAD_DIM
                )
            for start in range(first, end, BLOCK):
                exists, voxels = _tile(order_ptr, start, end, BLOCK)
                q = relu(_rows(q_ptr, voxels, exists, head, q_strides, HEAD_DIM))
                weights_sum = tl.sum(q.to(tl.float32) * key_sums[None, :], 1)
                out = _dot(q, products, PRECISION) / (weights_sum + eps)[:, None]
                _store_rows(out_ptr, out, voxels, exists, head, out_strides, HEAD_DIM)
        else:
            for start in range(first, end, BLOCK):
                exists, voxels = _tile(order_ptr, start, end, BLOCK)
                q = relu(_rows(q_ptr, voxels, exists, head, q_strides, HEAD_DIM))
                low, high = _extent(starts_ptr, ends_ptr, start, end, BLOCK)
                numerator, weights_sum = _among_small(
                    q, _windows_of(starts_ptr, start, end, -1, BLOCK), low, high, head,
                    k_ptr, v_ptr, order_ptr, starts_ptr, k_strides, v_strides, PRECISION, BLOCK, HEAD_DIM,
                )  # fmt: skip
                out = numerator / (weights_sum + eps)[:, None]
                _store_rows(out_ptr, out, voxels, exists, head, out_strides, HEAD_DIM)


@triton.jit
def _store_key_gradients(
    k_ptr, v_ptr, d_k_ptr, d_v_ptr, order_ptr, k_strides, v_strides, d_k_strides, d_v_strides,
    d_products, d_key_sums, head, first, end, PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of a window's or its part's keys and values from those of the sums."""
    for start in range(first, end, BLOCK):
        exists, voxels = _tile(order_ptr, start, end, BLOCK)
        k = _rows(k_ptr, voxels, exists, head, k_strides, HEAD_DIM)
        v = _rows(v_ptr, voxels, exists, head, v_strides, HEAD_DIM)
        d_k = _dot(v, tl.trans(d_products), PRECISION) + d_key_sums[None, :]
        d_v = _dot(relu(k), d_products, PRECISION)
        _store_rows(d_k_ptr, tl.where(k > 0, d_k, 0.0), voxels, exists, head, d_k_strides, HEAD_DIM)
        _store_rows(d_v_ptr, d_v, voxels, exists, head, d_v_strides, HEAD_DIM)


@triton.jit(do_not_specialize=["heads", "chunk_size"])
def _query_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, d_q_ptr, d_k_ptr, d_v_ptr, order_ptr, starts_ptr, ends_ptr, parts_ptr,
    sums_ptr, d_sums_ptr, denominators_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, d_k_strides, d_v_strides, heads, chunk_size, eps,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and all gradients of whole windows.

    With g = grad / denominator, the gradient of the sums is `relu(q)^T g` and, of the denominator, `-g . out`. Parts of
    crowded windows leave theirs in a workspace, small windows leave their denominators and the gradients of these.
    """
    for unit in range(tl.program_id(0), tl.load(parts_ptr) * heads, tl.num_programs(0)):
        head, first, end, window, window_end = _unit(parts_ptr, unit, heads)
        if end <= window_end:
            is_part = (first > window) | (end < window_end)
            if is_part:
                products, key_sums = _load_sums(_slot(sums_ptr, window, heads, head, chunk_size, HEAD_DIM), HEAD_DIM)
            else:
                products, key_sums = _make_sums(
                    k_ptr, v_ptr, order_ptr, k_strides, v_strides, head, first, end, BLOCK, HEAD_DIM
                )
            d_products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
            d_key_sums = tl.zeros((HEAD_DIM,), tl.float32)
            for start in range(first, end, BLOCK):
                exists, voxels = _tile(order_ptr, start, end, BLOCK)
                unrectified = _rows(q_ptr, voxels, exists, head, q_strides, HEAD_DIM)
                q = relu(unrectified)
                denominator = tl.sum(q.to(tl.float32) * key_sums[None, :], 1) + eps
                grad = _rows(grad_ptr, voxels, exists, head, grad_strides, HEAD_DIM).to(tl.float32)
                grad = grad / denominator[:, None]
                d_denominator = -tl.sum(grad * _dot(q, products, PRECISION), 1) / denominator
                d_q = _dot(grad, tl.trans(products), PRECISION) + d_denominator[:, None] * key_sums[None, :]
                _store_rows(d_q_ptr, tl.where(unrectified > 0, d_q, 0.0), voxels, exists, head, d_q_strides, HEAD_DIM)
                d_products += _dot(tl.trans(q), grad, PRECISION)
                d_key_sums += tl.sum(d_denominator[:, None] * q.to(tl.float32), 0)
            if is_part:
                slot = _slot(d_sums_ptr, first, heads, head, chunk_size, HEAD_DIM)
                _store_sums(slot, d_products, d_key_sums, HEAD_DIM)
            else:
                _store_key_gradients(
                    k_ptr, v_ptr, d_k_ptr, d_v_ptr, order_ptr, k_strides, v_strides, d_k_strides, d_v_strides,
                    d_products, d_key_sums, head, first, end, PRECISION, BLOCK, HEAD_DIM,
                )  # fmt: skip
        else:
            for start in range(first, end, BLOCK):
                exists, voxels = _tile(order_ptr, start, end, BLOCK)
                windows = _windows_of(starts_ptr, start, end, -1, BLOCK)
                unrectified = _rows(q_ptr, voxels, exists, head, q_strides, HEAD_DIM)
                q = relu(unrectified)
                low, high = _extent(starts_ptr, ends_ptr, start, end, BLOCK)
                numerator, weights_sum = _among_small(
                    q, windows, low, high, head, k_ptr, v_ptr, order_ptr, starts_ptr, k_strides, v_strides,
                    PRECISION, BLOCK, HEAD_DIM,
                )  # fmt: skip
                denominator = weights_sum + eps
                grad = _rows(grad_ptr, voxels, exists, head, grad_strides, HEAD_DIM).to(tl.float32)
                grad = grad / denominator[:, None]
                d_denominator = -tl.sum(grad * numerator, 1) / denominator
                d_q = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
                for key_start in range(low, high, BLOCK):
                    key_exists, keys = _tile(order_ptr, key_start, high, BLOCK)
                    k = relu(_rows(k_ptr, keys, key_exists, head, k_strides, HEAD_DIM))
                    v = _rows(v_ptr, keys, key_exists, head, v_strides, HEAD_DIM)
                    together = windows[:, None] == _windows_of(starts_ptr, key_start, high, -2, BLOCK)[None, :]
                    d_weights = _dot(grad, tl.trans(v), PRECISION) + d_denominator[:, None]
                    d_q += _dot(tl.where(together, d_weights, 0.0), k, PRECISION)
                _store_rows(d_q_ptr, tl.where(unrectified > 0, d_q, 0.0), voxels, exists, head, d_q_strides, HEAD_DIM)
                places = denominators_ptr + (start + tl.arange(0, BLOCK)).to(tl.int64) * (2 * heads) + head
                tl.store(places, denominator, mask=exists)
                tl.store(places + heads, d_denominator, mask=exists)


@triton.jit(do_not_specialize=["heads", "chunk_size"])
def _key_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, d_k_ptr, d_v_ptr, order_ptr, starts_ptr, ends_ptr, parts_ptr,
    d_sums_ptr, denominators_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_k_strides, d_v_strides, heads, chunk_size,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values in crowded and in small windows."""
    for unit in range(tl.program_id(0), tl.load(parts_ptr) * heads, tl.num_programs(0)):
        head, first, end, window, window_end = _unit(parts_ptr, unit, heads)
        if (end <= window_end) & ((first > window) | (end < window_end)):
            slot = _slot(d_sums_ptr, window, heads, head, chunk_size, HEAD_DIM)
            d_products, d_key_sums = _load_sums(slot, HEAD_DIM)
            _store_key_gradients(
                k_ptr, v_ptr, d_k_ptr, d_v_ptr, order_ptr, k_strides, v_strides, d_k_strides, d_v_strides,
                d_products, d_key_sums, head, first, end, PRECISION, BLOCK, HEAD_DIM,
            )  # fmt: skip
        elif end > window_end:
            for start in range(first, end, BLOCK):
                exists, voxels = _tile(order_ptr, start, end, BLOCK)
                windows = _windows_of(starts_ptr, start, end, -1, BLOCK)
                unrectified = _rows(k_ptr, voxels, exists, head, k_strides, HEAD_DIM)
                k = relu(unrectified)
                v = _rows(v_ptr, voxels, exists, head, v_strides, HEAD_DIM)
                d_k = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
                d_v = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
                low, high = _extent(starts_ptr, ends_ptr, start, end, BLOCK)
                for query_start in range(low, high, BLOCK):
                    query_exists, queries = _tile(order_ptr, query_start, high, BLOCK)
                    q = relu(_rows(q_ptr, queries, query_exists, head, q_strides, HEAD_DIM))
                    places = denominators_ptr + (query_start + tl.arange(0, BLOCK)).to(tl.int64) * (2 * heads) + head
                    denominator = tl.load(places, mask=query_exists, other=1.0)
                    d_denominator = tl.load(places + heads, mask=query_exists, other=0.0)
                    grad = _rows(grad_ptr, queries, query_exists, head, grad_strides, HEAD_DIM).to(tl.float32)
                    grad = grad / denominator[:, None]
                    together = windows[:, None] == _windows_of(starts_ptr, query_start, high, -2, BLOCK)[None, :]
                    weights = tl.where(together, tl.dot(k, tl.trans(q), input_precision="ieee"), 0.0)
                    d_weights = _dot(v, tl.trans(grad), PRECISION) + d_denominator[None, :]
                    d_v += _dot(weights, grad, PRECISION)
                    d_k += _dot(tl.where(together, d_weights, 0.0), q, PRECISION)
                _store_rows(d_k_ptr, tl.where(unrectified > 0, d_k, 0.0), voxels, exists, head, d_k_strides, HEAD_DIM)
                _store_rows(d_v_ptr, d_v, voxels, exists, head, d_v_strides, HEAD_DIM)


def _most_warps(device: torch.device) -> int:
    """Of all programs of a kernel together."""
    if device.type != "cuda":
        return 20  # of the interpreter: fewer programs than there are units
    return _WARPS * multiprocessors(device)


def _warps_and_stages(q: Tensor) -> tuple[int, int]:
    """Warps a program and stages of the pipeline.

    Measured on an H100 (bfloat16, 100,000 voxels, 4 heads of 32), microseconds forward / forward and backward: one
    warp, three stages 96 / 327; two warps 107 / 354; four warps, two stages 147 / 507.
    """
    if q.element_size() == 2 and q.shape[2] <= 32:
        return 1, 3
    return (8 if q.shape[2] > 32 else 4), 2


class _Problem:
    """The launch parameters that the kernels of one call share."""

    def __init__(self, q: Tensor, parts: Tensor) -> None:
        self.n_voxels, self.heads, self.head_dim = q.shape
        self.device, self.parts = q.device, parts
        self.chunk_size = chunk_size(self.n_voxels)
        self.scalars = (self.heads, self.chunk_size)
        warps, stages = _warps_and_stages(q)
        self.grid = (min(most_parts(self.n_voxels) * self.heads, _most_warps(q.device) // warps),)
        self.options: dict[str, Any] = {
            "BLOCK": _BLOCK, "HEAD_DIM": self.head_dim, "num_warps": warps, "num_stages": stages
        }  # fmt: skip
        self.precision = "ieee" if q.dtype == torch.float32 else "tf32"

    @property
    def has_crowded(self) -> bool:
        """Whether a window could be crowded."""
        return self.n_voxels >= self.chunk_size * 3 // 2

    def workspace(self) -> Tensor:
        """Uninitialised sums of the parts of crowded windows."""
        slots = self.n_voxels // (self.chunk_size // 2) + 1
        shape = (slots, self.heads, self.head_dim + 1, self.head_dim)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def join(self, sums: Tensor) -> None:
        """Completes the sums of crowded windows."""
        columns = math.ceil((self.head_dim + 1) * self.head_dim / _JOINED_COLUMNS)
        launch(
            _join_kernel, (self.grid[0] // 4 + 1, columns), self.parts, sums, *self.scalars,
            HEAD_DIM=self.head_dim, PARTS=_JOINED, COLUMNS=_JOINED_COLUMNS, num_warps=4,
        )  # fmt: skip

    def sums(self, k: Tensor, v: Tensor, order: Tensor) -> Tensor:
        """Sums of keys and values over crowded windows."""
        found = self.workspace()
        if self.has_crowded:
            launch(
                _sums_kernel, self.grid, k, v, order, self.parts, found, *_strides(k, v), *self.scalars, **self.options
            )
            self.join(found)
        return found


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides over (N, heads) of each tensor."""
    return tuple(t.stride()[:2] for t in tensors)


def scattered_linear_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, starts: Tensor, ends: Tensor, parts: Tensor, eps: float
) -> Tensor:
    """Fused forward; arguments as in `scattered_linear_attention_reference`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = unit_stride(q, k, v)
    problem = _Problem(q, parts)
    sums = problem.sums(k, v, order)
    launch(
        _apply_kernel, problem.grid,
        q, k, v, out, order, starts, ends, parts, sums, *_strides(q, k, v, out), *problem.scalars, eps,
        PRECISION=problem.precision, **problem.options,
    )  # fmt: skip
    return out


def scattered_linear_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    order: Tensor, starts: Tensor, ends: Tensor, parts: Tensor, eps: float,
) -> None:  # fmt: skip
    """Fused backward: fills `d_q`, `d_k` and `d_v`, which may have any strides over (N, heads)."""
    if q.numel() == 0:
        return
    grad, q, k, v = unit_stride(grad, q, k, v)
    problem, windows = _Problem(q, parts), (order, starts, ends, parts)
    sums, d_sums = problem.sums(k, v, order), problem.workspace()
    denominators = torch.empty((len(q), 2, problem.heads), dtype=torch.float32, device=q.device)
    launch(
        _query_gradient_kernel, problem.grid,
        grad, q, k, v, d_q, d_k, d_v, *windows, sums, d_sums, denominators, *_strides(grad, q, k, v, d_q, d_k, d_v),
        *problem.scalars, eps, PRECISION=problem.precision, **problem.options,
    )  # fmt: skip
    if problem.has_crowded:
        problem.join(d_sums)
    launch(
        _key_gradient_kernel, problem.grid,
        grad, q, k, v, d_k, d_v, *windows, d_sums, denominators, *_strides(grad, q, k, v, d_k, d_v),
        *problem.scalars, PRECISION=problem.precision, **problem.options,
    )  # fmt: skip
