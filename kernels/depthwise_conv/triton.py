"""Triton kernels of depth-wise convolution: index map, tiling and numerics.

Index map. Maps are read where they lie, with any stride over images and rows: the values inside a packed projection
are not copied. Positions outside the map are masked; at the bottom and right `pad_value` may take their place. The
gradient of the map is the same kernel with the filter turned by 180 degrees. Adding the input (`skip`) is a one added
to the filter's centre, so that it costs nothing, forward and backward.

Tiling. A thread owns two channels and walks down strips of the map, `COLUMNS` outputs wide; a tile's first axis are
strips side by side, which go through all images. Triton cannot index into registers, so that a thread holds tuples of
tiles, one for each pixel, and loops over columns and taps are unrolled; the loop over rows is not, which keeps the code
small (950 instructions for 5x5 where patches of 4 x 4 took 1600) and its compilation short. Every input pixel of a row
and its halo is loaded and converted once, then multiplied by all taps that meet it: K rows of outputs are begun at
once, the first of them is done and leaves. The filter stays in registers, which two channels a thread allow for 7x7 (98
numbers), more do not. 5x5 and 7x7 filters are loaded as they lie, taps side by side, and exchanged once through shared
memory, so that a thread gets all taps of its channels; to take them apart (`tl.split`) costs nothing. All programs get
the same number of rows, which may begin and end inside a strip, unless whole strips cost no more. The distance of
pixels is a constant of the kernel (it is the model's width), so that it becomes an immediate offset of the loads.

Loads. `STEP` rows of inputs, and of what is added, are under way. Two channels of 16 bits are one word of 32, and stay
one until their row's turn: LLVM repacks numbers of 16 bits at the end of the loop's body, and so waits for the loads
there. Which columns lie in the map are comparisons that LLVM's vectoriser must not see (`_alone`).

Gradients. The same walk over `grad` and its halo meets K rows of x, without halo, and takes the filter's gradient; for
3x3 and 5x5 it takes the map's gradient from the same loads. A program keeps all taps' sums in registers and leaves
them in a workspace, and a second kernel adds the workspace up in a fixed order.

Numerics. Everything is accumulated in float32. GELU is the exact one, for results of 16 bits closer than their rounding
(`gelu_16`); its backward recomputes the convolution. No atomics.

Roofline. For 56x56x96 and batch 64 in bfloat16 the bytes of a forward take 25.7 microseconds at 3 TB/s on an H100,
38.5 with residual; 132 x 128 lanes issue the multiply-adds of 3x3, 5x5 and 7x7 in 6, 16 and 32, and all instructions
of the loop (16, 38 and 70 an output) in 10, 25 and 45.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, batch 64, CUDA-graph replay), microseconds at 56x56x96 /
28x28x192 / 14x14x384 / 7x7x768. Forward: 3x3 with `skip` 34.8 / 18.0 / 8.5 / 5.5, 5x5 with residual 52.4 / 28.2 / 13.4
/ 8.2, 7x7 with GELU 63.6 / 37.1 / 21.6 / 15.3. Whole backward: 3x3 55.1 / 31.7 / 17.4 / 12.9, 5x5 77.6 / 42.7 / 26.6 /
18.9. In the same run with filters that a copy transposed before, equal to the bit: 5x5 forward 54.2 / 29.8 / 15.2 /
10.2 and backward 79.4 / 44.6 / 28.7 / 21.0, 7x7 forward 66.2 / 39.7 / 23.9 / 17.6; whole backward of 7x7, in another
run, 207.5 / 129.3. With numbers of 16 bits in the loop and bits as masks, copy included: 35 / 21 / 11.6, 65 / 37 / 21
and 78 / 46 / 28 forward; of 7x7, the slope of GELU 104 / 59 / 37 (81 / 49 / 31 since), the filter's gradient 75 / 50 /
32 (67 / 41 / 27). Joint 5x5 gradients without `_alone` and with x loaded row by row where a strip begins, copy
included: 72.0 / 52.8 / 34.3, quicker at 56x56x96 alone.

Tried and rejected, at the same sizes. Forward of 5x5, where 168 registers took 53.8 / 30.9 / 17.5 in that run: no limit
(192, eight warps a multiprocessor) 60.5 / 33.9 / 20.4; one row under way, loop unrolled twice, 62.6 / 36.2 / 20.6;
seven columns 62.4 / 35.3 / 21.9; two 80 / 44 / 28; programs of one warp 54.2 / 32.0 / 17.9. 3x3: forward with seven
columns 33.9 / 18.8 / 10.6; gradients with 168 registers and twelve warps 55 / 32 / 17.6, with seven columns 53.9 / 31.1
/ 18.5. Gradients of 7x7 filters with one row under way 69.0 / 43.0 / 28.4. Whole strips for 7x7 at 14x14, 28 rows for
21: 28.1, not 25.0. One channel a thread and seven columns: 54 instructions an output of 5x5, not 45. Patches of 4 x 4
with all rows unrolled, forward at 56x56x96 33 (3x3), 70 (5x5) and 105 (7x7, GELU by `tl.erf`); fetching rows into the
L2 cache ahead of the loads, no faster; 5x5 and 7x7 filters loaded tap by tap where they lie, 2 to 70% slower than from
a copy; fewer registers by force (7x7, 168), 80% slower. On tensor cores (bands of Toeplitz matrices) the convolution
took 108, 164 and 116 for 3x3, 5x5 and 7x7, the gradient of 7x7 filters 65.6 / 52.1 / 25.7: not worth a second form. Not
tried, by arithmetic: multiply-adds of pairs of 16 bits round every partial sum; Winograd's form along a row leaves 28
of 49 products of 7x7 and adds some 23 operations.
"""

