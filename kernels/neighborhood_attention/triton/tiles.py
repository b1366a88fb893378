"""What the kernels do with tiles: walk over them, load and store them, find logits, sum softmax up.

A tile's *own* place is where the program works: `axes` holds (dilation group, first place, lengths) of each axis.
Logits are kept divided by the scale, which is positive here (a negative one is the queries' sign): the exponent is then
a single multiply-add.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vitrail.kernels._common.triton import finite
from vitrail.kernels.neighborhood_attention.triton.index import (
    key_span,
    pixel,
    place_offsets,
    query_span,
    tile_offset,
    tile_places,
    window,
    within,
)

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def key_spans(axes, AXES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The box of keys that the own tile of queries sees, [first, end) on each axis."""
    return (
        key_span(axes[0][1], 1, axes[0][2], AXES, 0),
        key_span(axes[1][1], HEIGHT, axes[1][2], AXES, 1),
        key_span(axes[2][1], WIDTH, axes[2][2], AXES, 2),
    )


@triton.jit
def query_spans(axes, AXES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The box of queries that see the own tile of keys, [first, end) on each axis."""
    return (
        query_span(axes[0][1], 1, axes[0][2], AXES, 0),
        query_span(axes[1][1], HEIGHT, axes[1][2], AXES, 1),
        query_span(axes[2][1], WIDTH, axes[2][2], AXES, 2),
    )


@triton.jit
def n_steps(spans, AXES: tl.constexpr, ONE_COLUMN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Tiles of a walk over a box; `ONE_COLUMN` promises that it is not wider than a tile."""
    first_z, end_z = spans[0]
    first_y, end_y = spans[1]
    first_x, end_x = spans[2]
    steps = tl.cdiv(tl.maximum(end_y - first_y, 0), HEIGHT)
    if ONE_COLUMN:
        steps = tl.where(end_x > first_x, steps, 0)
    else:
        steps *= tl.cdiv(tl.maximum(end_x - first_x, 0), WIDTH)
    if AXES[0][0] > 1:
        steps *= tl.maximum(end_z - first_z, 0)
    return steps


@triton.jit
def step_places(
    step, spans, AXES: tl.constexpr, ONE_COLUMN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """First place (z, y, x) of a walk's `step`-th tile; columns come first, planes last."""
    first_y, end_y = spans[1]
    first_x, end_x = spans[2]
    x = first_x
    if not ONE_COLUMN:
        columns = tl.cdiv(end_x - first_x, WIDTH)
        x += step % columns * WIDTH
        step = step // columns
    z = spans[0][0]
    if AXES[0][0] > 1:
        rows = tl.cdiv(end_y - first_y, HEIGHT)
        z += step // rows
        step = step % rows
    return z, first_y + step * HEIGHT, x


@triton.jit
def own_places(axes):
    """First place (z, y, x) of the own tile."""
    return axes[0][1], axes[1][1], axes[2][1]


@triton.jit
def real_spans(axes):
    """All places of a dilation group that have a token."""
    return (0, axes[0][2][0]), (0, axes[1][2][0]), (0, axes[2][2][0])


@triton.jit
def nearest(places, axes, spans, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(plane, rows, columns) of a tile from its first place, those outside of `spans` moved to the nearest token.

    What is read there is hidden afterwards: cheaper than masked loads, which have to fill registers first.
    """
    row, column = tile_places(HEIGHT, WIDTH)
    last_z = axes[0][2][0] - 1
    last_y = tl.minimum(spans[1][1], axes[1][2][0]) - 1
    last_x = tl.minimum(spans[2][1], axes[2][2][0]) - 1
    row = tl.maximum(tl.minimum(row, last_y - places[1]), -places[1])
    column = tl.maximum(tl.minimum(column, last_x - places[2]), -places[2])
    return tl.maximum(tl.minimum(places[0], last_z), 0), row, column


@triton.jit
def load_tile(
    ptr, image, head, axes, places, spans, dilations, strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """(HEIGHT * WIDTH, HEAD_DIM) of the tile whose first place is `places`; see `nearest` for what is outside."""
    z, row, column = nearest(places, axes, spans, HEIGHT, WIDTH)
    ptr += tile_offset(image, head, axes, (z, places[1], places[2]), dilations, strides)
    offsets = place_offsets(row, column, dilations, strides, OFFSET)
    return tl.load(ptr + offsets[:, None] + tl.arange(0, HEAD_DIM)[None, :])


@triton.jit
def load_queries(
    ptr, image, head, axes, dilations, strides, SIGN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The own tile of queries, times the sign of the scale."""
    places = own_places(axes)
    spans = real_spans(axes)
    q = load_tile(ptr, image, head, axes, places, spans, dilations, strides, HEIGHT, WIDTH, HEAD_DIM, OFFSET)
    return signed(q, SIGN)


@triton.jit
def signed(q, SIGN: tl.constexpr):
    """Queries times the sign of the scale."""
    if SIGN == 1:
        return q
    else:
        return q * SIGN


@triton.jit
def store_own(
    ptr, tile, image, head, axes, dilations, strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Writes the places of the own tile that have a token."""
    places = own_places(axes)
    row, column = tile_places(HEIGHT, WIDTH)
    ptr += tile_offset(image, head, axes, places, dilations, strides)
    offsets = place_offsets(row, column, dilations, strides, OFFSET)
    offsets = offsets[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=have_tokens(places, axes, HEIGHT, WIDTH)[:, None])


@triton.jit
def have_tokens(places, axes, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Whether there is a token at each place of the tile at `places`."""
    row, column = tile_places(HEIGHT, WIDTH)
    inside = (row < axes[1][2][0] - places[1]) & (column < axes[2][2][0] - places[2])
    return inside & (places[0] < axes[0][2][0])


@triton.jit
def token_numbers(places, axes, plane, rows, columns, lengths, dilations):
    """Numbers in raster order of tokens at rows and columns from a tile's first place, int64."""
    z = pixel(axes[0], plane, dilations[0])
    y = pixel(axes[1], places[1] + rows, dilations[1])
    return (z * lengths[1] + y) * lengths[2] + pixel(axes[2], places[2] + columns, dilations[2])


@triton.jit
def load_keys(
    ptr, pad_ptr, image, head, axes, places, spans, dilations, strides, HAS_PAD: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Keys or values of a tile, the pad where there is no token."""
    tile = load_tile(ptr, image, head, axes, places, spans, dilations, strides, HEIGHT, WIDTH, HEAD_DIM, OFFSET)
    if HAS_PAD:
        pad = tl.load(pad_ptr + head * HEAD_DIM + tl.arange(0, HEAD_DIM)).to(tile.dtype)
        tile = tl.where(have_tokens(places, axes, HEIGHT, WIDTH)[:, None], tile, pad[None, :])
    return tile


@triton.jit
def masked_product(
    a, b, q_y, q_x, k_y, k_x, window_y, window_x, distance_z, rpb_ptr, head, scale,
    AXES: tl.constexpr, HAS_RPB: tl.constexpr,
):  # fmt: skip
    """Logits divided by `scale`, minus infinity where hidden; places and windows broadcast to the product a b."""
    visible = within(k_y, window_y) & within(k_x, window_x)
    if HAS_RPB:
        SIZE_Y: tl.constexpr = 2 * AXES[1][0] - 1
        SIZE_X: tl.constexpr = 2 * AXES[2][0] - 1
        plane = head * (2 * AXES[0][0] - 1) + distance_z + (AXES[0][0] - 1)
        middle = (plane * SIZE_Y + (AXES[1][0] - 1)) * SIZE_X + (AXES[2][0] - 1)
        offsets = (k_y - q_y) * SIZE_X + (k_x - q_x)
        if a.dtype == tl.float32 or a.dtype == tl.float64:
            # Products summed onto the bias would all be rounded at its size: the selection keeps the compiler from it.
            bias = tl.load(rpb_ptr + middle + offsets, mask=visible, other=0.0).to(tl.float32) / scale
            return tl.where(visible, tl.dot(a, b, input_precision="ieee"), float("-inf")) + bias
        else:
            bias = tl.load(rpb_ptr + middle + offsets, mask=visible, other=float("-inf")).to(tl.float32) / scale
            # As the start of the sum it takes the product's layout. Added behind, the product would take the bias' one.
            return tl.dot(a, b, acc=bias, input_precision="ieee")
    else:
        return tl.where(visible, tl.dot(a, b, input_precision="ieee"), float("-inf"))


@triton.jit
def logits_by_query(
    q, k, places, axes, rpb_ptr, head, scale, AXES: tl.constexpr, HAS_RPB: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
):  # fmt: skip
    """Logits (queries, keys) of the own tile of queries and the tile of keys at `places`."""
    q_row, q_column = tile_places(QUERY_H, QUERY_W)
    k_row, k_column = tile_places(KEY_H, KEY_W)
    q_y = axes[1][1] + q_row
    q_x = axes[2][1] + q_column
    start_y, count_y = window(q_y, axes[1][2], AXES, 1)
    start_x, count_x = window(q_x, axes[2][2], AXES, 2)
    count_y = tl.where(axes[0][1] < axes[0][2][0], count_y, 0)  # a tile may lie behind the last plane of its group
    return masked_product(
        q, tl.trans(k), q_y[:, None], q_x[:, None], (places[1] + k_row)[None, :], (places[2] + k_column)[None, :],
        (start_y[:, None], count_y[:, None]), (start_x[:, None], count_x[:, None]), places[0] - axes[0][1],
        rpb_ptr, head, scale, AXES, HAS_RPB,
    )  # fmt: skip


@triton.jit
def logits_by_key(
    q, k, places, axes, rpb_ptr, head, scale, AXES: tl.constexpr, HAS_RPB: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
):  # fmt: skip
    """Logits (keys, queries) of the own tile of keys and the tile of queries at `places`."""
    q_row, q_column = tile_places(QUERY_H, QUERY_W)
    k_row, k_column = tile_places(KEY_H, KEY_W)
    q_y = places[1] + q_row
    q_x = places[2] + q_column
    start_y, count_y = window(q_y, axes[1][2], AXES, 1)
    start_x, count_x = window(q_x, axes[2][2], AXES, 2)
    return masked_product(
        k, tl.trans(q), q_y[None, :], q_x[None, :], (axes[1][1] + k_row)[:, None], (axes[2][1] + k_column)[:, None],
        (start_y[None, :], count_y[None, :]), (start_x[None, :], count_x[None, :]), axes[0][1] - places[0],
        rpb_ptr, head, scale, AXES, HAS_RPB,
    )  # fmt: skip


@triton.jit
def key_tile(
    step, q, spans, k_ptr, v_ptr, rpb_ptr, pad_k_ptr, pad_v_ptr, image, head, axes, dilations, k_strides, v_strides,
    scale, AXES: tl.constexpr, HAS_RPB: tl.constexpr, HAS_PAD: tl.constexpr, ONE_COLUMN: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The `step`-th tile of keys and values of the own tile of queries, and the logits."""
    places = step_places(step, spans, AXES, ONE_COLUMN, KEY_H, KEY_W)
    k = load_keys(
        k_ptr, pad_k_ptr, image, head, axes, places, spans, dilations, k_strides,
        HAS_PAD, KEY_H, KEY_W, HEAD_DIM, OFFSET,
    )  # fmt: skip
    v = load_keys(
        v_ptr, pad_v_ptr, image, head, axes, places, spans, dilations, v_strides,
        HAS_PAD, KEY_H, KEY_W, HEAD_DIM, OFFSET,
    )  # fmt: skip
    logits = logits_by_query(
        q, k.to(q.dtype), places, axes, rpb_ptr, head, scale, AXES, HAS_RPB, QUERY_H, QUERY_W, KEY_H, KEY_W
    )  # fmt: skip
    return k, v, logits


@triton.jit
def load_extra(ptr, start, image, head, n_extra, strides, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(BLOCK, HEAD_DIM) of a (B, n, heads, D) tensor whose last stride is 1; zeros behind its end."""
    stride_b, stride_n, stride_h = strides
    index = start + tl.arange(0, BLOCK)
    ptr += image.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    offsets = (index.to(tl.int64) * stride_n)[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(ptr + offsets, mask=(index < n_extra)[:, None], other=0.0)


@triton.jit
def extra_tile(
    start, q, extra_k_ptr, extra_v_ptr, image, head, n_extra, k_strides, v_strides,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One tile of the keys that every query sees, their values, and the logits."""
    k = load_extra(extra_k_ptr, start, image, head, n_extra, k_strides, BLOCK, HEAD_DIM).to(q.dtype)
    v = load_extra(extra_v_ptr, start, image, head, n_extra, v_strides, BLOCK, HEAD_DIM).to(q.dtype)
    exists = start + tl.arange(0, BLOCK) < n_extra
    logits = tl.where(exists[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    return k, v, logits


@triton.jit
def first_softmax(logits, scale):
    """Starts an online softmax: (weights, maximum in units of log2, total)."""
    factor = scale * LOG2E
    maximum = tl.max(logits, 1) * factor
    weights = tl.exp2(logits * factor - finite(maximum)[:, None])
    return weights, maximum, tl.sum(weights, 1)
