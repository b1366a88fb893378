"""The backward kernels: of the queries, of keys and values, of additional keys, of the bias. No atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from vitrail.kernels._common.triton import (
    finite,
    load_statistics,
    online_softmax,
    softmax_statistics,
    statistics_of,
    store_statistics,
)
from vitrail.kernels.neighborhood_attention.triton.forward import SIZES
from vitrail.kernels.neighborhood_attention.triton.index import locate, tile_places
from vitrail.kernels.neighborhood_attention.triton.tiles import (
    LOG2E,
    extra_tile,
    first_softmax,
    have_tokens,
    key_spans,
    key_tile,
    load_extra,
    load_keys,
    load_queries,
    load_tile,
    logits_by_key,
    logits_by_query,
    n_steps,
    nearest,
    own_places,
    query_spans,
    real_spans,
    signed,
    step_places,
    store_own,
    token_numbers,
)


@triton.jit
def _load_own_queries(
    grad_ptr, q_ptr, grad_strides, q_strides, head, n_heads, lengths, dilations, groups, tiles,
    AXES: tl.constexpr, SIGN: tl.constexpr, HAS_PAD: tl.constexpr, QUERY_H: tl.constexpr, QUERY_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A program's tile of queries: (image, axes, spans of its keys, output's gradient, signed queries)."""
    slot = tl.program_id(0) // n_heads
    image, axes = locate(slot, lengths, dilations, groups, tiles, AXES, HAS_PAD, QUERY_H, QUERY_W)
    spans = key_spans(axes, AXES, QUERY_H, QUERY_W)
    q = load_queries(q_ptr, image, head, axes, dilations, q_strides, SIGN, QUERY_H, QUERY_W, HEAD_DIM, OFFSET)
    grad = load_queries(grad_ptr, image, head, axes, dilations, grad_strides, 1, QUERY_H, QUERY_W, HEAD_DIM, OFFSET)
    return image, axes, spans, grad, q


@triton.jit
def _add_correction(weights, decay, correction, grad, v):
    """Adds a tile's sum_j P_ij dP_ij to what earlier tiles have left."""
    d_weights = tl.dot(grad, tl.trans(v.to(grad.dtype)), input_precision="ieee")
    return correction * decay + tl.sum(weights * d_weights, 1)


