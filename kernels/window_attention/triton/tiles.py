"""What kernels of several tilings do with a tile."""

from __future__ import annotations

import math

import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def masked_logits(
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


@triton.jit
def store_pad_gradients(d_pad_ptr, slot, d_pad_k, d_pad_v, HEAD_DIM: tl.constexpr):
    """Writes one program's sums over padded positions to its slot of (slots, 2, HEAD_DIM)."""
    at = slot * 2 * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(d_pad_ptr + at, d_pad_k)
    tl.store(d_pad_ptr + at + HEAD_DIM, d_pad_v)
