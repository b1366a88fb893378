"""Triton kernels of window attention: index map, tiling and numerics.

Index map. A window's token t stands at row t // ww and column t % ww of its window; the window's origin plus the
shift, modulo the padded size (the map's own size where the roll comes first), is a pixel. Tokens whose pixel lies
outside the image are padding: they are never read or written, their key and value are `pad_k` and `pad_v` or hidden.
Tokens that wrapped around a border form regions of their own and see only their like.

Tiling. Windows of up to `_SINGLE_TILE` tokens fit into one tile: a program keeps one head's bias in registers and
walks over windows, so that bias is read, and its gradient written, once a program and not once a window. Neighbouring
programs work on the heads of the same windows, which share memory lines. Larger windows are cut into blocks of
queries and keys with an online softmax. What is left of a window beyond its whole blocks has a tile of its own size,
and as queries a launch of its own: 12 x 12 tokens are 64 + 64 + 16, not three blocks.

Numerics. Logits, softmax and all sums are float32; the weights are rounded to the input's dtype before they meet
values or gradients, as in every fused attention. float32 inputs use full float32 products. The backward recomputes
the weights; the softmax correction is sum_j P_ij dP_ij, so that the forward's output is not needed. No atomics: sums
over windows (bias, padding) go to one slot a program and are added in a fixed order, so gradients are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from vitrail.kernels._common.gradients import empty_gradient, zeros_or_empty
from vitrail.kernels._common.launch import Config, contiguous, launch, map_strides, multiprocessors, unit_stride
from vitrail.kernels._common.triton import finite, load_kv
from vitrail.kernels.window_attention.triton.index import locate, offsets
from vitrail.kernels.window_attention.triton.walking import (
    _window_mask_kernel,
    _window_bwd_dkdv_walking_kernel,
    _window_bwd_dq_walking_kernel,
    _window_fwd_walking_kernel,
)

_LOG2E = tl.constexpr(math.log2(math.e))
_SINGLE_TILE = 64
_BLOCK = tl.constexpr(64)


@triton.jit
def _load_bias(ptr, head, q_tokens, k_tokens, N_TOKENS: tl.constexpr):
    """Bias tile of one head, in units of log2."""
    at = (head * N_TOKENS + q_tokens[:, None]) * N_TOKENS + k_tokens[None, :]
    inside = (q_tokens[:, None] < N_TOKENS) & (k_tokens[None, :] < N_TOKENS)
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32) * _LOG2E


@triton.jit
def _load_padded_bias(ptr, head, q_tokens, k_tokens, ROWS: tl.constexpr):
    """Like `_load_bias`, of a bias padded to (heads, ROWS, ROWS): no masks, and wide loads."""
    at = (head * ROWS + q_tokens[:, None]) * ROWS + k_tokens[None, :]
    return tl.load(ptr + at).to(tl.float32) * _LOG2E


@triton.jit
def _logits(
    q,
    k,
    b_bias,
    scale,
    q_real,
    k_real,
    q_region,
    k_region,
    k_exists,
    HAS_BIAS: tl.constexpr,
    SHIFTED: tl.constexpr,
    HIDES_PADS: tl.constexpr,
    MASKS_KEYS: tl.constexpr,
):
    """Logits in units of log2, minus infinity where the query does not see the key.

    With `MASKS_KEYS` the tile may have more keys than the window, and the bias does not hide them.
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
    if HAS_BIAS:
        logits += b_bias
    if not (MASKS_KEYS or SHIFTED or HIDES_PADS):
        return logits
    visible = k_exists[None, :]
    if SHIFTED:
        visible = visible & (q_region[:, None] == k_region[None, :])
    if HIDES_PADS:
        visible = visible & (k_real[None, :] | (q_real[:, None] == 0))
    return tl.where(visible, logits, float("-inf"))