# Kernels build tuples by adding to them: they cannot unpack.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vitrail.kernels._common.gradients import empty_gradient, zeros_or_empty
from vitrail.kernels._common.launch import contiguous, launch
from vitrail.kernels._common.triton import INTERPRETED, add_parts_kernel, exp2_normal, gelu_16, gelu_16_and_slope

_JOINT_SIZES = (3, 5)  # filters whose gradient, and the map's, fit into the registers of one thread
_PARTS = 64  # sums of programs that are added at once


class Tile(NamedTuple):
    """Columns and channels of a thread, warps of a program, rows of inputs under way, and most registers of a thread.

    The rows of all strips are shared out among programs: `rows` to each at least, to `most_warps` warps at most.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    step: int
    most_warps: int
    registers: int | None = None


_TILES = {
    3: Tile(4, 4, 2, 4, 4, 1584),
    5: Tile(4, 4, 2, 4, 2, 1584, 168),
    7: Tile(4, 4, 2, 4, 2, 1056),
}
# One warp owns whole strips: nothing is exchanged when a program ends.
_GRADIENT_TILES = {3: Tile(4, 4, 2, 1, 4, 1056), 5: Tile(4, 4, 2, 1, 2, 1056), 7: Tile(4, 4, 2, 1, 2, 1056)}


@triton.jit
def _channels(block, DIM: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels of a block and whether they exist, (STRIPS, CHANNELS) each.

    Whole tiles, also of what depends on channels only: loads then have one layout, and nothing is exchanged.
    """
    channels = tl.zeros((STRIPS, 1), tl.int32) + block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return channels, (channels < DIM) | (DIM % CHANNELS == 0)


@triton.jit
def _words(ptr, WORD: tl.constexpr):
    """A pointer to words of WORD channels."""
    return ptr.to(tl.pointer_type(tl.int32)) if WORD == 2 else ptr


@triton.jit
def _float32(words, dtype: tl.constexpr, WORD: tl.constexpr):
    """Channels in float32, (STRIPS, CHANNELS), of words as they are in memory."""
    if WORD == 1:
        return words.to(tl.float32)
    else:
        if dtype == tl.bfloat16:
            low = (words << 16).to(tl.float32, bitcast=True)
            high = (words & -65536).to(tl.float32, bitcast=True)
        else:
            low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        return tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))


@triton.jit
def _corner(ptr, strides, image, y, x, words, PIXEL: tl.constexpr):
    """Pointers to row y and column x, (STRIPS, words); x is (STRIPS,), y a number. Strides count words."""
    base = image.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * PIXEL
    return ptr + base[:, None] + words


@triton.jit
def _load_pad(pad_ptr, words, exists, HAS_PAD: tl.constexpr, WORD: tl.constexpr):
    """What the padding holds, (STRIPS, words); nothing of use without it."""
    return tl.load(_words(pad_ptr, WORD) + words, mask=exists, other=0) if HAS_PAD else words


@triton.jit
def _gelu(x, SHORT: tl.constexpr):
    """SHORT: for results of 16 bits."""
    return gelu_16(x) if SHORT else 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x, SHORT: tl.constexpr):
    if SHORT:
        _, slope = gelu_16_and_slope(x)
    else:
        normal = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = normal + x * exp2_normal(x * x * -0.7213475204444817) * 0.3989422804014327
    return slope


@triton.jit
def _ends(x, end, exists):
    """How many columns from x on lie below `end`, (STRIPS, 1); none where a strip does not exist."""
    return tl.where(exists, end - x, 0)[:, None]


@triton.jit
def _rows(row, first, end, ends):
    """As many columns if a row lies in [first, end), else none."""
    return tl.where((row >= first) & (row < end), ends, 0)


