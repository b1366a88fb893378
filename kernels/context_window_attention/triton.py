"""Triton kernels of context window attention: index map, tiling and numerics.

Index map. Token t of the query window in row a and column b stands at row a * wh + t // ww and column b * ww + t % ww
of the map; key t of its context stands at row `row_starts[a]` + t // ww and column `column_starts[b]` + t % ww of `k`
and `v`. Contexts never leave their map, so all keys are real; queries that the last windows have beyond the map are
neither read nor written. Window and map sizes follow the image's and are therefore run-time numbers, one kernel for
all. So are the starts, which go to a kernel as numbers: a table on the device would have to be copied there first,
which a CUDA graph cannot record.

Tiling. A program has one head and a block of queries (or keys) of one window, and walks over blocks of the window's
context (or queries). Neighbouring programs work on the heads of the same tokens, which share memory lines. Where a
window is one block, one kernel computes all its gradients; larger ones take one for the queries and one for the keys.

Overlapping contexts. A key is seen by up to all windows, in VWFormer with ratio 8 by 64. The backward leaves each
window's gradients of its own context in a map of whole windows, and a last kernel adds up what belongs to each key.
Programs that gathered a block of keys instead would multiply it with windows that see a part of the block only: with
8 x 8 windows and keys 2 to 3 times as much as is needed, by a few long programs. What that costs is memory: two maps of
whole windows while the backward runs.

Numerics. Logits, softmax and all sums are float32; the weights, and each window's part of a gradient, are rounded to
the inputs' dtype, as the reference does. float32 inputs use full float32 products. The forward leaves nothing but its
output; the backward finds the rows' softmax statistics, with the correction sum_j P_ij dP_ij, anew. No atomics: parts
are added in the order of the windows, so gradients are deterministic.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, CUDA-graph replay), milliseconds forward / forward and
backward, ratio 8; then the reference, eager and compiled. The backward with `_SUM_CONFIG` of four warps; two save about
0.06 ms of every figure. Only one head of 512 channels in a large window is slower than what is compiled.

======================  ==============  ==============  ==============
batch, map, heads       fused           eager           compiled
======================  ==============  ==============  ==============
8, 64 x 64, 16 of 32    0.059 / 0.191   0.482 / 1.402   0.296 / 0.756
2, 64 x 256, 16 of 32   0.118 / 0.567   0.446 / 1.366   0.244 / 0.747
8, 64 x 64, 1 of 512    0.099 / 0.588   0.403 / 1.860   0.220 / 1.222
2, 64 x 256, 1 of 512   0.287 / 1.795   0.479 / 2.104   0.278 / 1.486
======================  ==============  ==============  ==============

Tried there (map 64 x 256, ratio 2, forward 0.119, with backward 0.790): blocks of 128 queries 0.109 forward, but no
gain in windows of one block; 8 warps 0.137 to 0.237 forward, 0.82 to 1.03 with backward; other pipelines within 4 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.gradients import zeros_or_empty
from vitrail.kernels._common.launch import Config, launch, map_strides, unit_stride
from vitrail.kernels._common.triton import (
    empty_statistics,
    load_statistics,
    online_softmax,
    softmax_statistics,
    statistics_of,
    store_statistics,
    token_offsets,
)

_LOG2E = tl.constexpr(math.log2(math.e))
_LEAST_STARTS = 8  # one kernel for all numbers of windows along an axis up to this
_SUM_TILE = 2048  # numbers that a program adds up at once


class Tiles(NamedTuple):
    """How a kernel is cut: tokens of a program's own block and of those it walks over, at most."""

    own: int
    others: int
    config: Config


# By kernel and head width, at most. "bwd" has no other block: it takes windows that are one block of its own.
_HALF = {
    "fwd": {64: Tiles(64, 64, Config(4, 2)), 128: Tiles(64, 64, Config(8, 2)), 512: Tiles(32, 32, Config(8, 1))},
    "bwd": {64: Tiles(64, 64, Config(4, 1)), 128: Tiles(64, 64, Config(8, 1)), 512: Tiles(16, 16, Config(8, 1))},
    "bwd_dq": {64: Tiles(64, 64, Config(4, 2)), 128: Tiles(64, 64, Config(8, 2)), 512: Tiles(32, 16, Config(8, 1))},
    "bwd_dkdv": {64: Tiles(64, 64, Config(4, 1)), 128: Tiles(64, 64, Config(8, 1)), 512: Tiles(32, 32, Config(8, 1))},
}
_FLOAT32 = {
    32: Tiles(64, 32, Config(8, 1)),
    64: Tiles(32, 32, Config(8, 1)),
    128: Tiles(16, 16, Config(4, 1)),
    512: Tiles(16, 16, Config(8, 1)),
}
TILES = {torch.float16: _HALF, torch.bfloat16: _HALF, torch.float32: dict.fromkeys(_HALF, _FLOAT32)}
_SUM_CONFIG = Config(2, 1)
_SIZES = ["height", "width", "window_h", "window_w", "rows", "columns", "n_heads"]


