"""What the operators' Triton kernels share: loads with padding, guards of the softmax, and the tiling of whole maps.

Global operators cut a map's tokens into chunks. Sums over a whole map are split over programs, so that a large map
fills the device: each program leaves its chunk's sums in a workspace, and whoever needs the total adds them up in the
order of the chunks, so that results do not depend on the schedule. Imports Triton: only for the operators' `triton.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_kv(ptr, pad_ptr, offsets, real, head, HAS_PAD: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Loads keys or values; padded positions hold `pad_ptr`'s vector, or zeros."""
    tile = tl.load(ptr + offsets, mask=real[:, None], other=0.0)
    if HAS_PAD:
        pad = tl.load(pad_ptr + head * HEAD_DIM + tl.arange(0, HEAD_DIM)).to(tile.dtype)
        tile = tl.where(real[:, None], tile, pad[None, :])
    return tile


@triton.jit
def add_product(total, a, b):
    """`total + a @ b`, (M, N) in float32.

    Of float32 inputs each product is summed by itself: a single chain of additions over all tiles is less exact than
    the sums of matrix libraries. That takes the registers of one more tile. Triton makes a chain also of a plain
    addition, but not of this one.
    """
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, total)
    else:
        return tl.dot(a, b, acc=total)


@triton.jit
def finite(maximum):
    """A row that sees nothing (tile padding) has no maximum; zero keeps its weights zero instead of NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def online_softmax(logits, maximum, total, factor):
    """Takes a tile of keys into the rows' maximum and sum: (weights, factor on earlier sums, maximum, total).

    Times the positive `factor` the logits are in units of log2, as the maximum is. Were that multiplied here as well,
    a fused multiply-add would leave its rounding in the factor, which has to be 1 while the maximum stays.
    """
    new_maximum = tl.maximum(maximum, tl.max(logits, 1) * factor)
    shift = finite(new_maximum)
    decay = tl.exp2(maximum - shift)
    weights = tl.exp2(logits * factor - shift[:, None])
    return weights, decay, new_maximum, total * decay + tl.sum(weights, 1)


@triton.jit
def softmax_statistics(maximum, total, dtype: tl.constexpr):
    """(shift, factor) of rows: their weights are exp2(logits - shift) times the factor.

    In half precision the shift is the log-sum-exp, and the factor 1. In `dtype` float32 they are the maximum and
    1 / total: the log-sum-exp would be rounded at the size of the logits, one and the same error of all weights of a
    row, which sums over them do not average. `maximum` is finite and in units of log2, `total` is not zero.
    """
    if dtype == tl.float32:
        return maximum, 1.0 / total
    else:
        return maximum + tl.log2(total), tl.full(total.shape, 1.0, tl.float32)


@triton.jit
def statistics_of(ptr, row, size, dtype: tl.constexpr):
    """Where the statistics of the `row`-th `size` queries lie, see `empty_statistics`; `dtype` is the inputs'."""
    n_statistics: tl.constexpr = 3 if dtype == tl.float32 else 2
    return ptr + row.to(tl.int64) * (n_statistics * size)


@triton.jit
def store_statistics(ptr, size, shift, factor, correction, mask, dtype: tl.constexpr):
    """Leaves rows' statistics for other kernels: of the softmax, and its correction, the sum of P dP."""
    tl.store(ptr, shift, mask=mask)
    tl.store(ptr + size, correction, mask=mask)
    if dtype == tl.float32:
        tl.store(ptr + 2 * size, factor, mask=mask)


@triton.jit
def load_statistics(ptr, size, mask, dtype: tl.constexpr):
    """(shift, factor, correction) of rows; no weights where there is no row.

    The factor belongs to the weights. Taken by the output's gradient, which is smaller, it would round the products
    with values otherwise than in the correction, from which much of them cancels.
    """
    zero = None if mask is None else 0.0
    shift = tl.load(ptr, mask=mask, other=None if mask is None else float("inf"))
    correction = tl.load(ptr + size, mask=mask, other=zero)
    if dtype == tl.float32:
        return shift, tl.load(ptr + 2 * size, mask=mask, other=zero), correction
    else:
        return shift, tl.full(shift.shape, 1.0, tl.float32), correction


