"""Index map of the kernels: dilation groups, places, windows, and which tiles see each other.

`AXES` holds (kernel, stride, causal) of the axes z, y, x; `AXIS` names one of them. A *place* is a position inside a
dilation group. Of the places of a group, `real` have a token, `seen` take part as keys (those behind the end of an axis
shorter than kernel x dilation only where they hold a pad), and `whole` are counted when windows are moved inwards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_lengths(length, group, dilation, AXES: tl.constexpr, AXIS: tl.constexpr, HAS_PAD: tl.constexpr):
    """(real, seen, whole) of one dilation group."""
    real = tl.cdiv(length - group, dilation)
    whole = tl.cdiv(tl.maximum(length, AXES[AXIS][0] * dilation) - group, dilation)
    if HAS_PAD:
        return real, whole, whole
    else:
        return real, real, whole


@triton.jit
def first_key(place, whole, AXES: tl.constexpr, AXIS: tl.constexpr):
    """Place of the first key that the query at `place` sees."""
    KERNEL: tl.constexpr = AXES[AXIS][0]
    STRIDE: tl.constexpr = AXES[AXIS][1]
    if AXES[AXIS][2]:
        leader = tl.minimum(place // STRIDE * STRIDE + (STRIDE - 1), whole - 1)
        return tl.maximum(leader - (KERNEL - 1), 0)
    else:
        leader = tl.minimum(place // STRIDE * STRIDE + STRIDE // 2, whole - 1)
        return tl.minimum(tl.maximum(leader - KERNEL // 2, 0), whole - KERNEL)


@triton.jit
def end_key(place, lengths, AXES: tl.constexpr, AXIS: tl.constexpr):
    """Place behind the last key that the query at `place` sees."""
    _, seen, whole = lengths
    if AXES[AXIS][2]:
        return tl.minimum(place + 1, seen)
    else:
        return tl.minimum(first_key(place, whole, AXES, AXIS) + AXES[AXIS][0], seen)


@triton.jit
def window(place, lengths, AXES: tl.constexpr, AXIS: tl.constexpr):
    """(first key, number of keys) of the queries at `place`; places without a token see nothing."""
    real, _, whole = lengths
    start = first_key(place, whole, AXES, AXIS)
    return start, tl.where(place < real, end_key(place, lengths, AXES, AXIS) - start, 0)


@triton.jit
def key_span(place, SIZE: tl.constexpr, lengths, AXES: tl.constexpr, AXIS: tl.constexpr):
    """[first, end) of the keys that the `SIZE` queries from `place` on see."""
    real, _, whole = lengths
    last = tl.minimum(place + SIZE, real) - 1
    return first_key(place, whole, AXES, AXIS), end_key(last, lengths, AXES, AXIS)


@triton.jit
def query_span(place, SIZE: tl.constexpr, lengths, AXES: tl.constexpr, AXIS: tl.constexpr):
    """[first, end) of the queries that see any of the `SIZE` keys from `place` on; perhaps nothing.

    Starts and ends of windows never decrease from one query to the next: the queries are those from the first whose
    window ends behind the first key up to the last whose window starts at or before the last key.
    """
    KERNEL: tl.constexpr = AXES[AXIS][0]
    STRIDE: tl.constexpr = AXES[AXIS][1]
    real, seen, whole = lengths
    last = tl.minimum(place + SIZE, seen) - 1
    if AXES[AXIS][2]:
        first = place
        sharers = (last + (KERNEL - STRIDE)) // STRIDE
    else:
        leader = tl.maximum(place + (KERNEL // 2 - KERNEL - STRIDE // 2 + STRIDE), 0)
        first = tl.where(place < KERNEL, 0, leader // STRIDE * STRIDE)
        sharers = (last + (KERNEL // 2 - STRIDE // 2)) // STRIDE
    end = tl.where(last + KERNEL >= whole, real, tl.minimum((sharers + 1) * STRIDE, real))
    return first, tl.where(place < seen, end, 0)


@triton.jit
def within(place, span):
    """Whether a place lies in the `count` places from `start` on, in one comparison."""
    start, count = span
    return (place - start).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def tile_places(HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(row, column) of the places of a tile, in raster order. Sizes are powers of two: nothing is divided."""
    places = tl.arange(0, HEIGHT * WIDTH)
    return places // WIDTH, places % WIDTH


@triton.jit
def _axis(
    slot, length, dilation, groups, SIZE: tl.constexpr, AXES: tl.constexpr, AXIS: tl.constexpr, HAS_PAD: tl.constexpr
):  # fmt: skip
    group = slot % groups
    return group, slot // groups * SIZE, group_lengths(length, group, dilation, AXES, AXIS, HAS_PAD)


@triton.jit
def locate(
    slot, lengths, dilations, groups, tiles, AXES: tl.constexpr, HAS_PAD: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The `slot`-th tile of all images: (image, (z, y, x)), an axis being (dilation group, first place, lengths).

    Neighbours are the dilation groups of a row, then its tiles. A tile has one place on z.
    """
    slots_z, slots_y, slots_x = tiles
    slot_x = slot % slots_x
    slot = slot // slots_x
    slot_y = slot % slots_y
    slot = slot // slots_y
    z = _axis(slot % slots_z, lengths[0], dilations[0], groups[0], 1, AXES, 0, HAS_PAD)
    y = _axis(slot_y, lengths[1], dilations[1], groups[1], HEIGHT, AXES, 1, HAS_PAD)
    x = _axis(slot_x, lengths[2], dilations[2], groups[2], WIDTH, AXES, 2, HAS_PAD)
    return slot // slots_z, (z, y, x)


@triton.jit
def pixel(axis, place, dilation):
    """Position on the axis of a place in the dilation group that `axis` names, int64."""
    return (place * dilation + axis[0]).to(tl.int64)


@triton.jit
def tile_offset(image, head, axes, places, dilations, strides):
    """Element offset of a place (z, y, x) of a dilation group in a (B, Z, H, W, heads, D) tensor, int64."""
    stride_b, stride_z, stride_y, stride_x, stride_h = strides
    offset = image.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    offset += pixel(axes[0], places[0], dilations[0]) * stride_z
    offset += pixel(axes[1], places[1], dilations[1]) * stride_y
    return offset + pixel(axes[2], places[2], dilations[2]) * stride_x


@triton.jit
def place_offsets(row, column, dilations, strides, OFFSET: tl.constexpr):
    """Element offsets, of type `OFFSET`, of rows and columns of places from the first of their tile."""
    rows = row.to(OFFSET) * dilations[1] * strides[2]
    return rows + column.to(OFFSET) * dilations[2] * strides[3]