@triton.jit
def _start(starts, index, N_STARTS: tl.constexpr):
    """`starts[index]` of a tuple, for indices that are known at run time only."""
    start = starts[0]
    for i in tl.static_range(1, N_STARTS):
        start = tl.where(index == i, starts[i], start)
    return start.to(tl.int32)


@triton.jit
def _place(geometry, row_starts, column_starts, n_heads, N_STARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's (image, head, window, first token of its block, row and column of its queries, of its context)."""
    _, _, window_h, window_w, rows, columns = geometry
    n_blocks = tl.cdiv(window_h * window_w, BLOCK)
    head = tl.program_id(0) % n_heads
    first = (tl.program_id(0) // n_heads) % n_blocks * BLOCK
    window = tl.program_id(0) // (n_heads * n_blocks)  # of all images
    row = (window // columns) % rows
    column = window % columns
    context_y = _start(row_starts, row, N_STARTS)
    context_x = _start(column_starts, column, N_STARTS)
    image = window // (rows * columns)
    return image, head, window, first, row * window_h, column * window_w, context_y, context_x


@triton.jit
def _offsets(image, head, y, x, tokens, window_w, strides, HEAD_DIM: tl.constexpr):
    """Element offsets (tokens, HEAD_DIM) of tokens of the window whose first one stands in row `y` and column `x`."""
    _, stride_y, stride_x, _ = strides
    origin = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return origin + token_offsets(image, head, tokens, window_w, strides, HEAD_DIM)


@triton.jit
def _is_query(y, x, tokens, geometry):
    """Whether tokens of a query window exist and lie on the map."""
    height, width, window_h, window_w, _, _ = geometry
    inside = (y + tokens // window_w < height) & (x + tokens % window_w < width)
    return inside & (tokens < window_h * window_w)


@triton.jit
def _load(ptr, offsets, exists):
    return tl.load(ptr + offsets, mask=exists[:, None], other=0.0)


@triton.jit
def _key_tile(
    k_ptr, v_ptr, k_strides, v_strides, image, head, y, x, first, geometry,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Keys and values, from token `first` on, of the context that starts in row `y` and column `x`; which exist."""
    _, _, window_h, window_w, _, _ = geometry
    tokens = first + tl.arange(0, BLOCK)
    exists = tokens < window_h * window_w
    k = _load(k_ptr, _offsets(image, head, y, x, tokens, window_w, k_strides, HEAD_DIM), exists)
    v = _load(v_ptr, _offsets(image, head, y, x, tokens, window_w, v_strides, HEAD_DIM), exists)
    return k, v, exists


@triton.jit
def _logits(q, k, exists, scale):
    """Logits in units of log2, minus infinity for the keys that the tile has beyond the window."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
    return tl.where(exists[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def _context_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_strides, k_strides, v_strides, out_strides, row_starts, column_starts,
    height, width, window_h, window_w, rows, columns, n_heads, scale,
    N_STARTS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: one head, one block of queries, over all keys of their context."""
    geometry = (height, width, window_h, window_w, rows, columns)
    image, head, _window, first, y, x, context_y, context_x = _place(
        geometry, row_starts, column_starts, n_heads, N_STARTS, OWN
    )
    q_tokens = first + tl.arange(0, OWN)
    real = _is_query(y, x, q_tokens, geometry)
    q = _load(q_ptr, _offsets(image, head, y, x, q_tokens, window_w, q_strides, HEAD_DIM), real)
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    out = tl.zeros((OWN, HEAD_DIM), tl.float32)
    for start in range(0, window_h * window_w, OTHERS):
        k, v, exists = _key_tile(
            k_ptr, v_ptr, k_strides, v_strides, image, head, context_y, context_x, start, geometry, OTHERS, HEAD_DIM
        )
        logits = _logits(q, k, exists, scale)
        weights, decay, maximum, total = online_softmax(logits, maximum, total, 1.0)
        out = tl.dot(weights.to(v.dtype), v, acc=out * decay[:, None], input_precision="ieee")
    out_offsets = _offsets(image, head, y, x, q_tokens, window_w, out_strides, HEAD_DIM)
    tl.store(out_ptr + out_offsets, (out / total[:, None]).to(q.dtype), mask=real[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _context_bwd_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, d_q_ptr, d_k_ptr, d_v_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, part_strides, row_starts, column_starts,
    height, width, window_h, window_w, rows, columns, n_heads, scale,
    N_STARTS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: one head of one window that is a single block; its part of the gradients of keys and values."""
    geometry = (height, width, window_h, window_w, rows, columns)
    image, head, _window, _first, y, x, context_y, context_x = _place(
        geometry, row_starts, column_starts, n_heads, N_STARTS, OWN
    )
    tokens = tl.arange(0, OWN)
    real = _is_query(y, x, tokens, geometry)
    q = _load(q_ptr, _offsets(image, head, y, x, tokens, window_w, q_strides, HEAD_DIM), real)
    k, v, exists = _key_tile(
        k_ptr, v_ptr, k_strides, v_strides, image, head, context_y, context_x, 0, geometry, OWN, HEAD_DIM
    )
    grad = _load(grad_ptr, _offsets(image, head, y, x, tokens, window_w, grad_strides, HEAD_DIM), real)
    logits = _logits(q, k, exists, scale)
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    part_offsets = _offsets(image, head, y, x, tokens, window_w, part_strides, HEAD_DIM)
    d_v = tl.dot(tl.trans(weights.to(v.dtype)), grad, input_precision="ieee")
    tl.store(d_v_ptr + part_offsets, d_v.to(v.dtype), mask=exists[:, None])
    d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None]) * scale
    d_scores = d_scores.to(q.dtype)
    d_q = tl.dot(d_scores, k, input_precision="ieee")
    d_q_offsets = _offsets(image, head, y, x, tokens, window_w, d_q_strides, HEAD_DIM)
    tl.store(d_q_ptr + d_q_offsets, d_q.to(q.dtype), mask=real[:, None])
    d_k = tl.dot(tl.trans(d_scores), q, input_precision="ieee")
    tl.store(d_k_ptr + part_offsets, d_k.to(k.dtype), mask=exists[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _context_bwd_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, d_q_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, row_starts, column_starts,
    height, width, window_h, window_w, rows, columns, n_heads, scale,
    N_STARTS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: gradient of one block of queries; leaves the rows' statistics for the kernel of the keys.

    A first pass over the keys finds each row's softmax statistics, a second its gradient.
    """
    geometry = (height, width, window_h, window_w, rows, columns)
    n_tokens = window_h * window_w
    image, head, window, first, y, x, context_y, context_x = _place(
        geometry, row_starts, column_starts, n_heads, N_STARTS, OWN
    )
    q_tokens = first + tl.arange(0, OWN)
    real = _is_query(y, x, q_tokens, geometry)
    q = _load(q_ptr, _offsets(image, head, y, x, q_tokens, window_w, q_strides, HEAD_DIM), real)
    grad = _load(grad_ptr, _offsets(image, head, y, x, q_tokens, window_w, grad_strides, HEAD_DIM), real)
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    correction = tl.zeros((OWN,), tl.float32)
    for start in range(0, n_tokens, OTHERS):
        k, v, exists = _key_tile(
            k_ptr, v_ptr, k_strides, v_strides, image, head, context_y, context_x, start, geometry, OTHERS, HEAD_DIM
        )
        logits = _logits(q, k, exists, scale)
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        weights, decay, maximum, total = online_softmax(logits, maximum, total, 1.0)
        correction = correction * decay + tl.sum(weights * d_weights, 1)
    correction = correction / total
    shift, factor = softmax_statistics(maximum, total, q.dtype)
    d_q = tl.zeros((OWN, HEAD_DIM), tl.float32)
    for start in range(0, n_tokens, OTHERS):
        k, v, exists = _key_tile(
            k_ptr, v_ptr, k_strides, v_strides, image, head, context_y, context_x, start, geometry, OTHERS, HEAD_DIM
        )
        weights = tl.exp2(_logits(q, k, exists, scale) - shift[:, None])
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_scores = weights * (d_weights - correction[:, None]) * scale
        d_q = tl.dot(d_scores.to(k.dtype), k, acc=d_q, input_precision="ieee")
    d_q_offsets = _offsets(image, head, y, x, q_tokens, window_w, d_q_strides, HEAD_DIM)
    tl.store(d_q_ptr + d_q_offsets, (d_q * factor[:, None]).to(q.dtype), mask=real[:, None])
    stats = statistics_of(stats_ptr, window * n_heads + head, n_tokens, q.dtype) + q_tokens
    store_statistics(stats, n_tokens, shift, factor, correction, q_tokens < n_tokens, q.dtype)


@triton.jit(do_not_specialize=_SIZES)
def _context_bwd_dkdv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, d_k_ptr, d_v_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, part_strides, row_starts, column_starts,
    height, width, window_h, window_w, rows, columns, n_heads, scale,
    N_STARTS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: one window's part of the gradients of one block of keys and values, over all its queries."""
    geometry = (height, width, window_h, window_w, rows, columns)
    n_tokens = window_h * window_w
    image, head, window, first, y, x, context_y, context_x = _place(
        geometry, row_starts, column_starts, n_heads, N_STARTS, OWN
    )
    tokens = first + tl.arange(0, OWN)
    k, v, exists = _key_tile(
        k_ptr, v_ptr, k_strides, v_strides, image, head, context_y, context_x, first, geometry, OWN, HEAD_DIM
    )
    stats = statistics_of(stats_ptr, window * n_heads + head, n_tokens, q_ptr.dtype.element_ty)
    d_k = tl.zeros((OWN, HEAD_DIM), tl.float32)
    d_v = tl.zeros((OWN, HEAD_DIM), tl.float32)
    for start in range(0, n_tokens, OTHERS):
        q_tokens = start + tl.arange(0, OTHERS)
        real = _is_query(y, x, q_tokens, geometry)
        q = _load(q_ptr, _offsets(image, head, y, x, q_tokens, window_w, q_strides, HEAD_DIM), real)
        grad = _load(grad_ptr, _offsets(image, head, y, x, q_tokens, window_w, grad_strides, HEAD_DIM), real)
        shift, factor, correction = load_statistics(stats + q_tokens, n_tokens, real, q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        weights = tl.exp2(logits - shift[:, None]) * factor[:, None]
        d_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, acc=d_v, input_precision="ieee")
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_scores = weights * (d_weights - correction[:, None]) * scale
        d_k = tl.dot(tl.trans(d_scores.to(q.dtype)), q, acc=d_k, input_precision="ieee")
    part_offsets = _offsets(image, head, y, x, tokens, window_w, part_strides, HEAD_DIM)
    tl.store(d_k_ptr + part_offsets, d_k.to(k.dtype), mask=exists[:, None])
    tl.store(d_v_ptr + part_offsets, d_v.to(v.dtype), mask=exists[:, None])


@triton.jit(do_not_specialize=["height", "width", "window_h", "window_w", "rows", "columns", "channels"])
def _context_bwd_sum_kernel(
    d_k_parts_ptr, d_v_parts_ptr, d_k_ptr, d_v_ptr, row_starts, column_starts,
    height, width, window_h, window_w, rows, columns, channels, N_STARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one key and value, whose map is `height` x `width`; adds up its windows' parts."""
    n_blocks = tl.cdiv(channels, BLOCK)
    token = tl.program_id(0) // n_blocks  # of all images
    channel = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    image = token // (height * width)
    column = tl.arange(0, N_STARTS)
    x = token % width - _start(column_starts, column, N_STARTS)  # in each window of a row of windows
    sees = (x >= 0) & (x < window_w) & (column < columns)
    x = column * window_w + x
    d_k = tl.zeros((N_STARTS, BLOCK), tl.float32)
    d_v = tl.zeros((N_STARTS, BLOCK), tl.float32)
    for row in range(rows):
        y = token // width % height - _start(row_starts, row, N_STARTS)
        row_sees = (y >= 0) & (y < window_h)
        pixel = ((image * rows + row) * window_h + y).to(tl.int64) * (columns * window_w) + x
        offsets = pixel[:, None] * channels + channel[None, :]
        mask = (sees & row_sees)[:, None] & (channel < channels)[None, :]
        d_k += tl.load(d_k_parts_ptr + offsets, mask=mask, other=0.0)
        d_v += tl.load(d_v_parts_ptr + offsets, mask=mask, other=0.0)
    offsets = token.to(tl.int64) * channels + channel
    tl.store(d_k_ptr + offsets, tl.sum(d_k, 0).to(d_k_ptr.dtype.element_ty), mask=channel < channels)
    tl.store(d_v_ptr + offsets, tl.sum(d_v, 0).to(d_v_ptr.dtype.element_ty), mask=channel < channels)


class _Problem:
    """The launch parameters that the kernels of one call share."""

    def __init__(
        self, q: Tensor, window: Sequence[int], row_starts: Sequence[int], column_starts: Sequence[int], scale: float
    ) -> None:
        batch, height, width, self.heads, self.head_dim = q.shape
        rows, columns = len(row_starts), len(column_starts)
        self.n_tokens = window[0] * window[1]
        self.windows = (*window, rows, columns)
        self.n_starts = max(_LEAST_STARTS, triton.next_power_of_2(max(rows, columns)))
        self.starts = (self._filled(row_starts), self._filled(column_starts))
        self.scalars = (*self.starts, height, width, *self.windows, self.heads, scale)
        self.rows = batch * rows * columns * self.heads
        self.tiles_by_kernel = TILES[q.dtype]
        self.part_shape = (batch, rows * window[0], columns * window[1], self.heads, self.head_dim)

    def _filled(self, starts: Sequence[int]) -> tuple[float, ...]:
        """As many numbers for every call; as floats, since Triton compiles anew for integers 1 and multiples of 16."""
        return (*map(float, starts), *(0.0,) * (self.n_starts - len(starts)))

    def tiles(self, name: str) -> Tiles:
        """The tiles of a kernel, no larger than the window."""
        tiles = next(found for most, found in self.tiles_by_kernel[name].items() if self.head_dim <= most)
        most = max(16, triton.next_power_of_2(self.n_tokens))  # tensor cores take no fewer than 16 rows
        return Tiles(min(tiles.own, most), min(tiles.others, most), tiles.config)

    @property
    def is_single(self) -> bool:
        """Whether one program can compute all gradients of a window."""
        return self.n_tokens <= self.tiles("bwd").own

    def launch(self, kernel: Any, name: str, *arguments: Any) -> None:
        """Runs a kernel whose programs each have one block of one window and head."""
        own, others, config = self.tiles(name)
        launch(
            kernel, (self.rows * math.ceil(self.n_tokens / own),), *arguments, *self.scalars, N_STARTS=self.n_starts,
            OWN=own, OTHERS=others, HEAD_DIM=self.head_dim, **config.launch,
        )  # fmt: skip


def context_window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    row_starts: Sequence[int],
    column_starts: Sequence[int],
    scale: float,
) -> Tensor:
    """Fused forward; arguments as in `context_window_attention_reference`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = unit_stride(q, k, v)
    problem = _Problem(q, window, row_starts, column_starts, scale)
    problem.launch(_context_fwd_kernel, "fwd", q, k, v, out, *map_strides(q, k, v, out))
    return out


def context_window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    row_starts: Sequence[int],
    column_starts: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused backward: the gradients of q, k and v, contiguous."""
    if q.numel() == 0:
        return zeros_or_empty(grad, q), zeros_or_empty(grad, k), zeros_or_empty(grad, v)
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    inputs = unit_stride(grad, q, k, v)
    problem = _Problem(q, window, row_starts, column_starts, scale)
    parts = tuple(torch.empty(problem.part_shape, dtype=t.dtype, device=t.device) for t in (k, v))
    strides, part_strides = map_strides(*inputs), map_strides(parts[0])
    if problem.is_single:
        problem.launch(
            _context_bwd_kernel, "bwd", *inputs, d_q, *parts, *strides, *map_strides(d_q), *part_strides
        )  # fmt: skip
    else:
        stats = empty_statistics(problem.rows, problem.n_tokens, q)
        problem.launch(_context_bwd_dq_kernel, "bwd_dq", *inputs, d_q, stats, *strides, *map_strides(d_q))
        problem.launch(_context_bwd_dkdv_kernel, "bwd_dkdv", *inputs, *parts, stats, *strides, *part_strides)
    _add_parts(problem, parts, d_k, d_v)
    return d_q, d_k, d_v


def _add_parts(problem: _Problem, parts: tuple[Tensor, ...], d_k: Tensor, d_v: Tensor) -> None:
    """Fills the gradients of the keys and values with the sums of the windows' parts."""
    batch, height, width, heads, head_dim = d_k.shape
    channels = heads * head_dim
    block = min(_SUM_TILE // problem.n_starts, triton.next_power_of_2(channels))
    launch(
        _context_bwd_sum_kernel, (batch * height * width * math.ceil(channels / block),), *parts, d_k, d_v,
        *problem.starts, height, width, *problem.windows, channels, N_STARTS=problem.n_starts, BLOCK=block,
        **_SUM_CONFIG.launch,
    )  # fmt: skip
