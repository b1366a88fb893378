"""Kernels for windows of one tile: programs keep one head's bias, and walk over the windows."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vitrail.kernels._common.triton import finite, load_kv
from vitrail.kernels.window_attention.triton.index import locate, offsets
from vitrail.kernels.window_attention.triton.tiles import masked_logits, store_pad_gradients

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_bias(ptr, head, q_tokens, k_tokens, N_TOKENS: tl.constexpr):
    """Bias tile of one head, in units of log2."""
    at = (head * N_TOKENS + q_tokens[:, None]) * N_TOKENS + k_tokens[None, :]
    inside = (q_tokens[:, None] < N_TOKENS) & (k_tokens[None, :] < N_TOKENS)
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32) * _LOG2E


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
        logits = masked_logits(
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
        logits = masked_logits(
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
        store_pad_gradients(d_pad_ptr, tl.program_id(0), d_pad_k, d_pad_v, HEAD_DIM)
