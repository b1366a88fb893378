"""Kernels for large windows: blocks of queries and keys, with an online softmax."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vitrail.kernels._common.triton import (
    finite,
    load_kv,
    load_statistics,
    online_softmax,
    softmax_statistics,
    statistics_of,
    store_statistics,
)
from vitrail.kernels.window_attention.triton.index import locate, offsets
from vitrail.kernels.window_attention.triton.tiles import masked_logits, store_pad_gradients

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_padded_bias(ptr, head, q_tokens, k_tokens, ROWS: tl.constexpr):
    """Like `_load_bias`, of a bias padded to (heads, ROWS, ROWS): no masks, and wide loads."""
    at = (head * ROWS + q_tokens[:, None]) * ROWS + k_tokens[None, :]
    return tl.load(ptr + at).to(tl.float32) * _LOG2E


@triton.jit
def _own_block(
    n_heads, height, width,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """The tokens that a program works for: (head, window, block, tokens, where they are).

    A launch has blocks of `OWN` tokens, `N_OWN` a window, from token `FIRST` on.
    """
    head = (tl.program_id(0) // N_OWN) % n_heads
    window = tl.program_id(0) // (N_OWN * n_heads)
    block = FIRST // BLOCK + tl.program_id(0) % N_OWN
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
    logits = masked_logits(
        q, k, b_bias, scale, q_real, real, q_region, region, tokens < WINDOW_H * WINDOW_W,
        HAS_BIAS, SHIFT_Y + SHIFT_X > 0, HIDES_PADS, not HAS_BIAS,
    )  # fmt: skip
    return k, v, logits


@triton.jit
def _fwd_step(v, logits, maximum, total, out):
    """Online softmax over one more block of keys."""
    weights, decay, maximum, total = online_softmax(logits, maximum, total, 1.0)
    out = tl.dot(weights.to(v.dtype), v, acc=out * decay[:, None], input_precision="ieee")
    return maximum, total, out


@triton.jit(do_not_specialize=["height", "width"])
def _window_fwd_tiled_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, out_ptr,
    q_strides, k_strides, v_strides, out_strides, height, width, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """One program: one block of queries of one window and head, over all blocks of keys."""
    head, window, _block, q_tokens, batch, y, x, real, region = _own_block(
        n_heads, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, BLOCK, FIRST, OWN, N_OWN
    )
    q = tl.load(q_ptr + offsets(batch, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    out = tl.zeros((OWN, HEAD_DIM), tl.float32)
    for start in range(0, WHOLE, BLOCK):
        _k, v, logits = _key_tile(
            start, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, BLOCK, HEAD_DIM,
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
    weights, decay, maximum, total = online_softmax(logits, maximum, total, 1.0)
    correction = correction * decay + tl.sum(weights * d_weights, 1)
    return maximum, total, correction


@triton.jit
def _dq_step(grad, k, v, logits, shift, correction, scale, d_q):
    """One more block of keys in the queries' gradient, still without the factor of the softmax."""
    d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    weights = tl.exp2(logits - shift[:, None])
    d_scores = weights * (d_weights - correction[:, None]) * scale
    return tl.dot(d_scores.to(k.dtype), k, acc=d_q, input_precision="ieee")