@triton.jit
def _walk_for_statistics(
    q, grad, spans, k_ptr, v_ptr, rpb_ptr, extra_k_ptr, extra_v_ptr, pad_k_ptr, pad_v_ptr, image, head, axes, dilations,
    k_strides, v_strides, extra_k_strides, extra_v_strides, n_extra, scale,
    AXES: tl.constexpr, HAS_RPB: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_PAD: tl.constexpr, ONE_COLUMN: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """(maximum, total, correction) of each row's softmax over all of its keys; in float64 if the queries are."""
    dtype: tl.constexpr = tl.float64 if q.dtype == tl.float64 else tl.float32
    maximum = tl.full((QUERY_H * QUERY_W,), float("-inf"), dtype)
    total = tl.zeros((QUERY_H * QUERY_W,), dtype)
    correction = tl.zeros((QUERY_H * QUERY_W,), dtype)
    for step in range(n_steps(spans, AXES, ONE_COLUMN, KEY_H, KEY_W)):
        _k, v, logits = key_tile(
            step, q, spans, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, image, head, axes, dilations, k_strides,
            v_strides, scale, AXES, HAS_RPB, HAS_PAD, ONE_COLUMN, QUERY_H, QUERY_W, KEY_H, KEY_W, HEAD_DIM, OFFSET,
        )  # fmt: skip
        weights, decay, maximum, total = online_softmax(logits, maximum, total, scale * LOG2E)
        correction = _add_correction(weights, decay, correction, grad, v)
    if HAS_EXTRA:
        for start in range(0, n_extra, KEY_H * KEY_W):
            _k, v, logits = extra_tile(
                start, q, extra_k_ptr, extra_v_ptr, image, head, n_extra, extra_k_strides, extra_v_strides,
                KEY_H * KEY_W, HEAD_DIM,
            )  # fmt: skip
            weights, decay, maximum, total = online_softmax(logits, maximum, total, scale * LOG2E)
            correction = _add_correction(weights, decay, correction, grad, v)
    total = tl.where(total == 0.0, 1.0, total)
    return finite(maximum), total, correction / total


@triton.jit
def _add_d_q(d_q, logits, shift, correction, grad, k, v, scale):
    """Adds a tile's part of the queries' gradient, still without scale and factor of the softmax."""
    weights = tl.exp2(logits * (scale * LOG2E) - shift[:, None])
    d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    d_logits = weights * (d_weights - correction[:, None])
    return tl.dot(d_logits.to(k.dtype), k, acc=d_q, input_precision="ieee")


@triton.jit
def _store_statistics(
    stats_ptr, shift, factor, correction, row, axes, lengths, dilations,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Leaves the statistics of the own tile of queries; `row` counts images and heads, `dtype` is the queries'."""
    query_row, query_column = tile_places(QUERY_H, QUERY_W)
    places = own_places(axes)
    numbers = token_numbers(places, axes, places[0], query_row, query_column, lengths, dilations)
    n_tokens = lengths[0].to(tl.int64) * lengths[1] * lengths[2]
    stats = statistics_of(stats_ptr, row, n_tokens, dtype) + numbers
    real = have_tokens(places, axes, QUERY_H, QUERY_W)
    store_statistics(stats, n_tokens, shift, factor, correction, real, dtype)


@triton.jit(do_not_specialize=[*SIZES, "n_extra"])
def neighborhood_bwd_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, rpb_ptr, extra_k_ptr, extra_v_ptr, pad_k_ptr, pad_v_ptr, d_q_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides, d_q_strides,
    dilations, groups, length_z, length_y, length_x, tiles_z, tiles_y, tiles_x, n_heads, n_extra, scale,
    AXES: tl.constexpr, SIGN: tl.constexpr, HAS_RPB: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_PAD: tl.constexpr,
    SINGLE: tl.constexpr, ONE_COLUMN: tl.constexpr, QUERY_H: tl.constexpr, QUERY_W: tl.constexpr,
    KEY_H: tl.constexpr, KEY_W: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: gradient of one tile of queries of one head; leaves the rows' statistics for the other kernels.

    Of several tiles of keys, a first walk finds each row's softmax statistics, a second its gradient.
    """
    head = tl.program_id(0) % n_heads
    lengths = (length_z, length_y, length_x)
    image, axes, spans, grad, q = _load_own_queries(
        grad_ptr, q_ptr, grad_strides, q_strides, head, n_heads, lengths, dilations, groups,
        (tiles_z, tiles_y, tiles_x), AXES, SIGN, HAS_PAD, QUERY_H, QUERY_W, HEAD_DIM, OFFSET,
    )  # fmt: skip
    if SINGLE:
        k, v, logits = key_tile(
            0, q, spans, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, image, head, axes, dilations, k_strides,
            v_strides, scale, AXES, HAS_RPB, HAS_PAD, ONE_COLUMN, QUERY_H, QUERY_W, KEY_H, KEY_W, HEAD_DIM, OFFSET,
        )  # fmt: skip
        weights, maximum, total = first_softmax(logits, scale)
        total = tl.where(total == 0.0, 1.0, total)
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        correction = tl.sum(weights * d_weights, 1) / total
        d_logits = weights * (d_weights - correction[:, None])
        d_q = tl.dot(d_logits.to(k.dtype), k, input_precision="ieee") / total[:, None]
        shift, factor = softmax_statistics(finite(maximum), total, q.dtype)
    else:
        maximum, total, correction = _walk_for_statistics(
            q, grad, spans, k_ptr, v_ptr, rpb_ptr, extra_k_ptr, extra_v_ptr, pad_k_ptr, pad_v_ptr, image, head, axes,
            dilations, k_strides, v_strides, extra_k_strides, extra_v_strides, n_extra, scale,
            AXES, HAS_RPB, HAS_EXTRA, HAS_PAD, ONE_COLUMN, QUERY_H, QUERY_W, KEY_H, KEY_W, HEAD_DIM, OFFSET,
        )  # fmt: skip
        shift, factor = softmax_statistics(maximum, total, q.dtype)
        d_q = tl.zeros((QUERY_H * QUERY_W, HEAD_DIM), tl.float32)
        for step in range(n_steps(spans, AXES, ONE_COLUMN, KEY_H, KEY_W)):
            k, v, logits = key_tile(
                step, q, spans, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, image, head, axes, dilations, k_strides,
                v_strides, scale, AXES, HAS_RPB, HAS_PAD, ONE_COLUMN, QUERY_H, QUERY_W, KEY_H, KEY_W, HEAD_DIM, OFFSET,
            )  # fmt: skip
            d_q = _add_d_q(d_q, logits, shift, correction, grad, k, v, scale)
        if HAS_EXTRA:
            for start in range(0, n_extra, KEY_H * KEY_W):
                k, v, logits = extra_tile(
                    start, q, extra_k_ptr, extra_v_ptr, image, head, n_extra, extra_k_strides, extra_v_strides,
                    KEY_H * KEY_W, HEAD_DIM,
                )  # fmt: skip
                d_q = _add_d_q(d_q, logits, shift, correction, grad, k, v, scale)
        d_q *= factor[:, None]
    store_own(
        d_q_ptr, d_q * (scale * SIGN), image, head, axes, dilations, d_q_strides, QUERY_H, QUERY_W, HEAD_DIM, OFFSET
    )  # fmt: skip
    row = image * n_heads + head
    _store_statistics(
        stats_ptr, shift, factor, correction, row, axes, lengths, dilations, QUERY_H, QUERY_W, q.dtype
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "n_extra"])
def neighborhood_bwd_exact_stats_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, rpb_ptr, extra_k_ptr, extra_v_ptr, pad_k_ptr, pad_v_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides,
    dilations, groups, length_z, length_y, length_x, tiles_z, tiles_y, tiles_x, n_heads, n_extra, scale,
    AXES: tl.constexpr, SIGN: tl.constexpr, HAS_RPB: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_PAD: tl.constexpr,
    ONE_COLUMN: tl.constexpr, QUERY_H: tl.constexpr, QUERY_W: tl.constexpr,
    KEY_H: tl.constexpr, KEY_W: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: statistics of one tile of float32 queries of one head, from products in float64.

    The bias' gradient takes its own logits in float64. Weights of which the statistics know otherwise rounded logits
    do not sum to one, nor do their gradients to zero, which is worse than rounding all alike.
    """
    head = tl.program_id(0) % n_heads
    lengths = (length_z, length_y, length_x)
    image, axes, spans, grad, q = _load_own_queries(
        grad_ptr, q_ptr, grad_strides, q_strides, head, n_heads, lengths, dilations, groups,
        (tiles_z, tiles_y, tiles_x), AXES, SIGN, HAS_PAD, QUERY_H, QUERY_W, HEAD_DIM, OFFSET,
    )  # fmt: skip
    maximum, total, correction = _walk_for_statistics(
        q.to(tl.float64), grad.to(tl.float64), spans, k_ptr, v_ptr, rpb_ptr, extra_k_ptr, extra_v_ptr, pad_k_ptr,
        pad_v_ptr, image, head, axes, dilations, k_strides, v_strides, extra_k_strides, extra_v_strides, n_extra, scale,
        AXES, HAS_RPB, HAS_EXTRA, HAS_PAD, ONE_COLUMN, QUERY_H, QUERY_W, KEY_H, KEY_W, HEAD_DIM, OFFSET,
    )  # fmt: skip
    row = image * n_heads + head
    _store_statistics(
        stats_ptr, maximum, 1.0 / total, correction, row, axes, lengths, dilations, QUERY_H, QUERY_W, q.dtype
    )  # fmt: skip


@triton.jit
def _load_queries_at(
    grad_ptr, q_ptr, stats_ptr, image, head, axes, places, spans, lengths, dilations, grad_strides, q_strides, n_heads,
    SIGN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A tile of queries: (output's gradient, signed queries, shift, factor, correction of the softmax)."""
    q = load_tile(q_ptr, image, head, axes, places, spans, dilations, q_strides, HEIGHT, WIDTH, HEAD_DIM, OFFSET)
    grad = load_tile(
        grad_ptr, image, head, axes, places, spans, dilations, grad_strides, HEIGHT, WIDTH, HEAD_DIM, OFFSET
    )  # fmt: skip
    plane, row, column = nearest(places, axes, spans, HEIGHT, WIDTH)
    n_tokens = lengths[0].to(tl.int64) * lengths[1] * lengths[2]
    stats = statistics_of(stats_ptr, image * n_heads + head, n_tokens, q.dtype)
    stats += token_numbers(places, axes, plane, row, column, lengths, dilations)
    shift, factor, correction = load_statistics(stats, n_tokens, None, q.dtype)
    return grad, signed(q, SIGN), shift, factor, correction


@triton.jit(do_not_specialize=SIZES)
def neighborhood_bwd_dkdv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, stats_ptr, d_k_ptr, d_v_ptr, d_pad_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_k_strides, d_v_strides,
    dilations, groups, length_z, length_y, length_x, tiles_z, tiles_y, tiles_x, n_heads, scale,
    AXES: tl.constexpr, SIGN: tl.constexpr, HAS_RPB: tl.constexpr, HAS_PAD: tl.constexpr, ONE_COLUMN: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: gradients of one tile of keys and values of one head, over the box of queries that see them."""
    head = tl.program_id(0) % n_heads
    lengths = (length_z, length_y, length_x)
    image, axes = locate(
        tl.program_id(0) // n_heads, lengths, dilations, groups, (tiles_z, tiles_y, tiles_x),
        AXES, HAS_PAD, KEY_H, KEY_W,
    )  # fmt: skip
    own = own_places(axes)
    everything = real_spans(axes)
    k = load_keys(
        k_ptr, pad_k_ptr, image, head, axes, own, everything, dilations, k_strides,
        HAS_PAD, KEY_H, KEY_W, HEAD_DIM, OFFSET,
    )  # fmt: skip
    v = load_keys(
        v_ptr, pad_v_ptr, image, head, axes, own, everything, dilations, v_strides,
        HAS_PAD, KEY_H, KEY_W, HEAD_DIM, OFFSET,
    )  # fmt: skip
    spans = query_spans(axes, AXES, KEY_H, KEY_W)
    d_k = tl.zeros((KEY_H * KEY_W, HEAD_DIM), tl.float32)
    d_v = tl.zeros((KEY_H * KEY_W, HEAD_DIM), tl.float32)
    for step in range(n_steps(spans, AXES, ONE_COLUMN, QUERY_H, QUERY_W)):
        places = step_places(step, spans, AXES, ONE_COLUMN, QUERY_H, QUERY_W)
        grad, q, shift, factor, correction = _load_queries_at(
            grad_ptr, q_ptr, stats_ptr, image, head, axes, places, spans, lengths, dilations, grad_strides, q_strides,
            n_heads, SIGN, QUERY_H, QUERY_W, HEAD_DIM, OFFSET,
        )  # fmt: skip
        logits = logits_by_key(
            q, k, places, axes, rpb_ptr, head, scale, AXES, HAS_RPB, QUERY_H, QUERY_W, KEY_H, KEY_W
        )  # fmt: skip
        weights = tl.exp2(logits * (scale * LOG2E) - shift[None, :]) * factor[None, :]
        d_v = tl.dot(weights.to(grad.dtype), grad, acc=d_v, input_precision="ieee")
        d_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        d_logits = weights * (d_weights - correction[None, :])
        d_k = tl.dot(d_logits.to(q.dtype), q, acc=d_k, input_precision="ieee")
    d_k *= scale
    store_own(d_k_ptr, d_k, image, head, axes, dilations, d_k_strides, KEY_H, KEY_W, HEAD_DIM, OFFSET)
    store_own(d_v_ptr, d_v, image, head, axes, dilations, d_v_strides, KEY_H, KEY_W, HEAD_DIM, OFFSET)
    if HAS_PAD:
        # Places behind the padded length have a gradient of zero: no query sees them.
        is_pad = (have_tokens(own, axes, KEY_H, KEY_W) == 0)[:, None]
        slot = d_pad_ptr + tl.program_id(0).to(tl.int64) * (2 * HEAD_DIM) + tl.arange(0, HEAD_DIM)
        tl.store(slot, tl.sum(tl.where(is_pad, d_k, 0.0), 0))
        tl.store(slot + HEAD_DIM, tl.sum(tl.where(is_pad, d_v, 0.0), 0))


@triton.jit(do_not_specialize=[*SIZES, "n_extra", "n_slots", "n_splits"])
def neighborhood_bwd_dextra_kernel(
    grad_ptr, q_ptr, extra_k_ptr, extra_v_ptr, stats_ptr, d_extra_ptr,
    grad_strides, q_strides, extra_k_strides, extra_v_strides,
    dilations, groups, length_z, length_y, length_x, tiles_z, tiles_y, tiles_x, n_heads, n_extra, n_slots, n_splits,
    scale,
    AXES: tl.constexpr, SIGN: tl.constexpr, QUERY_H: tl.constexpr, QUERY_W: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: gradients of a block of additional keys and values, over every `n_splits`-th tile of queries.

    `n_slots` counts the tiles of queries of an image; the sums are (n_splits, B, blocks, heads, 2, BLOCK, HEAD_DIM).
    """
    lengths = (length_z, length_y, length_x)
    head = tl.program_id(0) % n_heads
    blocks = tl.cdiv(n_extra, BLOCK)
    block = tl.program_id(0) // n_heads % blocks
    rest = tl.program_id(0) // (n_heads * blocks)
    images = tl.num_programs(0) // (n_heads * blocks * n_splits)
    own_image = rest % images
    k = load_extra(extra_k_ptr, block * BLOCK, own_image, head, n_extra, extra_k_strides, BLOCK, HEAD_DIM)
    v = load_extra(extra_v_ptr, block * BLOCK, own_image, head, n_extra, extra_v_strides, BLOCK, HEAD_DIM)
    k = k.to(q_ptr.dtype.element_ty)
    v = v.to(q_ptr.dtype.element_ty)
    d_k = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    d_v = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for tile in range(rest // images, n_slots, n_splits):
        image, axes = locate(
            own_image * n_slots + tile, lengths, dilations, groups, (tiles_z, tiles_y, tiles_x),
            AXES, False, QUERY_H, QUERY_W,
        )  # fmt: skip
        places = own_places(axes)
        grad, q, shift, factor, correction = _load_queries_at(
            grad_ptr, q_ptr, stats_ptr, image, head, axes, places, real_spans(axes), lengths, dilations,
            grad_strides, q_strides, n_heads, SIGN, QUERY_H, QUERY_W, HEAD_DIM, OFFSET,
        )  # fmt: skip
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        real = have_tokens(places, axes, QUERY_H, QUERY_W)
        weights = tl.where(real[None, :], tl.exp2(logits - shift[None, :]) * factor[None, :], 0.0)
        d_v = tl.dot(weights.to(grad.dtype), grad, acc=d_v, input_precision="ieee")
        d_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        d_logits = weights * (d_weights - correction[None, :])
        d_k = tl.dot(d_logits.to(q.dtype), q, acc=d_k, input_precision="ieee")
    slot = d_extra_ptr + tl.program_id(0).to(tl.int64) * (2 * BLOCK * HEAD_DIM)
    offsets = tl.arange(0, BLOCK)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(slot + offsets, d_k * scale)
    tl.store(slot + BLOCK * HEAD_DIM + offsets, d_v)


@triton.jit
def _overlaps(place, SIZE: tl.constexpr, span):
    first, end = span
    return (place + SIZE > first) & (place < end)


@triton.jit
def _exact(tile):
    """Float32 as float64: in the bias' gradient, a sum over the whole map, the rounding of products would show."""
    if tile.dtype == tl.float32:
        return tile.to(tl.float64)
    else:
        return tile


@triton.jit(do_not_specialize=[*SIZES, "n_slots", "n_splits"])
def neighborhood_bwd_drpb_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, stats_ptr, sums_ptr,
    grad_strides, q_strides, k_strides, v_strides,
    dilations, groups, length_z, length_y, length_x, tiles_z, tiles_y, tiles_x, n_heads, n_slots, n_splits, scale,
    AXES: tl.constexpr, SIGN: tl.constexpr, HAS_PAD: tl.constexpr,
    FIRST_Y: tl.constexpr, FIRST_X: tl.constexpr, BOXES_Y: tl.constexpr, BOXES_X: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: sums of the logits' gradients over every `n_splits`-th tile of queries, for one box of keys.

    A box has a fixed place from the tile of queries, so that each of its pairs has a fixed distance. The sums are
    (n_splits, heads, boxes, queries, keys).
    """
    BOXES: tl.constexpr = (2 * AXES[0][0] - 1) * BOXES_Y * BOXES_X
    lengths = (length_z, length_y, length_x)
    box = tl.program_id(0) % BOXES
    head = tl.program_id(0) // BOXES % n_heads
    sums = tl.zeros((QUERY_H * QUERY_W, KEY_H * KEY_W), tl.float32)
    for slot in range(tl.program_id(0) // (BOXES * n_heads), n_slots, n_splits):
        image, axes = locate(
            slot, lengths, dilations, groups, (tiles_z, tiles_y, tiles_x), AXES, HAS_PAD, QUERY_H, QUERY_W
        )  # fmt: skip
        own = own_places(axes)
        z = own[0] + (box // (BOXES_Y * BOXES_X) - (AXES[0][0] - 1))
        y = own[1] + (box // BOXES_X % BOXES_Y * KEY_H + FIRST_Y)
        x = own[2] + (box % BOXES_X * KEY_W + FIRST_X)
        spans = key_spans(axes, AXES, QUERY_H, QUERY_W)
        seen = _overlaps(z, 1, spans[0]) & _overlaps(y, KEY_H, spans[1]) & _overlaps(x, KEY_W, spans[2])
        if seen:
            k = load_keys(
                k_ptr, pad_k_ptr, image, head, axes, (z, y, x), spans, dilations, k_strides,
                HAS_PAD, KEY_H, KEY_W, HEAD_DIM, OFFSET,
            )  # fmt: skip
            v = load_keys(
                v_ptr, pad_v_ptr, image, head, axes, (z, y, x), spans, dilations, v_strides,
                HAS_PAD, KEY_H, KEY_W, HEAD_DIM, OFFSET,
            )  # fmt: skip
            grad, q, shift, factor, correction = _load_queries_at(
                grad_ptr, q_ptr, stats_ptr, image, head, axes, own, real_spans(axes), lengths, dilations,
                grad_strides, q_strides, n_heads, SIGN, QUERY_H, QUERY_W, HEAD_DIM, OFFSET,
            )  # fmt: skip
            grad, q, k, v = _exact(grad), _exact(q), _exact(k), _exact(v)
            logits = logits_by_query(
                q, k, (z, y, x), axes, rpb_ptr, head, scale, AXES, True, QUERY_H, QUERY_W, KEY_H, KEY_W
            )  # fmt: skip
            weights = tl.exp2(logits * (scale * LOG2E) - shift[:, None]) * factor[:, None]
            d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
            sums += (weights * (d_weights - correction[:, None])).to(tl.float32)
    queries = tl.arange(0, QUERY_H * QUERY_W)
    keys = tl.arange(0, KEY_H * KEY_W)
    slot = sums_ptr + tl.program_id(0).to(tl.int64) * (QUERY_H * QUERY_W * KEY_H * KEY_W)
    tl.store(slot + queries[:, None] * (KEY_H * KEY_W) + keys[None, :], sums)


@triton.jit(do_not_specialize=["n_heads", "n_splits"])
def neighborhood_bwd_drpb_sum_kernel(
    sums_ptr, d_rpb_ptr, n_heads, n_splits,
    AXES: tl.constexpr, FIRST_Y: tl.constexpr, FIRST_X: tl.constexpr, BOXES_Y: tl.constexpr, BOXES_X: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: one entry of the bias' gradient, from all pairs at this distance, in a fixed order."""
    SIZE_Y: tl.constexpr = 2 * AXES[1][0] - 1
    SIZE_X: tl.constexpr = 2 * AXES[2][0] - 1
    entry = tl.program_id(0)
    head = entry // ((2 * AXES[0][0] - 1) * SIZE_Y * SIZE_X)
    plane = entry // (SIZE_Y * SIZE_X) % (2 * AXES[0][0] - 1)
    row, column = tile_places(QUERY_H, QUERY_W)
    y = row + (entry // SIZE_X % SIZE_Y - (AXES[1][0] - 1) - FIRST_Y)
    x = column + (entry % SIZE_X - (AXES[2][0] - 1) - FIRST_X)
    box = (plane * BOXES_Y + y // KEY_H) * BOXES_X + x // KEY_W
    pair = (box * (QUERY_H * QUERY_W) + row * QUERY_W + column) * (KEY_H * KEY_W) + y % KEY_H * KEY_W + x % KEY_W
    # A causal axis has no boxes behind the queries, nor gradients there.
    listed = (y < BOXES_Y * KEY_H) & (x < BOXES_X * KEY_W)
    size: tl.constexpr = (2 * AXES[0][0] - 1) * BOXES_Y * BOXES_X * QUERY_H * QUERY_W * KEY_H * KEY_W
    total = tl.zeros((SPLITS, QUERY_H * QUERY_W), tl.float32)
    for first in range(0, n_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        slot = (split.to(tl.int64) * n_heads + head) * size
        mask = (split < n_splits)[:, None] & listed[None, :]
        total += tl.load(sums_ptr + slot[:, None] + pair[None, :], mask=mask, other=0.0)
    tl.store(d_rpb_ptr + entry, tl.sum(tl.sum(total, 0), 0).to(d_rpb_ptr.dtype.element_ty))