def empty_statistics(rows: int, size: int, q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised statistics of rows of `size` queries: shift, correction and, of float32 queries, factor."""
    n_statistics = 3 if q.dtype == torch.float32 else 2
    return torch.empty((rows, n_statistics, size), dtype=dtype, device=q.device)


@triton.jit
def relu(x):
    """Keeps NaN, as PyTorch does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@triton.jit
def exp2_normal(x):
    """2**x in float32, or zero below the smallest normal number: one instruction where `tl.exp2` takes four."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def normal_tail(distance):
    """The normal distribution below `-distance`, for distances from 0 to 6.

    Its logarithm is close to a polynomial, fitted so that `distance * tail` is off by 6e-6 of itself at most, or by
    6e-9 where it is below 1e-4.
    """
    log2 = tl.fma(distance, 3.22510646e-05, -0.000746192525)
    log2 = tl.fma(log2, distance, 0.00793264916)
    log2 = tl.fma(log2, distance, -0.0530326366)
    log2 = tl.fma(log2, distance, -0.459187775)
    log2 = tl.fma(log2, distance, -1.15103092)
    return exp2_normal(tl.fma(log2, distance, -1.00000787))


@triton.jit
def gelu_16(x):
    """The exact GELU for results of 16 bits: off by 7e-6 of itself, a seventieth of a rounding, or by 6e-9.

    NaN and infinity stay, as in PyTorch; minus infinity, of which PyTorch makes NaN, is as good as zero.
    """
    distance = tl.minimum(tl.abs(x), 6.0)
    return tl.fma(-distance, normal_tail(distance), relu(x))


@triton.jit
def gelu_16_and_slope(x):
    """(`gelu_16`, its derivative): the latter off by 4e-6. Not a number where x is infinite, as in PyTorch."""
    distance = tl.minimum(tl.abs(x), 6.0)
    tail = normal_tail(distance)
    density = exp2_normal(tl.fma(x * x, -0.721347520, -1.32574806))  # its logarithm is a parabola
    slope = tl.fma(x, density, tl.where(x > 0, 1.0 - tail, tail))
    return tl.fma(-distance, tail, relu(x)), slope


@triton.jit
def bisect(sorted_ptr, size, wanted, steps, ABOVE: tl.constexpr):
    """Ranks of the first of `size` sorted integers that are not below the `wanted` ones, or that are above them.

    `steps` halvings, `size.bit_length()` at least, leave a single place.
    """
    low = tl.zeros(wanted.shape, tl.int32)
    high = low + size
    for _ in range(steps):
        middle = (low + high) // 2
        is_open = low < high
        found = tl.load(sorted_ptr + middle, mask=is_open, other=0)
        is_before = is_open & ((found <= wanted) if ABOVE else (found < wanted))
        high = tl.where(is_open & (is_before == 0), middle, high)
        low = tl.where(is_before, middle + 1, low)
    return low


@triton.jit
def place(n_chunks, heads):
    """(image, head, chunk, row of the workspace) of a program; heads, which share memory lines, are neighbours."""
    program = tl.program_id(0)
    head = program % heads
    chunk = (program // heads) % n_chunks
    image = program // (heads * n_chunks)
    return image, head, chunk, image * heads + head


@triton.jit
def token_offsets(image, head, tokens, width, strides, HEAD_DIM: tl.constexpr):
    """Element offsets (tokens, HEAD_DIM) into a (B, H, W, heads, D) tensor whose last stride is 1."""
    stride_b, stride_y, stride_x, stride_h = strides
    rows = (tokens // width).to(tl.int64) * stride_y + (tokens % width).to(tl.int64) * stride_x
    return (image.to(tl.int64) * stride_b + head * stride_h + rows)[:, None] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def square_offsets(HEAD_DIM: tl.constexpr):
    """Element offsets of a contiguous (HEAD_DIM, HEAD_DIM) matrix."""
    return tl.arange(0, HEAD_DIM)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]


def shares(most: int, programs: int, slots: int) -> int:
    """In how many shares work is cut, each of which takes so many programs, to fill a device's slots."""
    return min(most, max(1, slots // programs))


@triton.jit(do_not_specialize=["n_parts"])
def add_parts_kernel(
    parts_ptr, d_weight_ptr, d_bias_ptr, n_parts, HAS_BIAS: tl.constexpr,
    DIM: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds up (parts, TAPS + 1, DIM) in order: gradients of a weight (DIM, TAPS) and of a bias (DIM,).

    The grid is (TAPS + 1, blocks of channels), or (TAPS, blocks) where there is no bias.
    """
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


@triton.jit(do_not_specialize=["n_parts"])
def _sum_of_parts_kernel(
    parts_ptr, out_ptr, second_ptr, n_parts, size, INNER: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up a block of numbers of (parts, size) in order; with INNER they go to two tensors, INNER by INNER."""
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = numbers < size
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        place = parts_ptr + parts.to(tl.int64)[:, None] * size + numbers[None, :]
        total += tl.load(place, mask=(parts < n_parts)[:, None] & exists[None, :], other=0.0)
    found = tl.sum(total, 0)
    if INNER == 0:
        tl.store(out_ptr + numbers, found.to(out_ptr.dtype.element_ty), mask=exists)
    else:
        which = numbers // INNER % 2
        place = numbers // (2 * INNER) * INNER + numbers % INNER
        tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=exists & (which == 0))
        tl.store(second_ptr + place, found.to(second_ptr.dtype.element_ty), mask=exists & (which == 1))


def sum_of_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds up the first axis of contiguous float32 parts, in one launch where PyTorch takes two."""
    if len(parts) == 1 and parts.dtype == dtype:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    _sum_parts(parts, out, out, 0)
    return out


def sums_of_pairs(parts: Tensor, dtype: torch.dtype, second_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of (parts, ..., 2, D): two tensors (..., D), each of its own dtype."""
    shape = (*parts.shape[1:-2], parts.shape[-1])
    first = torch.empty(shape, dtype=dtype, device=parts.device)
    second = torch.empty(shape, dtype=second_dtype, device=parts.device)
    _sum_parts(parts, first, second, parts.shape[-1])
    return first, second


def _sum_parts(parts: Tensor, first: Tensor, second: Tensor, inner: int) -> None:
    size = math.prod(parts.shape[1:])
    rows, block = (8, 512) if len(parts) <= 8 else (64, 64)
    if size:
        launch(
            _sum_of_parts_kernel, (triton.cdiv(size, block),), parts, first, second, len(parts), size,
            INNER=inner, PARTS=rows, BLOCK=block, num_warps=4, num_stages=1,
        )  # fmt: skip


class Chunks:
    """How a call's tokens are cut into chunks, and the launch parameters that its kernels share.

    Args:
        q: (B, H, W, heads, D).
        block_bytes: Size of one tile of tokens.
        least_chunk: Fewest tokens of a chunk: smaller ones would move more sums than tokens.
        most_chunks: Of one map.
    """

    def __init__(self, q: Tensor, block_bytes: int, least_chunk: int, most_chunks: int) -> None:
        batch, height, width, heads, self.head_dim = q.shape
        n_tokens = height * width
        block = max(16, block_bytes // (self.head_dim * q.element_size()))
        chunk_size = block * math.ceil(max(least_chunk, n_tokens / most_chunks) / block)
        self.n_chunks = math.ceil(n_tokens / chunk_size)
        self.device = q.device
        self.rows = (batch, heads)
        self.scalars = (n_tokens, width, heads, self.n_chunks, chunk_size)
        self.grid = (batch * heads * self.n_chunks,)
        self.options: dict[str, Any] = {
            "BLOCK": block, "HEAD_DIM": self.head_dim, "num_warps": 8 if self.head_dim > 64 else 4, "num_stages": 2
        }  # fmt: skip

    def workspace(self, size: int) -> Tensor:
        """Uninitialised float32 sums, (B, heads, chunks, `size`)."""
        return torch.empty((*self.rows, self.n_chunks, size), dtype=torch.float32, device=self.device)
