"""Triton kernel of depth-wise convolution on tensor cores: the gradient of 7x7 filters, for 16-bit maps.

Index map. For one channel the products of all pairs of an input column and an output column, summed over rows and
images, are a matrix product D (16, 8) for each row of the filter; the filter's gradient are sums along D's diagonals.
44% of the products are of use with 7x7, at sixteen times the rate of float32's.

Tiling. A warp owns two or four channels and walks down eight bands of rows, 16 outputs wide. Fragments of PTX's
`mma.m16n8k16` are made in registers: every thread loads a pixel's channels at once, in one word, and pairs those of
neighbouring bands, so that nothing goes through shared memory. Tiles have one element a thread: Triton then keeps
element n in thread n, which the instruction relies on. D's second eight contracted places are the bands' right halves,
whose left columns are the left halves' right ones. The last K - 1 rows of `grad` stay in registers, the next row's
loads are under way.

Numerics. Products are exact, sums float32. A NaN or an infinity in the map reaches all taps of its channel.
The interpreter has no tensor cores: `_emulated` stands in.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, batch 64, CUDA-graph replay), microseconds with the
addition of the parts: 7x7 56x56x96 62.7, 28x28x192 50.3, 14x14x384 25.2; two channels a thread in place of four 101,
64.7 and 40.7: time goes by the number of loads, whose lanes all meet a line of their own. With 3x3 46.5, 32.7 and
17.9, with 5x5 57.0, 41.1 and 23.0; patches in registers, by the difference of whole backwards, take no longer there.

Tried and rejected: the convolution itself in this form (bands of Toeplitz matrices, same loads, 8-byte stores): 3x3
108 microseconds, 5x5 with residual 164, 7x7 with GELU 116 for 56x56x96, against 33, 70 and 105 of patches in
registers. Exchanging channels through shared memory before the stores, so that whole sectors are written, changed
nothing; two channels a thread doubled the time. All rows unrolled: 60 seconds of compilation in place of 4.
"""

# Kernels build tuples by adding to them: they cannot unpack.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

_EMULATED = tl.constexpr(triton.knobs.runtime.interpret)
COLUMNS = tl.constexpr(16)  # outputs of a band side by side: two blocks of eight
_BANDS = tl.constexpr(8)  # of a warp


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
    elif tl.bfloat16 == TYPE:
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
def _four(tiles, first: tl.constexpr):
    """A channel's numbers of C."""
    return (tiles[first], tiles[first + 1], tiles[first + 2], tiles[first + 3])


@triton.jit
def _band(number, n_bands, height, rows):
    """(image, first row) of bands of rows, which go through all images."""
    bands = tl.cdiv(height, rows)
    # Bands behind the last one lie below every map: their masks are empty without a condition of their own.
    return number // bands, tl.where(number < n_bands, number % bands * rows, 1 << 29)


@triton.jit
def _load_bands(
    even, odd, even_y, odd_y, x, height, end, COUNT: tl.constexpr, PIXEL: tl.constexpr, CHANNELS: tl.constexpr
):
    """COUNT columns, eight apart, of a row of two bands; groups of channels, the even band's and the odd one's."""
    even_end = tl.where(even_y.to(tl.uint32) < height.to(tl.uint32), end, 0).to(tl.uint32)
    odd_end = tl.where(odd_y.to(tl.uint32) < height.to(tl.uint32), end, 0).to(tl.uint32)
    groups = ()
    for i in tl.static_range(COUNT):
        column = (x + 8 * i).to(tl.uint32)
        groups = groups + (
            tl.load(even + 8 * i * PIXEL, mask=column < even_end, other=0),
            tl.load(odd + 8 * i * PIXEL, mask=column < odd_end, other=0),
        )
    return groups


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