@triton.jit
def _filled(tile, COUNT: tl.constexpr):
    """A tuple of COUNT times the same."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _columns(strip, width, COLUMNS: tl.constexpr):
    """(image, first column) of strips, which go through all images."""
    per_row = tl.cdiv(width, COLUMNS)
    return strip // per_row, strip % per_row * COLUMNS


@triton.jit
def _halves(tile, LEVELS: tl.constexpr):
    """A tile (..., 2, 2) taken apart along its LEVELS last axes: a tuple, in the order in which it lies in memory."""
    tiles = (tile,)
    for _ in tl.static_range(LEVELS):
        evens = ()
        odds = ()
        for i in tl.static_range(len(tiles)):
            even, odd = tl.split(tiles[i])
            evens = evens + (even,)
            odds = odds + (odd,)
        tiles = evens + odds
    return tiles


@triton.jit
def _load_taps(weight_ptr, block, DIM: tl.constexpr, CHANNELS: tl.constexpr, K: tl.constexpr):
    """A block's filter, (CHANNELS,) for each tap and some more.

    It is loaded as it lies, and exchanged once, so that a thread holds all taps of its channels.
    """
    channel = (block * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    tap = tl.arange(0, 32 if K == 5 else 64)[None, :]
    taps = tl.load(weight_ptr + channel * (K * K) + tap, mask=(channel < DIM) & (tap < K * K), other=0.0)
    if K == 5:
        return _halves(tl.reshape(taps, (CHANNELS, 2, 2, 2, 2, 2)), 5)
    else:
        return _halves(tl.reshape(taps, (CHANNELS, 2, 2, 2, 2, 2, 2)), 6)


@triton.jit
def _load_filter(
    weight_ptr, block, channels, exists, DIM: tl.constexpr, CHANNELS: tl.constexpr, K: tl.constexpr,
    TURNED: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """All taps of a filter (DIM, K * K), (STRIPS, CHANNELS) each."""
    taps = ()
    if K == 3:
        for tap in tl.static_range(K * K):
            taps = taps + (tl.load(weight_ptr + channels * (K * K) + tap, mask=exists, other=0.0),)
    else:
        found = _load_taps(weight_ptr, block, DIM, CHANNELS, K)
        for tap in tl.static_range(K * K):
            taps = taps + (tl.broadcast_to(found[tap][None, :], channels.shape),)
    weights = ()
    for tap in tl.static_range(K * K):
        weight = taps[(K * K - 1 - tap) if TURNED else tap].to(tl.float32)
        if SKIP and tap == K * K // 2:
            weight += 1.0
        weights = weights + (weight,)
    return weights


@triton.jit
def _convolve_row(tiles, weights, sums, start, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds a row of inputs to the rows of outputs that it meets: K - 1 begun ones, and one that begins."""
    updated = ()
    for i in tl.static_range(K * COLUMNS):
        total = sums[i] if i < (K - 1) * COLUMNS else start
        for dx in tl.static_range(K):
            total = tl.fma(tiles[i % COLUMNS + dx], weights[(K - 1 - i // COLUMNS) * K + dx], total)
        updated = updated + (total,)
    return updated


@triton.jit
def _alone(x):
    """x itself, hidden from LLVM's vectoriser.

    It would pack the masks of many pixels into words: more instructions, of which ptxas 12.8 makes wrong code.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=False, pack=1)


@triton.jit
def _load(corner, exists, starts, ends, COUNT: tl.constexpr, HALO: tl.constexpr, PIXEL: tl.constexpr):
    """COUNT neighbouring pixels, as they are in memory; zeros outside [starts, ends), starts <= HALO."""
    tiles = ()
    for i in tl.static_range(COUNT):
        inside = exists & (i < _alone(ends))
        if i < HALO:
            inside = inside & (i >= _alone(starts))
        tiles = tiles + (tl.load(corner + i * PIXEL, mask=inside, other=0),)
    return tiles


@triton.jit
def _load_rows(
    corner, exists, row, first, end, starts, ends, strides,
    ROWS: tl.constexpr, COUNT: tl.constexpr, HALO: tl.constexpr, PIXEL: tl.constexpr,
):  # fmt: skip
    """COUNT pixels of each of ROWS rows; zeros for rows outside [first, end)."""
    tiles = ()
    for i in tl.static_range(ROWS):
        wanted = _rows(row + i, first, end, ends)
        tiles = tiles + _load(corner + i * strides[1], exists, starts, wanted, COUNT, HALO, PIXEL)
    return tiles


@triton.jit
def _padded(raw, pad, starts, ends, pad_ends, HALO: tl.constexpr, HAS_PAD: tl.constexpr):
    """Loaded pixels, with what the padding holds from `ends` to `pad_ends`, starts <= HALO."""
    tiles = ()
    for i in tl.static_range(len(raw)):
        tile = raw[i]
        if HAS_PAD:
            is_pad = (i >= _alone(ends)) & (i < _alone(pad_ends))
            if i < HALO:
                is_pad = is_pad & (i >= _alone(starts))
            tile = tl.where(is_pad, pad, tile)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _converted(raw, dtype: tl.constexpr, WORD: tl.constexpr):
    """Loaded pixels in float32."""
    tiles = ()
    for i in tl.static_range(len(raw)):
        tiles = tiles + (_float32(raw[i], dtype, WORD),)
    return tiles


@triton.jit
def _store(corner, exists, ends, totals, others, GELU: tl.constexpr, OTHER: tl.constexpr, PIXEL: tl.constexpr):
    """Finishes and writes a row of pixels."""
    short: tl.constexpr = corner.dtype.scalar.element_ty != tl.float32
    for i in tl.static_range(len(totals)):
        total = totals[i]
        if GELU:
            total = _gelu(total, short)
        if OTHER == "add":
            total += others[i]
        if OTHER == "slope":
            total = others[i] * _gelu_slope(total, short)
        tl.store(corner + i * PIXEL, total.to(corner.dtype.scalar.element_ty), mask=exists & (i < _alone(ends)))


@triton.jit(
    do_not_specialize=[
        "height",
        "width",
        "pad_bottom",
        "pad_right",
        "out_height",
        "out_width",
        "origin_y",
        "origin_x",
        "n_strips",
        "rows",
    ]
)
def _depthwise_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, pad_ptr, other_ptr, out_ptr, x_strides, other_strides,
    height, width, pad_bottom, pad_right, out_height, out_width, origin_y, origin_x, n_strips, rows,
    DIM: tl.constexpr, PIXEL: tl.constexpr, OTHER_PIXEL: tl.constexpr, OUT_PIXEL: tl.constexpr,
    K: tl.constexpr, TURNED: tl.constexpr, SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, GELU: tl.constexpr, OTHER: tl.constexpr,
    COLUMNS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr, WORD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program's rows of strips. The output's first pixel is (origin_y, origin_x) of the input.

    OTHER: None, "add" to add a second map, or "slope" to multiply it by the slope of GELU at the convolution. A program
    reads of it what it writes itself, before it does: the second map may be the output.
    """
    n_blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    reach: tl.constexpr = K // 2
    wide: tl.constexpr = COLUMNS + K - 1
    block = tl.program_id(0) % n_blocks
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    channels, known = _channels(block, DIM, STRIPS, CHANNELS)
    words, real = _channels(block, DIM // WORD, STRIPS, CHANNELS // WORD)
    pad = _load_pad(pad_ptr, words, real, HAS_PAD, WORD)
    weights = _load_filter(weight_ptr, block, channels, known, DIM, CHANNELS, K, TURNED, SKIP)
    start = tl.zeros((STRIPS, CHANNELS), tl.float32)
    if HAS_BIAS:
        start = tl.load(bias_ptr + channels, mask=known, other=0.0).to(tl.float32)
    shift = origin_y + reach  # from a row of outputs to the last row of inputs that it sees
    begin = tl.program_id(0) // n_blocks * rows
    end = tl.minimum(begin + rows, tl.cdiv(n_strips, STRIPS) * out_height)
    for group in range(begin // out_height, tl.cdiv(end, out_height)):
        strip = group * STRIPS + tl.arange(0, STRIPS)
        image, out_x = _columns(strip, out_width, COLUMNS)
        x = out_x + origin_x - reach
        exists = strip < n_strips
        first_out = tl.maximum(begin - group * out_height, 0)
        end_out = tl.minimum(end - group * out_height, out_height)
        first = tl.maximum(first_out + origin_y - reach, 0)
        last = end_out + shift
        last_in = tl.maximum(tl.minimum(last, height + pad_bottom), first)
        end_real = tl.minimum(last_in, height)
        starts = -x[:, None]
        ends, pad_ends = _ends(x, width, exists), _ends(x, width + pad_right, exists)
        out_ends = _ends(out_x, out_width, exists)
        corner = _corner(_words(x_ptr, WORD), x_strides, image, first, x, words, PIXEL)
        stride_y = out_width.to(tl.int64) * OUT_PIXEL
        out_strides = (out_height * stride_y, stride_y)
        out_corner = _corner(out_ptr, out_strides, image, first - shift, out_x, channels, OUT_PIXEL)
        other_corner = out_corner
        others = ()
        if OTHER is not None:
            row = first - shift
            other_corner = _corner(_words(other_ptr, WORD), other_strides, image, row, out_x, words, OTHER_PIXEL)
            others = _load_rows(
                other_corner, real, row, first_out, end_out, starts, out_ends, other_strides,
                STEP, COLUMNS, 0, OTHER_PIXEL,
            )  # fmt: skip
            other_corner += STEP * other_strides[1]
        # Rows of outputs that the next row of inputs meets, but for the last of them.
        sums = _filled(start, (K - 1) * COLUMNS)
        steps = tl.cdiv(last_in - first, STEP)
        ahead = _load_rows(corner, real, first, first, end_real, starts, ends, x_strides, STEP, wide, reach, PIXEL)
        corner += STEP * x_strides[1]
        for step in range(steps):
            for i in tl.static_range(STEP):
                y = first + step * STEP + i
                done = _rows(y - shift, first_out, end_out, out_ends)
                is_real, is_pad = _rows(y, first, end_real, ends), _rows(y, first, last_in, pad_ends)
                tiles = _converted(_padded(ahead[:wide], pad, starts, is_real, is_pad, reach, HAS_PAD), dtype, WORD)
                wanted = _rows(y + STEP, first, end_real, ends)
                ahead = ahead[wide:] + _load(corner, real, starts, wanted, wide, reach, PIXEL)
                corner += x_strides[1]
                sums = _convolve_row(tiles, weights, sums, start, K, COLUMNS)
                other = _converted(others[:COLUMNS], dtype, WORD)
                _store(out_corner, known, done, sums[:COLUMNS], other, GELU, OTHER, OUT_PIXEL)
                if OTHER is not None:
                    wanted = _rows(y - shift + STEP, first_out, end_out, out_ends)
                    others = others[COLUMNS:] + _load(other_corner, real, starts, wanted, COLUMNS, 0, OTHER_PIXEL)
                    other_corner += other_strides[1]
                out_corner += stride_y
                sums = sums[COLUMNS:]
        # Rows of outputs that see the map's last rows.
        for y in range(first + steps * STEP, last):
            done = _rows(y - shift, first_out, end_out, out_ends)
            other = _converted(others[:COLUMNS], dtype, WORD)
            _store(out_corner, known, done, sums[:COLUMNS], other, GELU, OTHER, OUT_PIXEL)
            if OTHER is not None:
                wanted = _rows(y - shift + STEP, first_out, end_out, out_ends)
                others = others[COLUMNS:] + _load(other_corner, real, starts, wanted, COLUMNS, 0, OTHER_PIXEL)
                other_corner += other_strides[1]
            out_corner += stride_y
            sums = sums[COLUMNS:] + _filled(start, COLUMNS)


@triton.jit(do_not_specialize=["height", "width", "pad_bottom", "pad_right", "n_strips", "rows"])
def _gradients_kernel(
    x_ptr, grad_ptr, weight_ptr, pad_ptr, out_ptr, parts_ptr, x_strides, grad_strides,
    height, width, pad_bottom, pad_right, n_strips, rows,
    DIM: tl.constexpr, PIXEL: tl.constexpr, GRAD_PIXEL: tl.constexpr, OUT_PIXEL: tl.constexpr,
    K: tl.constexpr, OF_MAP: tl.constexpr, SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr,
    COLUMNS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr, WORD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The map's gradient in one program's rows of strips (OF_MAP), and its sums (parts, K * K + 1, DIM).

    The sums are those of `grad * x` at every tap, then of `grad`. Strips are of the padded map.
    """
    n_blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    reach: tl.constexpr = K // 2
    wide: tl.constexpr = COLUMNS + K - 1
    block = tl.program_id(0) % n_blocks
    part = tl.program_id(0) // n_blocks
    own_height = height + pad_bottom
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    channels, known = _channels(block, DIM, STRIPS, CHANNELS)
    words, real = _channels(block, DIM // WORD, STRIPS, CHANNELS // WORD)
    pad = _load_pad(pad_ptr, words, real, HAS_PAD, WORD)
    zero = tl.zeros((STRIPS, CHANNELS), tl.float32)
    weights = ()
    if OF_MAP:
        weights = _load_filter(weight_ptr, block, channels, known, DIM, CHANNELS, K, True, SKIP)
    sums = _filled(zero, K * K + 1)
    begin = part * rows
    end = tl.minimum(begin + rows, tl.cdiv(n_strips, STRIPS) * own_height)
    for group in range(begin // own_height, tl.cdiv(end, own_height)):
        strip = group * STRIPS + tl.arange(0, STRIPS)
        image, x = _columns(strip, width + pad_right, COLUMNS)
        exists = strip < n_strips
        first_own = tl.maximum(begin - group * own_height, 0)
        end_own = tl.minimum(end - group * own_height, own_height)
        end_real = tl.minimum(end_own, height)
        first = tl.maximum(first_own - reach, 0)
        last = tl.maximum(tl.minimum(end_own + reach, height), first)
        starts = (reach - x)[:, None]
        grad_ends = _ends(x - reach, width, exists)
        ends, pad_ends = _ends(x, width, exists), _ends(x, width + pad_right, exists)
        grad_corner = _corner(_words(grad_ptr, WORD), grad_strides, image, first, x - reach, words, GRAD_PIXEL)
        corner = _corner(_words(x_ptr, WORD), x_strides, image, first - reach, x, words, PIXEL)
        stride_y = width.to(tl.int64) * OUT_PIXEL
        out_corner = _corner(out_ptr, (height * stride_y, stride_y), image, first - reach, x, channels, OUT_PIXEL)
        grads_ahead = _load_rows(
            grad_corner, real, first, first, last, starts, grad_ends, grad_strides, STEP, wide, reach, GRAD_PIXEL
        )
        top = first - reach
        begun = _load_rows(
            corner, real, top, first_own, end_real, starts, ends, x_strides, K - 1 + STEP, COLUMNS, 0, PIXEL
        )
        grad_corner += STEP * grad_strides[1]
        corner += (K - 1 + STEP) * x_strides[1]
        # Rows of x, and of its gradient, that the next row of `grad` meets, but for the last of each.
        pixels = ()
        outs = _filled(zero, (K - 1) * COLUMNS)
        for i in tl.static_range(K - 1):
            is_real, is_pad = _rows(top + i, first_own, end_real, ends), _rows(top + i, first_own, end_own, pad_ends)
            tiles = _padded(begun[i * COLUMNS : (i + 1) * COLUMNS], pad, starts, is_real, is_pad, 0, HAS_PAD)
            pixels = pixels + _converted(tiles, dtype, WORD)
        ahead = begun[(K - 1) * COLUMNS :]
        steps = tl.cdiv(last - first, STEP)
        for step in range(steps):
            for i in tl.static_range(STEP):
                y = first + step * STEP + i
                row = y + reach
                is_real, is_pad = _rows(row, first_own, end_real, ends), _rows(row, first_own, end_own, pad_ends)
                raw = _padded(ahead[:COLUMNS], pad, starts, is_real, is_pad, 0, HAS_PAD)
                grads, pixels = _converted(grads_ahead[:wide], dtype, WORD), pixels + _converted(raw, dtype, WORD)
                wanted = _rows(y + STEP, first, last, grad_ends)
                grads_ahead = grads_ahead[wide:] + _load(grad_corner, real, starts, wanted, wide, reach, GRAD_PIXEL)
                wanted = _rows(row + STEP, first_own, end_real, ends)
                ahead = ahead[COLUMNS:] + _load(corner, real, starts, wanted, COLUMNS, 0, PIXEL)
                grad_corner += grad_strides[1]
                corner += x_strides[1]
                updated = ()
                for tap in tl.static_range(K * K):
                    total = sums[tap]
                    for column in tl.static_range(COLUMNS):
                        total = tl.fma(grads[column + K - 1 - tap % K], pixels[tap // K * COLUMNS + column], total)
                    updated = updated + (total,)
                total = sums[K * K]
                if HAS_BIAS:
                    own = tl.where((y >= first_own) & (y < end_own), 1.0, 0.0)
                    for column in tl.static_range(COLUMNS):
                        total = tl.fma(grads[column + reach], own, total)
                sums = updated + (total,)
                pixels = pixels[COLUMNS:]
                if OF_MAP:
                    outs = _convolve_row(grads, weights, outs, zero, K, COLUMNS)
                    done = _rows(y - reach, first_own, end_real, ends)
                    _store(out_corner, known, done, outs[:COLUMNS], (), False, None, OUT_PIXEL)
                    out_corner += stride_y
                    outs = outs[COLUMNS:]
        if OF_MAP:
            for y in range(first + steps * STEP, end_real + reach):
                done = _rows(y - reach, first_own, end_real, ends)
                _store(out_corner, known, done, outs[:COLUMNS], (), False, None, OUT_PIXEL)
                out_corner += stride_y
                outs = outs[COLUMNS:] + _filled(zero, COLUMNS)
    outs = block * CHANNELS + tl.arange(0, CHANNELS)
    for tap in tl.static_range(K * K + HAS_BIAS):
        place = (part * (K * K + 1) + tap) * DIM + outs
        tl.store(parts_ptr + place, tl.sum(sums[tap], 0), mask=outs < DIM)


def _as_map(x: Tensor) -> Tensor:
    """The kernels step through channels one by one, over pixels by a constant; other layouts are copied."""
    stride = x.stride(2)
    if x.stride(3) == 1 and stride % x.shape[3] == 0 and stride <= 4 * x.shape[3]:
        return _in_words(x)
    return x.contiguous()


def _in_words(x: Tensor) -> Tensor:
    """x, or a copy of it where channels cannot be loaded as words of 32 bits though they are an even number of 16."""
    if _word_of(x) == 1:
        return x
    begin = 0 if isinstance(x, FakeTensor) else x.data_ptr() // 2
    is_even = not any(n % 2 for n in (begin, *x.stride()[:-1]))
    return x if is_even else x.clone(memory_format=torch.contiguous_format)


def _word_of(x: Tensor) -> int:
    """Channels that are loaded at once: two of 16 bits are one word."""
    return 2 if x.element_size() == 2 and x.shape[-1] % 2 == 0 else 1


def _tile(tiles: dict[int, Tile], kernel_size: int, x: Tensor) -> Tile:
    """How a map is cut. Of 32 bits, rows under way would take twice the registers."""
    tile = tiles[kernel_size]
    return tile._replace(step=1) if x.element_size() == 4 else tile


def _tile_options(tile: Tile, x: Tensor) -> dict[str, Any]:
    """What the kernels' tiles have in common."""
    dim = x.shape[3]
    channels = math.gcd(dim, 64)
    if channels < 16:  # no whole tiles: masked ones
        channels = max(16, min(64, triton.next_power_of_2(dim)))
    channels = min(channels, 32 * tile.warps * tile.channels)
    return {
        "DIM": dim,
        "COLUMNS": tile.columns,
        "STEP": tile.step,
        "maxnreg": tile.registers,
        "CHANNELS": channels,
        "STRIPS": 32 * tile.warps * tile.channels // channels,
        "WORD": _word_of(x),
        "num_warps": tile.warps,
        "num_stages": 1,
    }


def _strides(x: Tensor, word: int) -> tuple[int, int]:
    """From image to image and from row to row, in words."""
    return x.stride(0) // word, x.stride(1) // word


def _pixel_distance(x: Tensor) -> int:
    """Of a map whose pixels all lie at one distance; the stride of an axis of one pixel says nothing."""
    return next((x.stride(axis) for axis in (2, 1, 0) if x.shape[axis] > 1), x.shape[3])


def _shares(n_strips: int, height: int, halo: int, tile: Tile, options: dict[str, Any]) -> tuple[int, int]:
    """How the rows of all strips are shared out: rows of a program, and programs.

    A strip that is cut costs up to `halo` rows more.
    """
    n_rows = triton.cdiv(n_strips, options["STRIPS"]) * height
    n_blocks = triton.cdiv(options["DIM"], options["CHANNELS"])
    rows = max(tile.rows, triton.cdiv(n_rows * n_blocks * tile.warps, tile.most_warps))
    whole = triton.cdiv(rows, height) * height
    if whole <= rows + halo:
        rows = whole
    return rows, triton.cdiv(n_rows, rows) * n_blocks


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad_value: Tensor | None = None,
    pads: Sequence[int] = (0, 0),
    other: Tensor | None = None,
    role: str | None = None,
    gelu: bool = False,
    turned: bool = False,
    skip: bool = False,
    size: Sequence[int] | None = None,
    origin: Sequence[int] = (0, 0),
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One launch; `role` says what happens to `other`, `size` and `origin` cut another window than the map itself.

    `out` receives the result, if it is given: all its pixels lie at one distance. It may be `other`.
    """
    x = _as_map(x)
    batch, height, width, dim = x.shape
    out_height, out_width = (height, width) if size is None else size
    if out is None:
        out = torch.empty((batch, out_height, out_width, dim), dtype=dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    kernel_size = weight.shape[-1]
    tile = _tile(_TILES, kernel_size, x)
    added = x if other is None else _as_map(other)
    pad = x if pad_value is None else _in_words(pad_value.to(x.dtype))
    options = _tile_options(tile, x)
    word = options["WORD"]
    n_strips = batch * triton.cdiv(out_width, tile.columns)
    rows, n_programs = _shares(n_strips, out_height, kernel_size - 1, tile, options)
    launch(
        _depthwise_conv_kernel, (n_programs,),
        x, contiguous(weight), weight if bias is None else bias, pad, added, out,
        _strides(x, word), _strides(added, word), height, width, *pads, out_height, out_width, *origin, n_strips, rows,
        PIXEL=x.stride(2) // word, OTHER_PIXEL=added.stride(2) // word, OUT_PIXEL=_pixel_distance(out),
        K=kernel_size, TURNED=turned, SKIP=skip,
        HAS_BIAS=bias is not None, HAS_PAD=pad_value is not None, GELU=gelu,
        OTHER=role if other is not None else None, **options,
    )  # fmt: skip
    return out


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_value: Tensor | None,
    pads: Sequence[int],
    d_x: Tensor | None,
    skip: bool,
) -> Tensor:
    """The programs' sums of the filter's gradient; fills the gradient of x, if it is given."""
    batch, height, width, dim = x.shape
    kernel_size = weight.shape[-1]
    tile = _tile(_GRADIENT_TILES, kernel_size, x)
    pad = x if pad_value is None else _in_words(pad_value.to(x.dtype))
    options = _tile_options(tile, x)
    word = options["WORD"]
    n_strips = batch * triton.cdiv(width + pads[1], tile.columns)
    rows, n_programs = _shares(n_strips, height + pads[0], kernel_size - 1, tile, options)
    n_parts = n_programs // triton.cdiv(dim, options["CHANNELS"])
    parts = torch.empty((n_parts, kernel_size**2 + 1, dim), dtype=torch.float32, device=x.device)
    out = x if d_x is None else d_x
    launch(
        _gradients_kernel, (n_programs,),
        x, grad, contiguous(weight), pad, out, parts, _strides(x, word), _strides(grad, word),
        height, width, *pads, n_strips, rows,
        PIXEL=x.stride(2) // word, GRAD_PIXEL=grad.stride(2) // word, OUT_PIXEL=_pixel_distance(out),
        K=kernel_size, OF_MAP=d_x is not None, SKIP=skip,
        HAS_BIAS=bias is not None, HAS_PAD=pad_value is not None, **options,
    )  # fmt: skip
    return parts


def _add_parts(parts: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the filter and of the bias (empty if there is none) from sums (parts, K * K + 1, C)."""
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    d_bias = empty_gradient(weight) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    n_parts, sums, dim = parts.shape
    launch(
        add_parts_kernel, (sums - (bias is None), triton.cdiv(dim, 16)), parts, d_weight, d_bias, n_parts,
        HAS_BIAS=bias is not None, DIM=dim, TAPS=sums - 1, PARTS=_PARTS, CHANNELS=16, num_warps=4,
    )  # fmt: skip
    return d_weight, d_bias


def _pad_gradient(grad: Tensor, weight: Tensor, pads: Sequence[int]) -> Tensor:
    """Gradient of what the padding holds: the map's gradient, summed over what lies below and beside the map."""
    height, width = grad.shape[1:3]
    reach = weight.shape[-1] // 2
    bottom, right = min(pads[0], reach), min(pads[1], reach)
    below = _convolve(
        grad, weight, turned=True, size=(bottom, width + right), origin=(height, 0), dtype=torch.float32
    )  # fmt: skip
    beside = _convolve(grad, weight, turned=True, size=(height, right), origin=(0, width), dtype=torch.float32)
    return below.sum((0, 1, 2)) + beside.sum((0, 1, 2))


def depthwise_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_value: Tensor | None,
    residual: Tensor | None,
    pads: Sequence[int],
    gelu: bool,
    skip: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Fused forward; arguments as in `depthwise_conv_reference`.

    `out` receives the result, if it is given: contiguous, or the part of a contiguous tensor that holds every pixel's
    channels beside others. It may be `residual`.
    """
    if skip and gelu:  # behind GELU the input cannot be part of the filter
        residual = x if residual is None else residual + x
    skip = skip and not gelu
    return _convolve(x, weight, bias, pad_value, pads, residual, "add", gelu=gelu, skip=skip, out=out)


def depthwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_value: Tensor | None,
    pads: Sequence[int],
    gelu: bool,
    skip: bool,
    d_x: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused gradients of x, weight, bias and pad_value, empty for those that are absent.

    `d_x` receives that of x, if it is given; it may lie as the result of `depthwise_conv_forward`.
    """
    if x.numel() == 0:
        zeros = [zeros_or_empty(x, tensor) for tensor in (x, weight, bias, pad_value)]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    passed = grad if skip and gelu else None
    if gelu:
        grad = _convolve(x, weight, bias, pad_value, pads, grad, "slope")
    x, grad = _as_map(x), _as_map(grad)
    if d_x is None:
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    is_joint = weight.shape[-1] in _JOINT_SIZES and passed is None
    parts = _gradients(grad, x, weight, bias, pad_value, pads, d_x if is_joint else None, skip)
    if not is_joint:
        _convolve(grad, weight, other=passed, role="add", turned=True, skip=skip and not gelu, out=d_x)
    d_pad = empty_gradient(x) if pad_value is None else _pad_gradient(grad, weight, pads).to(pad_value.dtype)
    return d_x, *_add_parts(parts, weight, bias), d_pad