@triton.jit(do_not_specialize=["height", "width"])
def _window_bwd_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, d_q_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, height, width, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """One program: gradient of one block of queries; leaves the rows' statistics for the other backward kernels.

    The first pass over the keys finds each row's softmax statistics, the second its gradient.
    """
    head, window, _block, q_tokens, batch, y, x, real, region = _own_block(
        n_heads, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, BLOCK, FIRST, OWN, N_OWN
    )
    q = tl.load(q_ptr + offsets(batch, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    grad = tl.load(grad_ptr + offsets(batch, y, x, head, grad_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    correction = tl.zeros((OWN,), tl.float32)
    for start in range(0, WHOLE, BLOCK):
        _k, v, logits = _key_tile(
            start, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, BLOCK, HEAD_DIM,
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
    correction = correction / total
    shift, factor = softmax_statistics(finite(maximum), total, q.dtype)
    if REST:
        d_q = _dq_step(grad, rest_k, rest_v, rest_logits, shift, correction, scale, d_q)
    for start in range(0, WHOLE, BLOCK):
        k, v, logits = _key_tile(
            start, q, q_tokens, real, region, window, head, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr,
            k_strides, v_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HAS_PAD, HIDES_PADS, WHOLE + REST, BLOCK, HEAD_DIM,
        )  # fmt: skip
        d_q = _dq_step(grad, k, v, logits, shift, correction, scale, d_q)
    at = offsets(batch, y, x, head, d_q_strides, HEAD_DIM)
    tl.store(d_q_ptr + at, (d_q * factor[:, None]).to(q.dtype), mask=real[:, None])
    stats = statistics_of(stats_ptr, window * n_heads + head, WHOLE + REST, q.dtype) + q_tokens
    store_statistics(stats, WHOLE + REST, shift, factor, correction, None, q.dtype)


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
    shift, factor, correction = load_statistics(stats + q_tokens, ROWS, None, q.dtype)
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = _load_padded_bias(bias_ptr, head, q_tokens, tokens, ROWS)
    logits = masked_logits(
        q, k, b_bias, scale, q_real, real, q_region, region, tokens < WINDOW_H * WINDOW_W,
        HAS_BIAS, SHIFT_Y + SHIFT_X > 0, HIDES_PADS, not HAS_BIAS,
    )  # fmt: skip
    weights = tl.exp2(logits - shift[:, None]) * factor[:, None]
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
    WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr,
):  # fmt: skip
    """One program: gradients of one block of keys and values, over all blocks of queries."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    N_BLOCKS: tl.constexpr = (WHOLE + REST + BLOCK - 1) // BLOCK
    head, window, block, tokens, batch, y, x, real, region = _own_block(
        n_heads, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, BLOCK, FIRST, OWN, N_OWN
    )
    k = load_kv(k_ptr, pad_k_ptr, offsets(batch, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    v = load_kv(v_ptr, pad_v_ptr, offsets(batch, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    stats = statistics_of(stats_ptr, window * n_heads + head, WHOLE + REST, q_ptr.dtype.element_ty)
    d_k = tl.zeros((OWN, HEAD_DIM), tl.float32)
    d_v = tl.zeros((OWN, HEAD_DIM), tl.float32)
    for start in range(0, WHOLE, BLOCK):
        d_k, d_v = _dkdv_step(
            start, tokens, real, region, k, v, d_k, d_v, window, head, grad_ptr, q_ptr, bias_ptr, stats,
            grad_strides, q_strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
            HAS_BIAS, HIDES_PADS, WHOLE + REST, BLOCK, HEAD_DIM,
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
        store_pad_gradients(d_pad_ptr, slot.to(tl.int64), d_pad_k, d_pad_v, HEAD_DIM)


@triton.jit(do_not_specialize=["height", "width", "n_windows"])
def _window_bwd_dbias_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, pad_k_ptr, pad_v_ptr, d_bias_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, height, width, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, HIDES_PADS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one head's bias gradient, summed over every `step`-th window."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    N_BLOCKS: tl.constexpr = (N_TOKENS + BLOCK - 1) // BLOCK
    ROWS: tl.constexpr = WHOLE + REST
    SHIFTED: tl.constexpr = SHIFT_Y + SHIFT_X > 0
    tile = tl.program_id(0) % (N_BLOCKS * N_BLOCKS)
    head = (tl.program_id(0) // (N_BLOCKS * N_BLOCKS)) % n_heads
    split = tl.program_id(0) // (N_BLOCKS * N_BLOCKS * n_heads)
    step = tl.num_programs(0) // (N_BLOCKS * N_BLOCKS * n_heads)
    q_tokens = (tile // N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    tokens = (tile % N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = (q_tokens[:, None] < ROWS) & (tokens[None, :] < ROWS)
    bias_offsets = (head * ROWS + q_tokens[:, None]) * ROWS + tokens[None, :]
    b_bias = tl.load(bias_ptr + bias_offsets, mask=inside, other=float("-inf")).to(tl.float32) * _LOG2E
    d_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
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
        logits = masked_logits(
            q, k, b_bias, scale, q_real, real, q_region, region, tokens < N_TOKENS, HAS_BIAS, SHIFTED, HIDES_PADS, False
        )
        stats = statistics_of(stats_ptr, window * n_heads + head, ROWS, q.dtype) + q_tokens
        shift, factor, correction = load_statistics(stats, ROWS, q_tokens < ROWS, q.dtype)
        weights = tl.exp2(logits - shift[:, None]) * factor[:, None]
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_bias += weights * (d_weights - correction[:, None])
    at = ((split * n_heads + head) * N_TOKENS + q_tokens[:, None]) * N_TOKENS + tokens[None, :]
    tl.store(d_bias_ptr + at, d_bias, mask=(q_tokens[:, None] < N_TOKENS) & (tokens[None, :] < N_TOKENS))
