"""Triton kernels of scattered linear attention: index map, tiling and numerics.

Index map. Voxels stay in their order in memory. Position p in the order by window stands for voxel `order[p]`, whose
row of every tensor is read and written where it lies, with any strides over (N, heads).

Tiling. The positions are cut into chunks of one length, whatever the windows: a crowded window takes many chunks, a
chunk holds many tiny windows, and the number of programs follows from N alone, so that nothing waits for the device. A
program has one chunk in one head; the heads of a chunk, whose channels share memory lines, are neighbours. Two windows
of a chunk may go beyond it, its first and its last. Their sums are made in three steps: every chunk leaves its own part
in a workspace (slot 0 for its first window, slot 1 for its last if that is another), the parts of a window are added
in the order of the chunks into the slot of the chunk where it starts, and the chunks read the total from there. All
other windows lie inside one chunk. They are small, and their sums are never made: tiles of queries meet tiles of keys,
and products between different windows are masked. Results do not depend on the schedule.

Numerics. Sums, denominators and gradients of logits are float32. Where they meet half-precision rows in a product, both
are rounded to TF32, which has the range of a sum over a window, which float16 has not. float32 inputs use full float32
products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import unit_stride
from vitrail.kernels._common.triton import relu

_BLOCK = 32  # positions of a tile: with 64, the gradients' kernels run out of registers
_LEAST_CHUNK = 256  # positions: smaller chunks would move more sums than rows
_MOST_CHUNKS = 1024


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
def _tile(order_ptr, starts_ptr, ends_ptr, first, end, BLOCK: tl.constexpr):
    """Positions from `first` to below `end`: (exist, voxel, start and end of its window)."""
    positions = first + tl.arange(0, BLOCK)
    exists = positions < end
    voxels = tl.load(order_ptr + positions, mask=exists, other=0)
    # Positions beyond the end are in no window.
    starts = tl.load(starts_ptr + positions, mask=exists, other=-1)
    ends = tl.load(ends_ptr + positions, mask=exists, other=-1)
    return exists, voxels, starts, ends


@triton.jit
def _slot(sums_ptr, chunk, which, heads, head, HEAD_DIM: tl.constexpr):
    """Where the sums of one of a chunk's two windows stand: a (D, D) matrix, then a vector."""
    return sums_ptr + ((chunk * heads + head) * 2 + which).to(tl.int64) * ((HEAD_DIM + 1) * HEAD_DIM)


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
def _totals(sums_ptr, window, heads, head, chunk_size, HEAD_DIM: tl.constexpr):
    """Sums of a whole window, which is named by its first position."""
    chunk, which = window // chunk_size, (window % chunk_size != 0).to(tl.int32)
    return _load_sums(_slot(sums_ptr, chunk, which, heads, head, HEAD_DIM), HEAD_DIM)


@triton.jit
def _place(starts_ptr, heads, n_voxels, chunk_size):
    """(head, chunk, its first position, its end, its first window, its last window) of a program."""
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    first = chunk * chunk_size
    end = tl.minimum(first + chunk_size, n_voxels)
    return head, chunk, first, end, tl.load(starts_ptr + first), tl.load(starts_ptr + end - 1)


