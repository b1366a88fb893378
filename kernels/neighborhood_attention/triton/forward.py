"""The forward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from vitrail.kernels._common.triton import online_softmax
from vitrail.kernels.neighborhood_attention.triton.index import locate
from vitrail.kernels.neighborhood_attention.triton.tiles import (
    LOG2E,
    extra_tile,
    first_softmax,
    key_spans,
    key_tile,
    load_queries,
    n_steps,
    store_own,
)

SIZES = ["length_z", "length_y", "length_x", "tiles_z", "tiles_y", "tiles_x", "n_heads"]


@triton.jit(do_not_specialize=[*SIZES, "n_extra"])
def neighborhood_fwd_kernel(
    q_ptr, k_ptr, v_ptr, rpb_ptr, extra_k_ptr, extra_v_ptr, pad_k_ptr, pad_v_ptr, out_ptr,
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides, out_strides,
    dilations, groups, length_z, length_y, length_x, tiles_z, tiles_y, tiles_x, n_heads, n_extra, scale,
    AXES: tl.constexpr, SIGN: tl.constexpr, HAS_RPB: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_PAD: tl.constexpr,
    SINGLE: tl.constexpr, ONE_COLUMN: tl.constexpr, QUERY_H: tl.constexpr, QUERY_W: tl.constexpr,
    KEY_H: tl.constexpr, KEY_W: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: one head, one tile of queries, over the box of keys that they see."""
    head = tl.program_id(0) % n_heads
    image, axes = locate(
        tl.program_id(0) // n_heads, (length_z, length_y, length_x), dilations, groups, (tiles_z, tiles_y, tiles_x),
        AXES, HAS_PAD, QUERY_H, QUERY_W,
    )  # fmt: skip
    spans = key_spans(axes, AXES, QUERY_H, QUERY_W)
    q = load_queries(q_ptr, image, head, axes, dilations, q_strides, SIGN, QUERY_H, QUERY_W, HEAD_DIM, OFFSET)
    if SINGLE:
        _k, v, logits = key_tile(
            0, q, spans, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, image, head, axes, dilations, k_strides,
            v_strides, scale, AXES, HAS_RPB, HAS_PAD, ONE_COLUMN, QUERY_H, QUERY_W, KEY_H, KEY_W, HEAD_DIM, OFFSET,
        )  # fmt: skip
        weights, maximum, total = first_softmax(logits, scale)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    else:
        maximum = tl.full((QUERY_H * QUERY_W,), float("-inf"), tl.float32)
        total = tl.zeros((QUERY_H * QUERY_W,), tl.float32)
        out = tl.zeros((QUERY_H * QUERY_W, HEAD_DIM), tl.float32)
        for step in range(n_steps(spans, AXES, ONE_COLUMN, KEY_H, KEY_W)):
            _k, v, logits = key_tile(
                step, q, spans, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, image, head, axes, dilations, k_strides,
                v_strides, scale, AXES, HAS_RPB, HAS_PAD, ONE_COLUMN, QUERY_H, QUERY_W, KEY_H, KEY_W, HEAD_DIM, OFFSET,
            )  # fmt: skip
            weights, decay, maximum, total = online_softmax(logits, maximum, total, scale * LOG2E)
            out = tl.dot(weights.to(v.dtype), v, acc=out * decay[:, None], input_precision="ieee")
    if HAS_EXTRA:
        for start in range(0, n_extra, KEY_H * KEY_W):
            _k, v, logits = extra_tile(
                start, q, extra_k_ptr, extra_v_ptr, image, head, n_extra, extra_k_strides, extra_v_strides,
                KEY_H * KEY_W, HEAD_DIM,
            )  # fmt: skip
            weights, decay, maximum, total = online_softmax(logits, maximum, total, scale * LOG2E)
            out = tl.dot(weights.to(v.dtype), v, acc=out * decay[:, None], input_precision="ieee")
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    store_own(out_ptr, out, image, head, axes, dilations, out_strides, QUERY_H, QUERY_W, HEAD_DIM, OFFSET)