@triton.jit(do_not_specialize=["height", "width", "n_windows"])
def _window_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, out_ptr,
    q_strides, k_strides, v_strides, out_strides, height, width, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: one head, every `step`-th window, each a single tile."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    SHIFTED: tl.constexpr = SHIFT_Y + SHIFT_X > 0
    head = tl.program_id(0) % n_heads
    step = tl.num_programs(0) // n_heads
    tokens = tl.arange(0, BLOCK)
    exists = tokens < N_TOKENS
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = _load_bias(bias_ptr, head, tokens, tokens, N_TOKENS)
    for window in range(tl.program_id(0) // n_heads, n_windows, step):
        batch, y, x, real, region = locate(
            tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        q = tl.load(q_ptr + offsets(batch, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
        k = load_kv(k_ptr, pad_k_ptr, offsets(batch, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
        v = load_kv(v_ptr, pad_v_ptr, offsets(batch, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
        logits = _logits(
            q, k, b_bias, scale, real, real, region, region, exists, HAS_BIAS, SHIFTED, HIDES_PADS, N_TOKENS < BLOCK
        )
        weights = tl.exp2(logits - finite(tl.max(logits, 1))[:, None])
        total = tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out_ptr + offsets(batch, y, x, head, out_strides, HEAD_DIM),
            out.to(out_ptr.dtype.element_ty),
            mask=real[:, None],
        )


@triton.jit(do_not_specialize=["height", "width", "n_windows"])
def _window_bwd_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
    d_q_ptr, d_k_ptr, d_v_ptr, d_bias_ptr, d_pad_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, d_k_strides, d_v_strides,
    height, width, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Backward of `_window_fwd_kernel`; writes one partial bias and padding gradient a program."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    SHIFTED: tl.constexpr = SHIFT_Y + SHIFT_X > 0
    head = tl.program_id(0) % n_heads
    step = tl.num_programs(0) // n_heads
    tokens = tl.arange(0, BLOCK)
    exists = tokens < N_TOKENS
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = _load_bias(bias_ptr, head, tokens, tokens, N_TOKENS)
        d_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    if HAS_PAD:
        d_pad_k = tl.zeros((HEAD_DIM,), tl.float32)
        d_pad_v = tl.zeros((HEAD_DIM,), tl.float32)
    for window in range(tl.program_id(0) // n_heads, n_windows, step):
        batch, y, x, real, region = locate(
            tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        q = tl.load(q_ptr + offsets(batch, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
        grad = tl.load(grad_ptr + offsets(batch, y, x, head, grad_strides, HEAD_DIM), mask=real[:, None], other=0.0)
        k = load_kv(k_ptr, pad_k_ptr, offsets(batch, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
        v = load_kv(v_ptr, pad_v_ptr, offsets(batch, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
        logits = _logits(
            q, k, b_bias, scale, real, real, region, region, exists, HAS_BIAS, SHIFTED, HIDES_PADS, N_TOKENS < BLOCK
        )
        weights = tl.exp2(logits - finite(tl.max(logits, 1))[:, None])
        total = tl.sum(weights, 1)
        weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_logits = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None])
        if HAS_BIAS:
            d_bias += d_logits
        d_scores = (d_logits * scale).to(q.dtype)
        d_q = tl.dot(d_scores, k, input_precision="ieee")
        d_k = tl.dot(tl.trans(d_scores), q, input_precision="ieee")
        d_v = tl.dot(tl.trans(weights.to(v.dtype)), grad, input_precision="ieee")
        tl.store(d_q_ptr + offsets(batch, y, x, head, d_q_strides, HEAD_DIM), d_q.to(q.dtype), mask=real[:, None])
        tl.store(d_k_ptr + offsets(batch, y, x, head, d_k_strides, HEAD_DIM), d_k.to(k.dtype), mask=real[:, None])
        tl.store(d_v_ptr + offsets(batch, y, x, head, d_v_strides, HEAD_DIM), d_v.to(v.dtype), mask=real[:, None])
        if HAS_PAD:
            is_pad = (exists & (real == 0))[:, None]
            d_pad_k += tl.sum(tl.where(is_pad, d_k, 0.0), 0)
            d_pad_v += tl.sum(tl.where(is_pad, d_v, 0.0), 0)
    if HAS_BIAS:
        at = (tl.program_id(0) * N_TOKENS + tokens[:, None]) * N_TOKENS + tokens[None, :]
        tl.store(d_bias_ptr + at, d_bias, mask=exists[:, None] & exists[None, :])
    if HAS_PAD:
        _store_pad_gradients(d_pad_ptr, tl.program_id(0), d_pad_k, d_pad_v, HEAD_DIM)


@triton.jit
def _store_pad_gradients(d_pad_ptr, slot, d_pad_k, d_pad_v, HEAD_DIM: tl.constexpr):
    """Writes one program's sums over padded positions to its slot of (slots, 2, HEAD_DIM)."""
    at = slot * 2 * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(d_pad_ptr + at, d_pad_k)
    tl.store(d_pad_ptr + at + HEAD_DIM, d_pad_v)


@triton.jit
def _own_block(
    n_heads, height, width,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """The tokens that a program works for: (head, window, block, tokens, where they are).

    A launch has blocks of `OWN` tokens, `N_OWN` a window, from token `FIRST` on.
    """
    head = (tl.program_id(0) // N_OWN) % n_heads
    window = tl.program_id(0) // (N_OWN * n_heads)
    block = FIRST // _BLOCK + tl.program_id(0) % N_OWN
    tokens = FIRST + (tl.program_id(0) % N_OWN) * OWN + tl.arange(0, OWN)
    batch, y, x, real, region = locate(tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST)
    return head, window, block, tokens, batch, y, x, real, region


@triton.jit
def _key_tile(
    start, q, q_tokens, q_real, q_region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
    k_strides, v_strides, height, width, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A block of keys and values, and the queries' logits."""
    tokens = start + tl.arange(0, BLOCK)
    batch, y, x, real, region = locate(tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST)
    k = load_kv(k_ptr, pad_k_ptr, offsets(batch, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    v = load_kv(v_ptr, pad_v_ptr, offsets(batch, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = _load_padded_bias(bias_ptr, head, q_tokens, tokens, ROWS)
    logits = _logits(
        q, k, b_bias, scale, q_real, real, q_region, region, tokens < WINDOW_H * WINDOW_W,
        HAS_BIAS, SHIFT_Y + SHIFT_X > 0, HIDES_PADS, not HAS_BIAS,
    )  # fmt: skip
    return k, v, logits


@triton.jit
def _fwd_step(v, logits, maximum, total, out):
    """Online softmax over one more block of keys."""
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    decay = tl.exp2(maximum - finite(new_maximum))
    weights = tl.exp2(logits - finite(new_maximum)[:, None])
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, acc=out * decay[:, None], input_precision="ieee")
    return new_maximum, total, out


@triton.jit(do_not_specialize=["height", "width"])
def _window_fwd_tiled_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, out_ptr,
    q_strides, k_strides, v_strides, out_strides, height, width, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """One program: one block of queries of one window and head, over all blocks of keys."""
    head, window, _block, q_tokens, batch, y, x, real, region = _own_block(
        n_heads, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, FIRST, OWN, N_OWN
    )
    q = tl.load(q_ptr + offsets(batch, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    out = tl.zeros((OWN, HEAD_DIM), tl.float32)
    for start in range(0, WHOLE, _BLOCK):
        _k, v, logits = _key_tile(
            start, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, _BLOCK, HEAD_DIM,
        )  # fmt: skip
        maximum, total, out = _fwd_step(v, logits, maximum, total, out)
    if REST:
        _k, v, logits = _key_tile(
            WHOLE, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, REST, HEAD_DIM,
        )  # fmt: skip
        maximum, total, out = _fwd_step(v, logits, maximum, total, out)
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    at = offsets(batch, y, x, head, out_strides, HEAD_DIM)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _stats_step(grad, v, logits, maximum, total, correction):
    """One more block of keys in the rows' softmax statistics."""
    d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    decay = tl.exp2(maximum - finite(new_maximum))
    weights = tl.exp2(logits - finite(new_maximum)[:, None])
    total = total * decay + tl.sum(weights, 1)
    correction = correction * decay + tl.sum(weights * d_weights, 1)
    return new_maximum, total, correction


@triton.jit
def _dq_step(grad, k, v, logits, row_lse, correction, scale, d_q):
    """One more block of keys in the queries' gradient."""
    d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    weights = tl.exp2(logits - row_lse[:, None])
    d_scores = weights * (d_weights - correction[:, None]) * scale
    return tl.dot(d_scores.to(k.dtype), k, acc=d_q, input_precision="ieee")


@triton.jit(do_not_specialize=["height", "width"])
def _window_bwd_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, d_q_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, height, width, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """One program: gradient of one block of queries; leaves the rows' statistics for the other backward kernels.

    The first pass over the keys finds each row's log-sum-exp and softmax correction, the second its gradient.
    """
    head, window, _block, q_tokens, batch, y, x, real, region = _own_block(
        n_heads, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, FIRST, OWN, N_OWN
    )
    q = tl.load(q_ptr + offsets(batch, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    grad = tl.load(grad_ptr + offsets(batch, y, x, head, grad_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    correction = tl.zeros((OWN,), tl.float32)
    for start in range(0, WHOLE, _BLOCK):
        _k, v, logits = _key_tile(
            start, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, _BLOCK, HEAD_DIM,
        )  # fmt: skip
        maximum, total, correction = _stats_step(grad, v, logits, maximum, total, correction)
    d_q = tl.zeros((OWN, HEAD_DIM), tl.float32)
    if REST:
        # The last block is at hand for both passes.
        rest_k, rest_v, rest_logits = _key_tile(
            WHOLE, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, REST, HEAD_DIM,
        )  # fmt: skip
        maximum, total, correction = _stats_step(grad, rest_v, rest_logits, maximum, total, correction)
    total = tl.where(total == 0.0, 1.0, total)
    row_lse = finite(maximum) + tl.log2(total)
    correction = correction / total
    if REST:
        d_q = _dq_step(grad, rest_k, rest_v, rest_logits, row_lse, correction, scale, d_q)
    for start in range(0, WHOLE, _BLOCK):
        k, v, logits = _key_tile(
            start, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, _BLOCK, HEAD_DIM,
        )  # fmt: skip
        d_q = _dq_step(grad, k, v, logits, row_lse, correction, scale, d_q)
    at = offsets(batch, y, x, head, d_q_strides, HEAD_DIM)
    tl.store(d_q_ptr + at, d_q.to(q.dtype), mask=real[:, None])
    stats = stats_ptr + (window * n_heads + head).to(tl.int64) * (2 * (WHOLE + REST)) + q_tokens
    tl.store(stats, row_lse)
    tl.store(stats + WHOLE + REST, correction)


@triton.jit
def _dkdv_step(
    start, tokens, real, region, k, v, d_k, d_v, window, head, grad_ptr, q_ptr, bias_ptr, stats,
    grad_strides, q_strides, height, width, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HIDES_PADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One more block of queries in the keys' and values' gradients."""
    q_tokens = start + tl.arange(0, BLOCK)
    batch, y, x, q_real, q_region = locate(
        q_tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
    )
    q = tl.load(q_ptr + offsets(batch, y, x, head, q_strides, HEAD_DIM), mask=q_real[:, None], other=0.0)
    grad = tl.load(grad_ptr + offsets(batch, y, x, head, grad_strides, HEAD_DIM), mask=q_real[:, None], other=0.0)
    row_lse = tl.load(stats + q_tokens)
    correction = tl.load(stats + ROWS + q_tokens)
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = _load_padded_bias(bias_ptr, head, q_tokens, tokens, ROWS)
    logits = _logits(
        q, k, b_bias, scale, q_real, real, q_region, region, tokens < WINDOW_H * WINDOW_W,
        HAS_BIAS, SHIFT_Y + SHIFT_X > 0, HIDES_PADS, not HAS_BIAS,
    )  # fmt: skip
    weights = tl.exp2(logits - row_lse[:, None])
    d_v = tl.dot(tl.trans(weights.to(v.dtype)), grad, acc=d_v, input_precision="ieee")
    d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    d_scores = weights * (d_weights - correction[:, None]) * scale
    d_k = tl.dot(tl.trans(d_scores.to(q.dtype)), q, acc=d_k, input_precision="ieee")
    return d_k, d_v


@triton.jit(do_not_specialize=["height", "width"])
def _window_bwd_dkdv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, d_k_ptr, d_v_ptr, d_pad_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_k_strides, d_v_strides, height, width, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """One program: gradients of one block of keys and values, over all blocks of queries."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    N_BLOCKS: tl.constexpr = (WHOLE + REST + _BLOCK - 1) // _BLOCK
    head, window, block, tokens, batch, y, x, real, region = _own_block(
        n_heads, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, FIRST, OWN, N_OWN
    )
    k = load_kv(k_ptr, pad_k_ptr, offsets(batch, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    v = load_kv(v_ptr, pad_v_ptr, offsets(batch, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    stats = stats_ptr + (window * n_heads + head).to(tl.int64) * (2 * (WHOLE + REST))
    d_k = tl.zeros((OWN, HEAD_DIM), tl.float32)
    d_v = tl.zeros((OWN, HEAD_DIM), tl.float32)
    for start in range(0, WHOLE, _BLOCK):
        d_k, d_v = _dkdv_step(
            start, tokens, real, region, k, v, d_k, d_v, window, head, grad_ptr, q_ptr, bias_ptr, stats,
            grad_strides, q_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HIDES_PADS, WHOLE + REST, _BLOCK, HEAD_DIM,
        )  # fmt: skip
    if REST:
        d_k, d_v = _dkdv_step(
            WHOLE, tokens, real, region, k, v, d_k, d_v, window, head, grad_ptr, q_ptr, bias_ptr, stats,
            grad_strides, q_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HIDES_PADS, WHOLE + REST, REST, HEAD_DIM,
        )  # fmt: skip
    tl.store(d_k_ptr + offsets(batch, y, x, head, d_k_strides, HEAD_DIM), d_k.to(k.dtype), mask=real[:, None])
    tl.store(d_v_ptr + offsets(batch, y, x, head, d_v_strides, HEAD_DIM), d_v.to(v.dtype), mask=real[:, None])
    if HAS_PAD:
        is_pad = ((tokens < N_TOKENS) & (real == 0))[:, None]
        d_pad_k = tl.sum(tl.where(is_pad, d_k, 0.0), 0)
        d_pad_v = tl.sum(tl.where(is_pad, d_v, 0.0), 0)
        slot = (window * N_BLOCKS + block) * n_heads + head
        _store_pad_gradients(d_pad_ptr, slot.to(tl.int64), d_pad_k, d_pad_v, HEAD_DIM)


@triton.jit(do_not_specialize=["height", "width", "n_windows"])
def _window_bwd_dbias_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, d_bias_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, height, width, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one head's bias gradient, summed over every `step`-th window."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    N_BLOCKS: tl.constexpr = (N_TOKENS + _BLOCK - 1) // _BLOCK
    ROWS: tl.constexpr = WHOLE + REST
    SHIFTED: tl.constexpr = SHIFT_Y + SHIFT_X > 0
    tile = tl.program_id(0) % (N_BLOCKS * N_BLOCKS)
    head = (tl.program_id(0) // (N_BLOCKS * N_BLOCKS)) % n_heads
    split = tl.program_id(0) // (N_BLOCKS * N_BLOCKS * n_heads)
    step = tl.num_programs(0) // (N_BLOCKS * N_BLOCKS * n_heads)
    q_tokens = (tile // N_BLOCKS) * _BLOCK + tl.arange(0, _BLOCK)
    tokens = (tile % N_BLOCKS) * _BLOCK + tl.arange(0, _BLOCK)
    inside = (q_tokens[:, None] < ROWS) & (tokens[None, :] < ROWS)
    bias_offsets = (head * ROWS + q_tokens[:, None]) * ROWS + tokens[None, :]
    b_bias = tl.load(bias_ptr + bias_offsets, mask=inside, other=float("-inf")).to(tl.float32) * _LOG2E
    d_bias = tl.zeros((_BLOCK, _BLOCK), tl.float32)
    for window in range(split, n_windows, step):
        batch, y, x, real, region = locate(
            tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        batch, q_y, q_x, q_real, q_region = locate(
            q_tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        k = load_kv(k_ptr, pad_k_ptr, offsets(batch, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
        v = load_kv(v_ptr, pad_v_ptr, offsets(batch, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
        q = tl.load(q_ptr + offsets(batch, q_y, q_x, head, q_strides, HEAD_DIM), mask=q_real[:, None], other=0.0)
        grad_offsets = offsets(batch, q_y, q_x, head, grad_strides, HEAD_DIM)
        grad = tl.load(grad_ptr + grad_offsets, mask=q_real[:, None], other=0.0)
        logits = _logits(
            q, k, b_bias, scale, q_real, real, q_region, region, tokens < N_TOKENS, HAS_BIAS, SHIFTED, HIDES_PADS, False
        )
        stats = stats_ptr + (window * n_heads + head).to(tl.int64) * (2 * ROWS) + q_tokens
        row_lse = tl.load(stats, mask=q_tokens < ROWS, other=float("inf"))
        correction = tl.load(stats + ROWS, mask=q_tokens < ROWS, other=0.0)
        weights = tl.exp2(logits - row_lse[:, None])
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_bias += weights * (d_weights - correction[:, None])
    at = ((split * n_heads + head) * N_TOKENS + q_tokens[:, None]) * N_TOKENS + tokens[None, :]
    tl.store(d_bias_ptr + at, d_bias, mask=(q_tokens[:, None] < N_TOKENS) & (tokens[None, :] < N_TOKENS))


# With a pipeline, tiles of rows of more than `_NARROW` bytes would need more shared memory than a program can have.
_NARROW = 256
CONFIGS = {
    "fwd": Config(4, 3, 8),
    "fwd_tiled": Config(4, 2),
    "bwd": Config(4, 2, 4),
    "fwd_wide": Config(8, 1, 2),
    "bwd_wide": Config(8, 1, 2),
    "bwd_dq": Config(4, 2),
    "bwd_dkdv": Config(4, 2),
    "bwd_dbias": Config(4, 2, 4),
}


class Walk(NamedTuple):
    """How one kernel for windows of a few tiles is cut and launched.

    Own tokens and others at a time, whether the rest of a window that is no whole
    block has a launch of its own, and how it is launched.
    """

    own: int
    others: int
    splits: bool
    staged: bool
    config: Config
    registers: int | None = None

    @property
    def launch(self) -> dict[str, Any]:
        """Keyword arguments of the Triton launch."""
        return {**self.config.launch, "STAGED": self.staged, "maxnreg": self.registers}

    def others_cut(self, tokens: int) -> dict[str, int]:
        """Tokens as whole tiles and the smallest tile that holds the rest."""
        whole, rest = _whole_and_rest(tokens, self.others)
        return {"WHOLE": whole, "REST": rest, "BLOCK": self.others}

    def columns(self, tokens: int) -> int:
        """Tokens that all tiles of others hold."""
        return sum(_whole_and_rest(tokens, self.others))

    def blocks(self, tokens: int) -> list[tuple[int, int, int]]:
        """(first token, tokens of a block, number of blocks) of each launch."""
        if not self.splits:
            return [(0, self.own, math.ceil(tokens / self.own))]
        whole, rest = _whole_and_rest(tokens, self.own)
        return [(0, self.own, whole // self.own)] * (whole > 0) + [(whole, rest, 1)] * (rest > 0)

    def rows(self, tokens: int) -> int:
        """Tokens that all blocks hold."""
        return sum(own * number for _, own, number in self.blocks(tokens))


def _whole_and_rest(tokens: int, block: int) -> tuple[int, int]:
    whole, rest = tokens // block * block, tokens % block
    rest = max(16, triton.next_power_of_2(rest)) if rest else 0
    return (whole + block, 0) if rest == block else (whole, rest)


_MOST_WALKED = 256
# By kernel, for heads of up to so many channels.
WALKS = {
    "fwd": {
        32: Walk(64, 64, False, False, Config(4, 2, 3), 168),
        64: Walk(64, 32, False, False, Config(4, 1, 2)),
    },
    "bwd_dq": {
        32: Walk(64, 64, False, False, Config(4, 2, 3), 168),
        64: Walk(64, 32, False, False, Config(4, 1, 2)),
    },
    "bwd_dkdv": {
        32: Walk(64, 32, False, True, Config(4, 2, 2)),
        64: Walk(64, 32, False, False, Config(4, 1, 2)),
    },
}
_MASK_CONSTANTS = ("WINDOW_H", "WINDOW_W", "SHIFT_Y", "SHIFT_X", "ROLL_FIRST", "HAS_BIAS", "HIDES_PADS")


class _Problem:
    """The launch parameters that all kernels of one call share."""

    def __init__(
        self,
        q: Tensor,
        bias: Tensor | None,
        pad_k: Tensor | None,
        window: tuple[int, int],
        shift: tuple[int, int],
        scale: float,
        roll_first: bool,
    ) -> None:
        batch, height, width, self.heads, self.head_dim = q.shape
        self.row_bytes = self.head_dim * q.element_size()
        self.tokens = window[0] * window[1]
        self.n_windows = batch * math.ceil(height / window[0]) * math.ceil(width / window[1])
        self.single_tile = self.tokens <= _SINGLE_TILE
        is_walked = self.tokens <= _MOST_WALKED and q.dtype != torch.float32 and self.head_dim <= 64
        self.walks = not self.single_tile and is_walked
        self.n_blocks = math.ceil(self.tokens / _BLOCK.value)
        padded = height % window[0] != 0 or width % window[1] != 0
        self.has_pad = padded and pad_k is not None
        self.scalars = (height, width, self.n_windows, self.heads, scale)
        self.tiled_scalars = (height, width, self.heads, scale)
        self.constants: dict[str, Any] = {
            "WINDOW_H": window[0],
            "WINDOW_W": window[1],
            "SHIFT_Y": shift[0],
            "SHIFT_X": shift[1],
            # Without padding or shift the orders are one, and need no kernel of their own.
            "ROLL_FIRST": roll_first and padded and shift != (0, 0),
            "HAS_BIAS": bias is not None,
            "HAS_PAD": self.has_pad,
            "HIDES_PADS": padded and pad_k is None,
            "HEAD_DIM": self.head_dim,
        }
        if self.single_tile:
            self.constants["BLOCK"] = max(16, triton.next_power_of_2(self.tokens))
        elif not self.walks:
            self.constants |= self._cut()
        shifted, hides_pads = shift != (0, 0), self.constants["HIDES_PADS"]
        # Padding is in the last windows, until a shift moves it into the last but one.
        n_classes = 1 + (shifted or hides_pads) + (shifted and hides_pads and not roll_first)
        self.walking_constants = {**self.constants, "N_CLASSES": n_classes}
        del self.walking_constants["HIDES_PADS"]
        self.dtype, self.device = q.dtype, q.device
        self.multiprocessors = multiprocessors(q.device)

    def _cut(self) -> dict[str, int]:
        """A window as whole blocks and the smallest tile that holds the rest: 144 tokens are 64 + 64 + 16."""
        block = _BLOCK.value
        rest = self.tokens % block
        rest = max(16, triton.next_power_of_2(rest)) if rest else 0
        return {"WHOLE": self.tokens // block * block, "REST": rest}

    def launches(self) -> Iterator[tuple[tuple[int], dict[str, int]]]:
        """Grids and block constants that cover all windows: their whole blocks, then their rests."""
        whole, rest = self.constants["WHOLE"], self.constants["REST"]
        n_whole = whole // _BLOCK.value
        yield (self.n_windows * self.heads * n_whole,), {"FIRST": 0, "OWN": _BLOCK.value, "N_OWN": n_whole}
        if rest:
            yield (self.n_windows * self.heads,), {"FIRST": whole, "OWN": rest, "N_OWN": 1}

    def laid_out(self, bias: Tensor | None) -> Tensor | None:
        """The bias as the kernels read it: for several tiles with -inf where a tile is larger than the window."""
        if bias is None or self.single_tile or self.walks:
            return contiguous(bias)
        missing = self.constants["WHOLE"] + self.constants["REST"] - self.tokens
        return F.pad(bias, (0, missing, 0, missing), value=-math.inf).contiguous()

    def walk_of(self, kernel: str) -> Walk:
        """How a kernel walks, for this width of heads."""
        return next(walk for most, walk in WALKS[kernel].items() if self.head_dim <= most)

    def mask(self, bias: Tensor | None, rows: int, columns: int, keys_first: bool = False) -> Tensor:
        """Bias and minus infinity where keys are hidden, as the kernels that walk read it."""
        n_classes = self.walking_constants["N_CLASSES"]
        options = {"dtype": self.dtype if bias is None else bias.dtype, "device": self.device}
        laid_out = torch.empty((n_classes**2, self.heads, rows, columns), **options)
        launch(
            _window_mask_kernel, (n_classes**2 * self.heads * rows // 16,), laid_out, bias, *self.scalars[:2],
            self.heads, **{name: self.constants[name] for name in _MASK_CONSTANTS}, N_CLASSES=n_classes, N_ROWS=rows,
            N_COLUMNS=columns, KEYS_FIRST=keys_first, num_warps=4,
        )  # fmt: skip
        return laid_out

    def walk(self, kernel: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """(programs a block, constants) of each launch of a kernel that walks."""
        walk = self.walk_of(kernel)
        for first, own, number in walk.blocks(self.tokens):
            walkers = min(self.n_windows, max(1, walk.config.programs * self.multiprocessors // (self.heads * number)))
            blocks = {"FIRST": first, "OWN": own, "N_OWN": number, "N_ROWS": walk.rows(self.tokens)}
            warps = min(walk.config.num_warps, max(1, own // 16))
            yield walkers, self.walking_constants | walk.others_cut(self.tokens) | blocks | walk.launch | {"num_warps": warps}

    def config(self, kernel: str) -> Config:
        """How one of the kernels for windows of one tile is launched."""
        return CONFIGS[kernel if self.row_bytes <= _NARROW else f"{kernel}_wide"]

    def walkers(self, per_multiprocessor: int) -> int:
        """How many programs share the windows of one head, for so many programs of all heads on a multiprocessor."""
        return min(self.n_windows, max(1, per_multiprocessor * self.multiprocessors // self.heads))


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Three maps of equal strides, so that a token's place is computed once; usually they are."""
    return (q, k, v) if q.stride() == k.stride() == v.stride() else tuple(t.contiguous() for t in (q, k, v))


def window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    roll_first: bool,
) -> Tensor:
    """Fused forward; arguments as in `window_attention_reference`."""
    q, k, v = unit_stride(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    problem = _Problem(q, bias, pad_k, window, shift, scale, roll_first)
    tensors = (q, k, v, problem.laid_out(bias), contiguous(pad_k), contiguous(pad_v), out)
    strides = map_strides(q, k, v, out)
    if problem.single_tile:
        config = problem.config("fwd")
        grid = (problem.walkers(config.programs) * problem.heads,)
        launch(_window_fwd_kernel, grid, *tensors, *strides, *problem.scalars, **problem.constants, **config.launch)
        return out
    if problem.walks:
        walk = problem.walk_of("fwd")
        tensors = (*_alike(q, k, v), *tensors[3:])
        strides = map_strides(tensors[0], out)
        bias = problem.mask(tensors[3], walk.rows(problem.tokens), walk.columns(problem.tokens))
        for walkers, constants in problem.walk("fwd"):
            launch(
                _window_fwd_walking_kernel, (walkers * problem.heads * constants["N_OWN"],), *tensors[:3], bias,
                *tensors[4:], *strides, *problem.scalars, **constants,
            )  # fmt: skip
        return out
    for grid, blocks in problem.launches():
        launch(
            _window_fwd_tiled_kernel, grid, *tensors, *strides, *problem.tiled_scalars, **problem.constants, **blocks,
            **CONFIGS["fwd_tiled"].launch,
        )  # fmt: skip
    return out


def window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    bias: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    roll_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused backward: fills `d_q`, `d_k`, `d_v`; returns the gradients of bias and padding (empty if absent)."""
    grad, q, k, v = unit_stride(grad, q, k, v)
    if q.numel() == 0:
        return zeros_or_empty(grad, bias), zeros_or_empty(grad, pad_k), zeros_or_empty(grad, pad_v)
    problem = _Problem(q, bias, pad_k, window, shift, scale, roll_first)
    inputs = (grad, q, k, v, problem.laid_out(bias), contiguous(pad_k), contiguous(pad_v))
    run = _backward_single_tile if problem.single_tile else _backward_walking if problem.walks else _backward_tiled
    bias_slots, pad_slots = run(problem, inputs, (d_q, d_k, d_v))
    d_bias = empty_gradient(grad) if bias is None else bias_slots.sum(0).to(bias.dtype)
    if pad_k is None or pad_v is None or not problem.has_pad:
        return d_bias, zeros_or_empty(grad, pad_k), zeros_or_empty(grad, pad_v)
    d_pad = pad_slots.sum(0)  # (heads, 2, D)
    return d_bias, d_pad[:, 0].to(pad_k.dtype).contiguous(), d_pad[:, 1].to(pad_v.dtype).contiguous()


def _backward_single_tile(
    problem: _Problem, inputs: tuple[Any, ...], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the one-tile kernel; returns (slots, heads, T, T) and (slots, heads, 2, D) of partial sums."""
    config = problem.config("bwd")
    walkers = problem.walkers(config.programs)
    bias_slots, pad_slots = _slots(problem, inputs, walkers, walkers)
    launch(
        _window_bwd_kernel, (walkers * problem.heads,), *inputs, *gradients, bias_slots, pad_slots,
        *map_strides(*inputs[:4], *gradients), *problem.scalars, **problem.constants, **config.launch,
    )  # fmt: skip
    return bias_slots, pad_slots


def _backward_walking(
    problem: _Problem, inputs: tuple[Any, ...], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the kernels for windows of a few tiles; returns partial sums like `_backward_single_tile`."""
    d_q, d_k, d_v = gradients
    tokens, heads = problem.tokens, problem.heads
    dq, dkdv = problem.walk_of("bwd_dq"), problem.walk_of("bwd_dkdv")
    inputs = (inputs[0], *_alike(*inputs[1:4]), *inputs[4:])
    strides = map_strides(*inputs[:2])
    n_stats = dkdv.columns(tokens)
    assert dq.rows(tokens) >= n_stats
    stats = torch.empty((problem.n_windows * heads, 2, n_stats), dtype=torch.float32, device=inputs[0].device)
    bias = problem.mask(inputs[4], dq.rows(tokens), dq.columns(tokens))
    for walkers, constants in problem.walk("bwd_dq"):
        launch(
            _window_bwd_dq_walking_kernel, (walkers * heads * constants["N_OWN"],), *inputs[:4], bias, *inputs[5:],
            d_q, stats, *strides, *map_strides(d_q), *problem.scalars, **constants, N_STATS=n_stats,
        )  # fmt: skip
    bias = problem.mask(inputs[4], dkdv.rows(tokens), n_stats, keys_first=True)
    sums: list[tuple[Tensor, Tensor]] = []
    for walkers, constants in problem.walk("bwd_dkdv"):
        keys = min(constants["N_OWN"] * constants["OWN"], tokens - constants["FIRST"])
        bias_slots, pad_slots = _slots(problem, inputs, walkers, walkers * constants["N_OWN"], keys)
        sums.append((bias_slots, pad_slots))
        launch(
            _window_bwd_dkdv_walking_kernel, (walkers * heads * constants["N_OWN"],), *inputs[:4], bias, *inputs[5:],
            d_k, d_v, bias_slots, pad_slots, stats, *strides, *map_strides(d_k), *problem.scalars, **constants,
            N_STATS=n_stats,
        )  # fmt: skip
    if len(sums) == 1:
        return sums[0]
    bias_sums = torch.cat([bias_slots.sum(0, keepdim=True) for bias_slots, _ in sums], -1)
    return bias_sums, torch.cat([pad_slots for _, pad_slots in sums])


def _backward_tiled(
    problem: _Problem, inputs: tuple[Any, ...], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the kernels for windows of several tiles; returns partial sums like `_backward_single_tile`."""
    tiles = problem.n_blocks**2 * problem.heads
    splits = min(problem.n_windows, max(1, CONFIGS["bwd_dbias"].programs * problem.multiprocessors // tiles))
    bias_slots, pad_slots = _slots(problem, inputs, splits, problem.n_windows * problem.n_blocks)
    rows = (problem.n_windows * problem.heads, 2, problem.constants["WHOLE"] + problem.constants["REST"])
    stats = torch.empty(rows, dtype=torch.float32, device=inputs[0].device)
    d_q, d_k, d_v = gradients
    strides = map_strides(*inputs[:4])
    for grid, blocks in problem.launches():
        launch(
            _window_bwd_dq_kernel, grid, *inputs, d_q, stats, *strides, *map_strides(d_q), *problem.tiled_scalars,
            **problem.constants, **blocks, **CONFIGS["bwd_dq"].launch,
        )  # fmt: skip
    for grid, blocks in problem.launches():
        launch(
            _window_bwd_dkdv_kernel, grid, *inputs, d_k, d_v, pad_slots, stats, *strides, *map_strides(d_k, d_v),
            *problem.tiled_scalars, **problem.constants, **blocks, **CONFIGS["bwd_dkdv"].launch,
        )  # fmt: skip
    if problem.constants["HAS_BIAS"]:
        launch(
            _window_bwd_dbias_kernel, (splits * tiles,), *inputs, bias_slots, stats, *strides, *problem.scalars,
            **problem.constants, **CONFIGS["bwd_dbias"].launch,
        )  # fmt: skip
    return bias_slots, pad_slots


def _slots(problem: _Problem, inputs: tuple[Any, ...], n_bias: int, n_pad: int, keys: int | None = None) -> tuple[Tensor, Tensor]:
    """Uninitialised partial sums over windows: bias (n_bias, heads, T, T) and padding (n_pad, heads, 2, D)."""
    n_bias = n_bias if problem.constants["HAS_BIAS"] else 0
    n_pad = n_pad if problem.has_pad else 0
    options = {"dtype": torch.float32, "device": inputs[0].device}
    return (
        torch.empty((n_bias, problem.heads, problem.tokens, keys or problem.tokens), **options),
        torch.empty((n_pad, problem.heads, 2, problem.head_dim), **options),
    )
