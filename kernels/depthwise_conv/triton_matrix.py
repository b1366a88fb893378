"""Depth-wise convolution on tensor cores."""

# Kernels build tuples by adding to them: they cannot unpack.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

_EMULATED = tl.constexpr(triton.knobs.runtime.interpret)
COLUMNS = tl.constexpr(16)  # outputs of a patch side by side: two blocks of eight
_BANDS = tl.constexpr(8)  # patches of a warp


@triton.jit
def _lanes(WARPS: tl.constexpr):
    """(warp, group of four lanes, lane of the group) of every thread, (32 * WARPS,) each."""
    thread = tl.arange(0, 32 * WARPS)
    return thread // 32, thread % 32 // 4, thread % 4


@triton.jit
def _halves(word, TYPE: tl.constexpr):
    """The two numbers of a word, in float32."""
    low = (word & 0xFFFF).to(tl.uint16).to(TYPE, bitcast=True)
    high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(TYPE, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _fragment(word, TYPE: tl.constexpr):
    """Words of all threads -> (warps, 8, 8): two numbers a thread, rows are groups of lanes."""
    low, high = _halves(word, TYPE)
    return tl.reshape(tl.join(low, high), (word.shape[0] // 32, 8, 8))


@triton.jit
def _beside(left, right):
    """(warps, 8, 8) twice -> (warps, 8, 16)."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), (left.shape[0], 8, 16))


@triton.jit
def _emulated(a0, a1, a2, a3, b0, b1, TYPE: tl.constexpr):
    """The products of `_multiply` for the interpreter, which has no tensor cores."""
    warps: tl.constexpr = a0.shape[0] // 32
    above = _beside(_fragment(a0, TYPE), _fragment(a2, TYPE))
    below = _beside(_fragment(a1, TYPE), _fragment(a3, TYPE))
    b = _beside(_fragment(b0, TYPE), _fragment(b1, TYPE))[:, None, :, :]
    outs = ()
    for a in tl.static_range(2):
        rows = (above if a == 0 else below)[:, :, None, :]
        left, right = tl.split(tl.reshape(tl.sum(rows * b, 3), (warps, 8, 4, 2)))
        outs = outs + (tl.reshape(left, (warps * 32,)), tl.reshape(right, (warps * 32,)))
    return outs


@triton.jit
def _multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, TYPE: tl.constexpr):
    """C + A B of a warp, A (16, 16) and B (16, 8), in the fragments of PTX's `mma.m16n8k16`; C is float32."""
    if _EMULATED:
        d = _emulated(a0, a1, a2, a3, b0, b1, TYPE)
        return (c0 + d[0], c1 + d[1], c2 + d[2], c3 + d[3])
    elif TYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _pair(first, second, HIGH: tl.constexpr):
    """The low (or high) halves of two words in one."""
    if _EMULATED:
        if HIGH:
            return ((first >> 16) & 0xFFFF) | (second >> 16 << 16)
        return (first & 0xFFFF) | (second << 16)
    elif HIGH:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [first, second], tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _round(low, high, TYPE: tl.constexpr):
    """Two float32 numbers in one word, rounded."""
    if _EMULATED:
        first = low.to(TYPE).to(tl.uint16, bitcast=True).to(tl.int32)
        second = high.to(TYPE).to(tl.uint16, bitcast=True).to(tl.int32)
        return _pair(first, second, False)
    elif TYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _words(ptr, CHANNELS: tl.constexpr):
    """A pointer to groups of channels that one load takes."""
    return ptr.to(tl.pointer_type(tl.int64 if CHANNELS == 4 else tl.int32), bitcast=True)


@triton.jit
def _word(group, number: tl.constexpr):
    """Two channels of a group."""
    return (group >> (32 * number)).to(tl.int32) if number > 0 else group.to(tl.int32)


@triton.jit
def _pairs(first, second, CHANNELS: tl.constexpr):
    """Groups of channels at two places -> a word for each channel, its numbers at both places."""
    words = ()
    for channel in tl.static_range(CHANNELS):
        words = words + (_pair(_word(first, channel // 2), _word(second, channel // 2), channel % 2 == 1),)
    return words


@triton.jit
def _filter_row(weight_ptr, channel, exists, group, lane, row: tl.constexpr, K: tl.constexpr,
                TURNED: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Fragments B of one row of the filters: B[input column k, output column n] = w[k - n]; two words a channel."""
    words = ()
    for channel_ in tl.static_range(CHANNELS):
        for half in tl.static_range(2):
            tap = 8 * half + 2 * lane - group
            place = weight_ptr + (channel + channel_) * (K * K)
            if TURNED:
                place += K * K - 1 - row * K - tap
            else:
                place += row * K + tap
            first = tl.load(place, mask=(tap >= 0) & (tap < K) & exists, other=0)
            second = tl.load(
                place + (-1 if TURNED else 1), mask=(tap >= -1) & (tap < K - 1) & exists, other=0
            )
            words = words + (first.to(tl.int32) | (second.to(tl.int32) << 16),)
    return words


@triton.jit
def _four(tiles, first: tl.constexpr):
    """A channel's numbers of C."""
    return (tiles[first], tiles[first + 1], tiles[first + 2], tiles[first + 3])


@triton.jit
def _identity(group, lane, half: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr):
    """The fragment B of a filter that is one at its centre."""
    one: tl.constexpr = 0x3F80 if TYPE == tl.bfloat16 else 0x3C00
    tap = 8 * half + 2 * lane - group
    return tl.where(tap == K // 2, one, 0) | tl.where(tap + 1 == K // 2, one << 16, 0)


@triton.jit
def _band(number, n_bands, rows, ROWS: tl.constexpr):
    """(image, first row) of bands of rows, which go through all images."""
    bands = tl.cdiv(rows, ROWS)
    # Bands behind the last one lie below every map: their masks are empty without a condition of their own.
    return number // bands, tl.where(number < n_bands, number % bands * ROWS, 1 << 29)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit(do_not_specialize=["height", "width", "n_bands"])
def _matrix_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, other_ptr, out_ptr, x_strides, other_strides, height, width, n_bands,
    DIM: tl.constexpr, PIXEL: tl.constexpr, OTHER_PIXEL: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr,
    SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, OTHER: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr, EXCHANGE: tl.constexpr,
):  # fmt: skip
    n_blocks: tl.constexpr = (DIM + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)
    blocks_x = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    block = program % n_blocks
    block_x = program // n_blocks % blocks_x
    first_band = program // n_blocks // blocks_x * _BANDS
    warp, group, lane = _lanes(WARPS)
    channel = (block * WARPS + warp) * CHANNELS
    exists = (channel < DIM) | (DIM % (CHANNELS * WARPS) == 0)
    image, out_y = _band(first_band + group, n_bands, height, ROWS)

    typed = weight_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    weights = ()
    for row in tl.static_range(K):
        weights = weights + _filter_row(typed, channel, exists, group, lane, row, K, TURNED, CHANNELS)
    sums = ()
    for channel_ in tl.static_range(CHANNELS):
        start = tl.zeros((32 * WARPS,), tl.float32)
        if HAS_BIAS:
            start = tl.load(bias_ptr + channel + channel_, mask=exists, other=0.0).to(tl.float32)
        sums = sums + (start, start, start, start)
    start = sums
    for _ in tl.static_range(ROWS - 1):
        sums = sums + start

    # Input: lanes of a group have neighbouring pairs of columns, groups have bands.
    in_x = block_x * COLUMNS - K // 2 + 2 * lane
    in_y = out_y - K // 2
    corner = _words(x_ptr, CHANNELS) + (
        image.to(tl.int64) * x_strides[0] + in_y.to(tl.int64) * x_strides[1]
        + in_x.to(tl.int64) * PIXEL + channel // CHANNELS
    )  # fmt: skip
    right = tl.where(exists, tl.minimum(width, block_x * COLUMNS + COLUMNS + K // 2), 0)
    for row in tl.static_range(ROWS + K - 1):
        end = tl.where((in_y + row).to(tl.uint32) < height.to(tl.uint32), right, 0).to(tl.uint32)
        place = corner + row * x_strides[1]
        words = ()
        for third in tl.static_range(3):
            first = tl.load(place + (8 * third) * PIXEL, mask=(in_x + 8 * third).to(tl.uint32) < end, other=0)
            second = tl.load(
                place + (8 * third + 1) * PIXEL, mask=(in_x + (8 * third + 1)).to(tl.uint32) < end, other=0
            )
            words = words + _pairs(first, second, CHANNELS)
        updated = ()
        for out in tl.static_range(ROWS):
            for c in tl.static_range(CHANNELS):
                total = _four(sums, (out * CHANNELS + c) * 4)
                if row >= out and row < out + K:
                    total = _multiply(
                        words[c], words[CHANNELS + c], words[CHANNELS + c], words[2 * CHANNELS + c],
                        weights[((row - out) * CHANNELS + c) * 2], weights[((row - out) * CHANNELS + c) * 2 + 1],
                        total[0], total[1], total[2], total[3], TYPE,
                    )  # fmt: skip
                    if SKIP and row - out == K // 2:
                        total = _multiply(
                            words[c], words[CHANNELS + c], words[CHANNELS + c], words[2 * CHANNELS + c],
                            _identity(group, lane, 0, K, TYPE), _identity(group, lane, 1, K, TYPE),
                            total[0], total[1], total[2], total[3], TYPE,
                        )  # fmt: skip
                updated = updated + (total[0], total[1], total[2], total[3])
        sums = updated

    x = block_x * COLUMNS + 2 * lane
    pixel: tl.constexpr = DIM // CHANNELS
    stride_y = width.to(tl.int64) * pixel
    corner = _words(out_ptr, CHANNELS) + (
        image.to(tl.int64) * height * stride_y + out_y.to(tl.int64) * stride_y
        + x.to(tl.int64) * pixel + channel // CHANNELS
    )  # fmt: skip
    if OTHER is not None:
        other_corner = _words(other_ptr, CHANNELS) + (
            image.to(tl.int64) * other_strides[0] + out_y.to(tl.int64) * other_strides[1]
            + x.to(tl.int64) * OTHER_PIXEL + channel // CHANNELS
        )  # fmt: skip
    for row in tl.static_range(ROWS):
        for column in tl.static_range(4):  # the numbers of C: two columns of the left block, two of the right one
            inside = (out_y + row < height) & (x + (column // 2 * 8 + column % 2) < width) & exists
            values = ()
            for c in tl.static_range(CHANNELS):
                value = sums[(row * CHANNELS + c) * 4 + column]
                values = values + ((_gelu(value) if GELU else value),)
            if OTHER is not None:
                loaded = tl.load(other_corner + row * other_strides[1] + (column // 2 * 8 + column % 2) * OTHER_PIXEL, mask=inside, other=0)
                finished = ()
                for c in tl.static_range(CHANNELS // 2):
                    low, high = _halves(_word(loaded, c), TYPE)
                    if OTHER == "add":
                        finished = finished + (values[2 * c] + low, values[2 * c + 1] + high)
                    else:
                        finished = finished + (
                            low * _gelu_slope(values[2 * c]), high * _gelu_slope(values[2 * c + 1])
                        )
                values = finished
            packed = _round(values[0], values[1], TYPE)
            if CHANNELS == 4:
                packed = (packed.to(tl.int64) & 0xFFFFFFFF) | (_round(values[2], values[3], TYPE).to(tl.int64) << 32)
            place = corner + row * stride_y + (column // 2 * 8 + column % 2) * pixel
            if EXCHANGE:
                # Neighbouring lanes get neighbouring channels, so that whole sectors are written.
                packed = tl.trans(tl.reshape(packed, (WARPS, 32)))
                place = tl.trans(tl.reshape(place, (WARPS, 32)))
                inside = tl.trans(tl.reshape(inside, (WARPS, 32)))
            tl.store(place, packed, mask=inside)


@triton.jit
def _pixels(even, odd, even_end, odd_end, x, first: tl.constexpr, PIXEL: tl.constexpr, CHANNELS: tl.constexpr):
    """A column of two bands -> words of both bands' numbers, one a channel."""
    column = (x + first).to(tl.uint32)
    one = tl.load(even + first * PIXEL, mask=column < even_end, other=0)
    two = tl.load(odd + first * PIXEL, mask=column < odd_end, other=0)
    return _pairs(one, two, CHANNELS)


@triton.jit
def _store_taps(parts_ptr, place, exists, values, DIM: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr):
    """Sums along the diagonals of D (16 input columns, 8 output columns): a row of the filter's gradient.

    `place` (WARPS, 1) is that of the row's first tap.
    """
    _, group, lane = _lanes(WARPS)
    total = tl.zeros((32 * WARPS,), tl.float32)
    for side in tl.static_range(2):
        row = group + 2 * lane + side  # of D, on the diagonal that this group takes
        source = tl.reshape(row % 8 * 4 + lane, (WARPS, 32))
        above = tl.gather(tl.reshape(values[side], (WARPS, 32)), source, 1)
        below = tl.gather(tl.reshape(values[2 + side], (WARPS, 32)), source, 1)
        total += tl.where(row < 8, tl.reshape(above, (32 * WARPS,)), tl.reshape(below, (32 * WARPS,)))
    tap = tl.arange(0, 8)[None, :]
    tl.store(parts_ptr + place + tap * DIM, tl.sum(tl.reshape(total, (WARPS, 8, 4)), 2), mask=exists & (tap < K))


@triton.jit(do_not_specialize=["height", "width", "n_bands", "n_parts"])
def _matrix_gradient_kernel(
    x_ptr, grad_ptr, parts_ptr, x_strides, grad_strides, height, width, n_bands, n_parts,
    DIM: tl.constexpr, PIXEL: tl.constexpr, GRAD_PIXEL: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program's sums of `grad * x` at every tap, then of `grad`: (parts, K * K + 1, DIM)."""
    n_blocks: tl.constexpr = (DIM + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)
    block = tl.program_id(0) % n_blocks
    part = tl.program_id(0) // n_blocks
    warp, group, lane = _lanes(WARPS)
    channel = (block * WARPS + warp) * CHANNELS
    exists = (channel < DIM) | (DIM % (CHANNELS * WARPS) == 0)
    blocks_x = tl.cdiv(width, COLUMNS)
    sums = ()
    for _ in tl.static_range((K + 1) * CHANNELS * 4):
        sums = sums + (tl.zeros((32 * WARPS,), tl.float32),)
    one: tl.constexpr = 0x3F803F80 if TYPE == tl.bfloat16 else 0x3C003C00
    ones = tl.full((32 * WARPS,), one, tl.int32)
    for tile in range(part, tl.cdiv(n_bands, _BANDS) * blocks_x, n_parts):
        # Here groups have neighbouring columns, lanes of a group have pairs of bands.
        first_band = tile // blocks_x * _BANDS + 2 * lane
        even_image, even_y = _band(first_band, n_bands, height, ROWS)
        odd_image, odd_y = _band(first_band + 1, n_bands, height, ROWS)
        x = tile % blocks_x * COLUMNS + group
        real_width = tl.where(exists, width, 0)

        words = _words(grad_ptr, CHANNELS) + channel // CHANNELS + x.to(tl.int64) * GRAD_PIXEL
        even = words + even_image.to(tl.int64) * grad_strides[0] + even_y.to(tl.int64) * grad_strides[1]
        odd = words + odd_image.to(tl.int64) * grad_strides[0] + odd_y.to(tl.int64) * grad_strides[1]
        grads = ()
        for row in tl.static_range(ROWS):
            even_end = tl.where(even_y + row < height, real_width, 0).to(tl.uint32)
            odd_end = tl.where(odd_y + row < height, real_width, 0).to(tl.uint32)
            for half in tl.static_range(2):
                grads = grads + _pixels(
                    even + row * grad_strides[1], odd + row * grad_strides[1], even_end, odd_end, x,
                    8 * half, GRAD_PIXEL, CHANNELS,
                )  # fmt: skip

        x -= K // 2
        even_y -= K // 2
        odd_y -= K // 2
        words = _words(x_ptr, CHANNELS) + channel // CHANNELS + x.to(tl.int64) * PIXEL
        even = words + even_image.to(tl.int64) * x_strides[0] + even_y.to(tl.int64) * x_strides[1]
        odd = words + odd_image.to(tl.int64) * x_strides[0] + odd_y.to(tl.int64) * x_strides[1]
        right = tl.minimum(real_width, tile % blocks_x * COLUMNS + COLUMNS + K // 2)
        for row in tl.static_range(ROWS + K - 1):
            even_end = tl.where((even_y + row).to(tl.uint32) < height.to(tl.uint32), right, 0).to(tl.uint32)
            odd_end = tl.where((odd_y + row).to(tl.uint32) < height.to(tl.uint32), right, 0).to(tl.uint32)
            pixels = ()
            for third in tl.static_range(3):
                pixels = pixels + _pixels(
                    even + row * x_strides[1], odd + row * x_strides[1], even_end, odd_end, x,
                    8 * third, PIXEL, CHANNELS,
                )  # fmt: skip
            updated = ()
            for tap in tl.static_range(K + 1):
                for c in tl.static_range(CHANNELS):
                    total = _four(sums, (tap * CHANNELS + c) * 4)
                    if tap < K and row >= tap and row < tap + ROWS:
                        total = _multiply(
                            pixels[c], pixels[CHANNELS + c], pixels[CHANNELS + c], pixels[2 * CHANNELS + c],
                            grads[(row - tap) * 2 * CHANNELS + c], grads[((row - tap) * 2 + 1) * CHANNELS + c],
                            total[0], total[1], total[2], total[3], TYPE,
                        )  # fmt: skip
                    if HAS_BIAS and tap == K and row < ROWS:
                        total = _multiply(
                            ones, ones, ones, ones,
                            grads[row * 2 * CHANNELS + c], grads[(row * 2 + 1) * CHANNELS + c],
                            total[0], total[1], total[2], total[3], TYPE,
                        )  # fmt: skip
                    updated = updated + (total[0], total[1], total[2], total[3])
            sums = updated

    warps = (block * WARPS + tl.arange(0, WARPS)[:, None]) * CHANNELS
    some = (warps < DIM) | (DIM % (CHANNELS * WARPS) == 0)
    for c in tl.static_range(CHANNELS):
        for tap in tl.static_range(K):
            place = (part * (K * K + 1) + tap * K) * DIM + warps + c
            _store_taps(parts_ptr, place, some, _four(sums, (tap * CHANNELS + c) * 4), DIM, K, WARPS)
        total = sums[(K * CHANNELS + c) * 4] + sums[(K * CHANNELS + c) * 4 + 1]
        total = tl.sum(tl.reshape(total, (WARPS, 8, 4)), 2)
        place = (part * (K * K + 1) + K * K) * DIM + warps + c + 0 * tl.arange(0, 8)[None, :]
        tl.store(parts_ptr + place, total, mask=some & (tl.arange(0, 8)[None, :] == 0))