@triton.jit(do_not_specialize=["n_voxels", "heads", "chunk_size"])
def _sums_kernel(
    k_ptr, v_ptr, order_ptr, starts_ptr, ends_ptr, sums_ptr, k_strides, v_strides, n_voxels, heads, chunk_size,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A chunk's `relu(k)^T v` and `sum relu(k)`, of its first and its last window."""
    head, chunk, first, end, first_window, last_window = _place(starts_ptr, heads, n_voxels, chunk_size)
    products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    key_sums = tl.zeros((HEAD_DIM,), tl.float32)
    last_products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    last_key_sums = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(first, end, BLOCK):
        exists, voxels, windows, _ = _tile(order_ptr, starts_ptr, ends_ptr, start, end, BLOCK)
        k = relu(_rows(k_ptr, voxels, exists, head, k_strides, HEAD_DIM))
        v = _rows(v_ptr, voxels, exists, head, v_strides, HEAD_DIM)
        of_first = tl.where((windows == first_window)[:, None], k, 0.0).to(v.dtype)
        products = tl.dot(tl.trans(of_first), v, acc=products, input_precision="ieee")
        key_sums += tl.sum(of_first.to(tl.float32), 0)
        if last_window != first_window:
            of_last = tl.where((windows == last_window)[:, None], k, 0.0).to(v.dtype)
            last_products = tl.dot(tl.trans(of_last), v, acc=last_products, input_precision="ieee")
            last_key_sums += tl.sum(of_last.to(tl.float32), 0)
    _store_sums(_slot(sums_ptr, chunk, 0, heads, head, HEAD_DIM), products, key_sums, HEAD_DIM)
    if last_window != first_window:
        _store_sums(_slot(sums_ptr, chunk, 1, heads, head, HEAD_DIM), last_products, last_key_sums, HEAD_DIM)


@triton.jit(do_not_specialize=["n_voxels", "heads", "chunk_size"])
def _join_kernel(starts_ptr, ends_ptr, sums_ptr, n_voxels, heads, chunk_size, HEAD_DIM: tl.constexpr):
    """Adds up the parts of the window that starts in this chunk and goes beyond it, in the order of the chunks."""
    head, chunk, first, end, _, window = _place(starts_ptr, heads, n_voxels, chunk_size)
    window_end = tl.load(ends_ptr + end - 1)
    if (window >= first) & (window_end > end):
        slot = _slot(sums_ptr, chunk, (window != first).to(tl.int32), heads, head, HEAD_DIM)
        matrix, vector = _load_sums(slot, HEAD_DIM)
        for other in range(chunk + 1, (window_end - 1) // chunk_size + 1):
            part, part_vector = _load_sums(_slot(sums_ptr, other, 0, heads, head, HEAD_DIM), HEAD_DIM)
            matrix += part
            vector += part_vector
        _store_sums(slot, matrix, vector, HEAD_DIM)


@triton.jit
def _numerators(
    q, windows, ends, of_first, of_last, head, products, key_sums, last_products, last_key_sums,
    k_ptr, v_ptr, order_ptr, starts_ptr, ends_ptr, k_strides, v_strides,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Numerator (BLOCK, D) and sum of weights (BLOCK,) of a tile of rectified queries."""
    from_first = tl.where(of_first[:, None], q, 0.0)
    from_last = tl.where(of_last[:, None], q, 0.0)
    numerator = _dot(from_first, products, PRECISION) + _dot(from_last, last_products, PRECISION)
    weights_sum = tl.sum(from_first * key_sums[None, :] + from_last * last_key_sums[None, :], 1)
    inside = (windows >= 0) & (of_first == 0) & (of_last == 0)
    low, high = _extent(windows, ends, inside)
    for start in range(low, high, BLOCK):
        exists, voxels, key_windows, _ = _tile(order_ptr, starts_ptr, ends_ptr, start, high, BLOCK)
        k = relu(_rows(k_ptr, voxels, exists, head, k_strides, HEAD_DIM))
        v = _rows(v_ptr, voxels, exists, head, v_strides, HEAD_DIM)
        together = (windows[:, None] == key_windows[None, :]) & inside[:, None]
        weights = tl.where(together, tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee"), 0.0)
        numerator += _dot(weights, v, PRECISION)
        weights_sum += tl.sum(weights, 1)
    return numerator, weights_sum


@triton.jit
def _extent(windows, ends, inside):
    """Positions that the windows inside this chunk span: from, to; none where no position is `inside`."""
    high = tl.max(tl.where(inside, ends, 0), 0)
    return tl.min(tl.where(inside, windows, high), 0), high


@triton.jit(do_not_specialize=["n_voxels", "heads", "chunk_size"])
def _apply_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, order_ptr, starts_ptr, ends_ptr, sums_ptr,
    q_strides, k_strides, v_strides, out_strides, n_voxels, heads, chunk_size, eps,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The result for one chunk's queries."""
    head, _chunk, first, end, first_window, last_window = _place(starts_ptr, heads, n_voxels, chunk_size)
    products, key_sums = _totals(sums_ptr, first_window, heads, head, chunk_size, HEAD_DIM)
    last_products, last_key_sums = _totals(sums_ptr, last_window, heads, head, chunk_size, HEAD_DIM)
    for start in range(first, end, BLOCK):
        exists, voxels, windows, ends = _tile(order_ptr, starts_ptr, ends_ptr, start, end, BLOCK)
        of_first = windows == first_window
        of_last = (windows == last_window) & (last_window != first_window)
        q = _rows(q_ptr, voxels, exists, head, q_strides, HEAD_DIM)
        q = relu(q).to(q.dtype)
        numerator, weights_sum = _numerators(
            q, windows, ends, of_first, of_last, head, products, key_sums, last_products, last_key_sums,
            k_ptr, v_ptr, order_ptr, starts_ptr, ends_ptr, k_strides, v_strides, PRECISION, BLOCK, HEAD_DIM,
        )  # fmt: skip
        _store_rows(out_ptr, numerator / (weights_sum + eps)[:, None], voxels, exists, head, out_strides, HEAD_DIM)


@triton.jit(do_not_specialize=["n_voxels", "heads", "chunk_size"])
def _query_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, d_q_ptr, order_ptr, starts_ptr, ends_ptr, sums_ptr, d_sums_ptr, denominators_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, n_voxels, heads, chunk_size, eps,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradient of one chunk's queries, its part of the gradients of the sums, and what its keys' gradients need.

    With g = grad / denominator, the gradient of the sums is `relu(q)^T g` and, of the denominator, `-g . out`.
    """
    head, chunk, first, end, first_window, last_window = _place(starts_ptr, heads, n_voxels, chunk_size)
    products, key_sums = _totals(sums_ptr, first_window, heads, head, chunk_size, HEAD_DIM)
    last_products, last_key_sums = _totals(sums_ptr, last_window, heads, head, chunk_size, HEAD_DIM)
    d_products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    d_key_sums = tl.zeros((HEAD_DIM,), tl.float32)
    d_last_products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    d_last_key_sums = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(first, end, BLOCK):
        exists, voxels, windows, ends = _tile(order_ptr, starts_ptr, ends_ptr, start, end, BLOCK)
        of_first = windows == first_window
        of_last = (windows == last_window) & (last_window != first_window)
        unrectified = _rows(q_ptr, voxels, exists, head, q_strides, HEAD_DIM)
        q = relu(unrectified).to(unrectified.dtype)
        numerator, weights_sum = _numerators(
            q, windows, ends, of_first, of_last, head, products, key_sums, last_products, last_key_sums,
            k_ptr, v_ptr, order_ptr, starts_ptr, ends_ptr, k_strides, v_strides, PRECISION, BLOCK, HEAD_DIM,
        )  # fmt: skip
        denominator = weights_sum + eps
        grad = _rows(grad_ptr, voxels, exists, head, grad_strides, HEAD_DIM).to(tl.float32) / denominator[:, None]
        d_denominator = -tl.sum(grad * numerator, 1) / denominator
        from_first, from_last = tl.where(of_first[:, None], grad, 0.0), tl.where(of_last[:, None], grad, 0.0)
        d_q = _dot(from_first, tl.trans(products), PRECISION) + _dot(from_last, tl.trans(last_products), PRECISION)
        d_q += tl.where(of_first, d_denominator, 0.0)[:, None] * key_sums[None, :]
        d_q += tl.where(of_last, d_denominator, 0.0)[:, None] * last_key_sums[None, :]
        inside = (windows >= 0) & (of_first == 0) & (of_last == 0)
        low, high = _extent(windows, ends, inside)
        for key_start in range(low, high, BLOCK):
            key_exists, keys, key_windows, _ = _tile(order_ptr, starts_ptr, ends_ptr, key_start, high, BLOCK)
            k = relu(_rows(k_ptr, keys, key_exists, head, k_strides, HEAD_DIM))
            v = _rows(v_ptr, keys, key_exists, head, v_strides, HEAD_DIM)
            together = (windows[:, None] == key_windows[None, :]) & inside[:, None]
            d_weights = _dot(grad, tl.trans(v), PRECISION) + d_denominator[:, None]
            d_q += _dot(tl.where(together, d_weights, 0.0), k, PRECISION)
        _store_rows(d_q_ptr, tl.where(unrectified > 0, d_q, 0.0), voxels, exists, head, d_q_strides, HEAD_DIM)
        places = denominators_ptr + (start + tl.arange(0, BLOCK)).to(tl.int64) * (2 * heads) + head
        tl.store(places, denominator, mask=exists)
        tl.store(places + heads, d_denominator, mask=exists)
        d_products += _dot(tl.trans(q), from_first, PRECISION)
        d_key_sums += tl.sum(tl.where(of_first, d_denominator, 0.0)[:, None] * q, 0)
        d_last_products += _dot(tl.trans(q), from_last, PRECISION)
        d_last_key_sums += tl.sum(tl.where(of_last, d_denominator, 0.0)[:, None] * q, 0)
    _store_sums(_slot(d_sums_ptr, chunk, 0, heads, head, HEAD_DIM), d_products, d_key_sums, HEAD_DIM)
    if last_window != first_window:
        _store_sums(_slot(d_sums_ptr, chunk, 1, heads, head, HEAD_DIM), d_last_products, d_last_key_sums, HEAD_DIM)


@triton.jit(do_not_specialize=["n_voxels", "heads", "chunk_size"])
def _key_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, d_k_ptr, d_v_ptr, order_ptr, starts_ptr, ends_ptr, d_sums_ptr, denominators_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_k_strides, d_v_strides, n_voxels, heads, chunk_size,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's keys and values."""
    head, _chunk, first, end, first_window, last_window = _place(starts_ptr, heads, n_voxels, chunk_size)
    d_products, d_key_sums = _totals(d_sums_ptr, first_window, heads, head, chunk_size, HEAD_DIM)
    d_last_products, d_last_key_sums = _totals(d_sums_ptr, last_window, heads, head, chunk_size, HEAD_DIM)
    for start in range(first, end, BLOCK):
        exists, voxels, windows, ends = _tile(order_ptr, starts_ptr, ends_ptr, start, end, BLOCK)
        of_first = windows == first_window
        of_last = (windows == last_window) & (last_window != first_window)
        unrectified = _rows(k_ptr, voxels, exists, head, k_strides, HEAD_DIM)
        k = relu(unrectified).to(unrectified.dtype)
        v = _rows(v_ptr, voxels, exists, head, v_strides, HEAD_DIM)
        first_k, last_k = tl.where(of_first[:, None], k, 0.0), tl.where(of_last[:, None], k, 0.0)
        first_v, last_v = tl.where(of_first[:, None], v, 0.0), tl.where(of_last[:, None], v, 0.0)
        d_v = _dot(first_k, d_products, PRECISION) + _dot(last_k, d_last_products, PRECISION)
        d_k = _dot(first_v, tl.trans(d_products), PRECISION) + _dot(last_v, tl.trans(d_last_products), PRECISION)
        d_k += of_first.to(tl.float32)[:, None] * d_key_sums[None, :]
        d_k += of_last.to(tl.float32)[:, None] * d_last_key_sums[None, :]
        inside = (windows >= 0) & (of_first == 0) & (of_last == 0)
        low, high = _extent(windows, ends, inside)
        for query_start in range(low, high, BLOCK):
            query_exists, queries, query_windows, _ = _tile(order_ptr, starts_ptr, ends_ptr, query_start, high, BLOCK)
            q = _rows(q_ptr, queries, query_exists, head, q_strides, HEAD_DIM)
            q = relu(q).to(q.dtype)
            places = denominators_ptr + (query_start + tl.arange(0, BLOCK)).to(tl.int64) * (2 * heads) + head
            denominator = tl.load(places, mask=query_exists, other=1.0)
            d_denominator = tl.load(places + heads, mask=query_exists, other=0.0)
            grad = _rows(grad_ptr, queries, query_exists, head, grad_strides, HEAD_DIM)
            grad = grad.to(tl.float32) / denominator[:, None]
            together = (windows[:, None] == query_windows[None, :]) & inside[:, None]
            weights = tl.where(together, tl.dot(k, tl.trans(q), input_precision="ieee"), 0.0)
            d_weights = _dot(v, tl.trans(grad), PRECISION) + d_denominator[None, :]
            d_v += _dot(weights, grad, PRECISION)
            d_k += _dot(tl.where(together, d_weights, 0.0), q, PRECISION)
        _store_rows(d_k_ptr, tl.where(unrectified > 0, d_k, 0.0), voxels, exists, head, d_k_strides, HEAD_DIM)
        _store_rows(d_v_ptr, d_v, voxels, exists, head, d_v_strides, HEAD_DIM)


class _Problem:
    """The launch parameters that the kernels of one call share."""

    def __init__(self, q: Tensor) -> None:
        n_voxels, heads, self.head_dim = q.shape
        chunk_size = _BLOCK * math.ceil(max(_LEAST_CHUNK, n_voxels / _MOST_CHUNKS) / _BLOCK)
        self.n_chunks = math.ceil(n_voxels / chunk_size)
        self.heads, self.device = heads, q.device
        self.scalars = (n_voxels, heads, chunk_size)
        self.grid = (self.n_chunks * heads,)
        warps = 8 if self.head_dim > 32 else 4
        self.options: dict[str, Any] = {"BLOCK": _BLOCK, "HEAD_DIM": self.head_dim, "num_warps": warps, "num_stages": 2}
        self.precision = "ieee" if q.dtype == torch.float32 else "tf32"

    def workspace(self) -> Tensor:
        """Uninitialised sums of all chunks."""
        shape = (self.n_chunks, self.heads, 2, (self.head_dim + 1) * self.head_dim)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def join(self, sums: Tensor, starts: Tensor, ends: Tensor) -> None:
        """Completes the sums of windows that take several chunks."""
        if self.n_chunks > 1:
            _join_kernel[self.grid](starts, ends, sums, *self.scalars, HEAD_DIM=self.head_dim, num_warps=4)

    def sums(self, k: Tensor, v: Tensor, windows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Sums of keys and values over the windows that go beyond a chunk."""
        found = self.workspace()
        _sums_kernel[self.grid](k, v, *windows, found, *_strides(k, v), *self.scalars, **self.options)
        self.join(found, *windows[1:])
        return found


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides over (N, heads) of each tensor."""
    return tuple(t.stride()[:2] for t in tensors)


def scattered_linear_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, starts: Tensor, ends: Tensor, eps: float
) -> Tensor:
    """Fused forward; arguments as in `scattered_linear_attention_reference`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = unit_stride(q, k, v)
    problem, windows = _Problem(q), (order, starts, ends)
    sums = problem.sums(k, v, windows)
    _apply_kernel[problem.grid](
        q, k, v, out, *windows, sums, *_strides(q, k, v, out), *problem.scalars, eps,
        PRECISION=problem.precision, **problem.options,
    )  # fmt: skip
    return out


def scattered_linear_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    order: Tensor, starts: Tensor, ends: Tensor, eps: float,
) -> None:  # fmt: skip
    """Fused backward: fills `d_q`, `d_k` and `d_v`, which may have any strides over (N, heads)."""
    if q.numel() == 0:
        return
    grad, q, k, v = unit_stride(grad, q, k, v)
    problem, windows = _Problem(q), (order, starts, ends)
    sums, d_sums = problem.sums(k, v, windows), problem.workspace()
    denominators = torch.empty((len(q), 2, problem.heads), dtype=torch.float32, device=q.device)
    _query_gradient_kernel[problem.grid](
        grad, q, k, v, d_q, *windows, sums, d_sums, denominators, *_strides(grad, q, k, v, d_q),
        *problem.scalars, eps, PRECISION=problem.precision, **problem.options,
    )  # fmt: skip
    problem.join(d_sums, starts, ends)
    _key_gradient_kernel[problem.grid](
        grad, q, k, v, d_k, d_v, *windows, d_sums, denominators, *_strides(grad, q, k, v, d_k, d_v),
        *problem.scalars, PRECISION=problem.precision, **problem.options,
    )  # fmt: skip