@triton.jit
def _corner(ptr, strides, image, y, x, channel, PIXEL: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers to a group of channels of pixel (y, x)."""
    place = image.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * PIXEL
    return _words(ptr, CHANNELS) + place + channel // CHANNELS


@triton.jit(do_not_specialize=["height", "width", "n_bands", "n_parts", "rows"])
def matrix_gradient_kernel(
    x_ptr, grad_ptr, parts_ptr, x_strides, grad_strides, height, width, n_bands, n_parts, rows,
    DIM: tl.constexpr, PIXEL: tl.constexpr, GRAD_PIXEL: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program's sums of `grad * x` at every tap, then of `grad`: (parts, K * K + 1, DIM)."""
    n_blocks: tl.constexpr = (DIM + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)
    block = tl.program_id(0) % n_blocks
    part = tl.program_id(0) // n_blocks
    warp, group, lane = _lanes(WARPS)
    channel = (block * WARPS + warp) * CHANNELS
    exists = (channel < DIM) | (DIM % (CHANNELS * WARPS) == 0)
    blocks_x = tl.cdiv(width, COLUMNS)
    zero = tl.zeros((32 * WARPS,), tl.float32)
    sums = ()
    for _ in tl.static_range((K + 1 if HAS_BIAS else K) * CHANNELS * 4):
        sums = sums + (zero,)
    one: tl.constexpr = 0x3F803F80 if tl.bfloat16 == TYPE else 0x3C003C00
    ones = tl.full((32 * WARPS,), one, tl.int32)
    for tile in range(part, tl.cdiv(n_bands, _BANDS) * blocks_x, n_parts):
        # Here groups have neighbouring columns, lanes of a group have pairs of bands.
        first_band = tile // blocks_x * _BANDS + 2 * lane
        even_image, even_y = _band(first_band, n_bands, height, rows)
        odd_image, odd_y = _band(first_band + 1, n_bands, height, rows)
        x = tile % blocks_x * COLUMNS + group
        in_x = x - K // 2
        grad_end = tl.where(exists, width, 0)
        in_end = tl.minimum(grad_end, tile % blocks_x * COLUMNS + COLUMNS + K // 2)
        even_grad = _corner(grad_ptr, grad_strides, even_image, even_y, x, channel, GRAD_PIXEL, CHANNELS)
        odd_grad = _corner(grad_ptr, grad_strides, odd_image, odd_y, x, channel, GRAD_PIXEL, CHANNELS)
        even_in = _corner(x_ptr, x_strides, even_image, even_y - K // 2, in_x, channel, PIXEL, CHANNELS)
        odd_in = _corner(x_ptr, x_strides, odd_image, odd_y - K // 2, in_x, channel, PIXEL, CHANNELS)
        # Rows of gradients that the next row of inputs meets: the K - 1 last ones.
        grads = ()
        for _ in tl.static_range((K - 1) * 2 * CHANNELS):
            grads = grads + (tl.zeros((32 * WARPS,), tl.int32),)
        grad_ahead = _load_bands(
            even_grad, odd_grad, even_y, odd_y, x, height, grad_end, 2, GRAD_PIXEL, CHANNELS
        )  # fmt: skip
        ahead = _load_bands(
            even_in, odd_in, even_y - K // 2, odd_y - K // 2, in_x, height, in_end, 3, PIXEL, CHANNELS
        )  # fmt: skip
        for row in range(rows + K - 1):
            pixels = ()
            for third in tl.static_range(3):
                pixels = pixels + _pairs(ahead[2 * third], ahead[2 * third + 1], CHANNELS)
            for half in tl.static_range(2):
                grads = grads + _pairs(grad_ahead[2 * half], grad_ahead[2 * half + 1], CHANNELS)
            even_grad += grad_strides[1]
            odd_grad += grad_strides[1]
            even_in += x_strides[1]
            odd_in += x_strides[1]
            grad_ahead = _load_bands(
                even_grad, odd_grad, even_y + row + 1, odd_y + row + 1, x, height,
                tl.where(row + 1 < rows, grad_end, 0), 2, GRAD_PIXEL, CHANNELS,
            )  # fmt: skip
            ahead = _load_bands(
                even_in, odd_in, even_y + (row + 1 - K // 2), odd_y + (row + 1 - K // 2), in_x, height,
                in_end, 3, PIXEL, CHANNELS,
            )  # fmt: skip
            updated = ()
            for tap in tl.static_range(K):
                for c in tl.static_range(CHANNELS):
                    total = _four(sums, (tap * CHANNELS + c) * 4)
                    updated = updated + _multiply(
                        pixels[c], pixels[CHANNELS + c], pixels[CHANNELS + c], pixels[2 * CHANNELS + c],
                        grads[(K - 1 - tap) * 2 * CHANNELS + c], grads[((K - 1 - tap) * 2 + 1) * CHANNELS + c],
                        total[0], total[1], total[2], total[3], TYPE,
                    )  # fmt: skip
            if HAS_BIAS:
                for c in tl.static_range(CHANNELS):
                    total = _four(sums, (K * CHANNELS + c) * 4)
                    updated = updated + _multiply(
                        ones, ones, ones, ones,
                        grads[(K - 1) * 2 * CHANNELS + c], grads[((K - 1) * 2 + 1) * CHANNELS + c],
                        total[0], total[1], total[2], total[3], TYPE,
                    )  # fmt: skip
            sums = updated
            grads = grads[2 * CHANNELS :]

    warps = (block * WARPS + tl.arange(0, WARPS)[:, None]) * CHANNELS
    some = (warps < DIM) | (DIM % (CHANNELS * WARPS) == 0)
    for c in tl.static_range(CHANNELS):
        for tap in tl.static_range(K):
            place = (part * (K * K + 1) + tap * K) * DIM + warps + c
            _store_taps(parts_ptr, place, some, _four(sums, (tap * CHANNELS + c) * 4), DIM, K, WARPS)
        if HAS_BIAS:
            total = sums[(K * CHANNELS + c) * 4] + sums[(K * CHANNELS + c) * 4 + 1]
            total = tl.sum(tl.reshape(total, (WARPS, 8, 4)), 2)
            place = (part * (K * K + 1) + K * K) * DIM + warps + c + 0 * tl.arange(0, 8)[None, :]
            tl.store(parts_ptr + place, total, mask=some & (tl.arange(0, 8)[None, :] == 0))
