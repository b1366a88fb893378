"""Triton kernels of varied-size window attention: index map, tiling, numerics, roofline and what was tried.

Index map. A window's token t stands at row t // ww and column t % ww of its window; the window's place minus the
padding at the start is a pixel. Queries whose pixel lies outside the map are neither read nor written. The key and the
value of token t are mixed from the four pixels around a point, (centre + offset + stretch * place) along each axis;
pixels outside the map are zeros.

Tiling. A window of at most 64 tokens is one tile. In the forward and the first backward kernel a program keeps one
head's bias in registers and walks over windows; neighbouring programs work on the heads of the same windows. They
gather the samples' four pixels row by row, which the caches serve: a pixel has a share in about four samples.
The first backward kernel leaves the gradients of the sampled keys and values, rounded to the inputs' dtype, in a
workspace. The gradient of a coordinate takes the product of a sample's gradient with each of its four pixels: the
diagonals of products of 16 samples with 16 pixels, one for each warp, whose operands threads have as they load them
(for float32 a plain sum).
The second has one tile of 8 x 8 pixels and one head a program. It tries all windows of the image, 32 at once, by the
rectangle that their samples span, and visits those that reach the tile in raster order: the matrix of bilinear
weights, computed in the registers in which the product takes it, times the samples' gradients. So nothing is
scattered, sorted or added atomically, any number of samples may fall on one pixel, and results do not depend on the
schedule.

Numerics. Coordinates, bilinear mixtures, logits, softmax and all sums are float32; samples, attention weights and, in
the second backward kernel, bilinear weights are rounded to the inputs' dtype before they enter a product. float32
inputs use full float32 products. The backward samples and attends anew, so that no result of the forward is needed.
Where a coordinate is whole, its gradient is that from above. A window with a coordinate that is NaN gives the map no
gradient; a NaN in a window's gradients spreads over the tiles of pixels that the window reaches.

Roofline. The forward must move four maps (q, k, v, out), 154 MB at batch 64, 56 x 56 x 96 and bfloat16: 0.05 ms at
3 TB/s. The backward must move seven, and with the workspace eleven. A window and head takes about 1,000 instructions
of each of 128 threads in the forward, 1,500 in the first backward kernel, and 210 for each tile it reaches in the
second: all three are bound by instructions issued and by latency rather than by bytes.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, batch 64, 7 x 7, CUDA-graph replay), milliseconds forward /
forward and backward, in one run with the kernels of before, which took 1,140, 2,270 and 440 instructions: 56 x 56 x 96,
3 heads 0.090 / 0.446, before 0.101 / 0.541; 28 x 28 x 192, 6 heads 0.049 / 0.245, before 0.054 / 0.297. The first
backward kernel takes 0.24 and 0.125 of it, the second 0.104 and 0.056. Three programs a multiprocessor gain nothing.

What was tried, by code compiled for sm_90 (triton 3.6, bfloat16, D = 32, 7 x 7) and, where it says so, times:

=================================================  =====================================================================
idea                                               what came of it
=================================================  =====================================================================
8 warps a window in the first backward kernel      each half computes the whole 64 x 64 tile: as many registers, twice
                                                   the instructions
bias read anew for each window of the backward     its 32 addresses a thread take the registers that it leaves
bias gradient stored without padding to the tile   offsets and masks stay in registers across the loop: spills
hoisting of loop invariants in the backward        addresses in shared memory stay in registers across the loop: spills
pixels kept in registers for the gradients of      taken: 64 registers for a while, but no second address and load
coordinates
pixels read again for them                         190 instructions more; fits 3 programs a multiprocessor (168
                                                   registers, 72 bytes spilled); wide heads do so
sums over channels of pixels as float32            370 instructions more: they unpack the pixels a second time
sums over channels in the products' layout         converts eight tiles
derivatives of samples kept instead of pixels      290 instructions more, 120 bytes spilled: four tiles change layout
products of those with weights and logits' slopes  550 instructions more: eight products of 64 x 64 with 64 x 32
pixels as the first operand of their products      130 moves: its registers are those of two loads, mixed
a log-sum-exp and samples saved by the forward     not built: some 100 and 450 instructions fewer, but a larger operator
                                                   that keeps two more maps for the backward
windows' places by division, 64-bit offsets in     160 instructions more; places are counted along, and offsets have 64
an image                                           bits (130 instructions) only where an image is that large
one sum over tokens for each of four results       three more rounds of barriers than one sum of all four
the second kernel's weights in shared memory       38 stores of two bytes and 6 barriers a visit
those weights in pairs of samples                  taken: the layout that results is that of the product's operand
a tile for 2 warps                                 older tensor-core instructions: 64 and 100 moves, 660 in all a visit
64 windows tried at once                           their search crosses warps: three more barriers a visit
tiles of 16 x 8 pixels                             320 instructions a visit, 128 registers
loads of the next window ahead                     0.093 ms forward, not 0.163: taken. Backward 1,630 instructions, 100
                                                   bytes spilled: 2 % slower; the second kernel as well
samples sorted by pixel, then lists for pixels     not built: the sort and four gathers of every sample's gradients
                                                   move more than the tiles' products
=================================================  =====================================================================
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.gradients import empty_gradient
from vitrail.kernels._common.launch import Config, launch, map_strides, multiprocessors, unit_stride
from vitrail.kernels._common.triton import shares, sum_of_parts

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _unbounded(offset, stretch, count, place, pad, LENGTH: tl.constexpr):
    """Where along one axis the samples at some places of a window lie, the `count`-th window along that axis."""
    middle = (LENGTH - 1) / 2
    return (count * LENGTH - pad + middle) + offset + stretch * (place - middle)


@triton.jit
def _coordinate(offset, stretch, count, place, size, pad, LENGTH: tl.constexpr):
    """`_unbounded`, kept so near to a map of `size` pixels that it can become an index; all is zero beyond."""
    at = _unbounded(offset, stretch, count, place, pad, LENGTH)
    at = tl.where(at < -2, -2.0, at)  # comparisons keep NaN
    return tl.where(at > size + 1, size + 1.0, at)


@triton.jit
def _neighbour(at):
    """A coordinate's neighbour from below, as an index, and the share of the neighbour from above."""
    low = tl.floor(at)
    return tl.where(low == low, low, -2.0).to(tl.int32), at - low


@triton.jit
def _map_of(ptr, image, head, strides):
    """Pointer to one head of one image in a (B, H, W, heads, D) tensor."""
    return ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]


@triton.jit
def _pixel_rows(map_ptr, y, x, strides, HEAD_DIM: tl.constexpr, FAR: tl.constexpr):
    """Pointers (tokens, HEAD_DIM) to some pixels of a map. FAR: offsets inside a map may need 64 bits."""
    if FAR:
        y, x = y.to(tl.int64), x.to(tl.int64)
    return map_ptr + (y * strides[1] + x * strides[2])[:, None] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _load_pixels(ptr, image, head, y, x, real, strides, HEAD_DIM: tl.constexpr, FAR: tl.constexpr):
    """Rows (tokens, HEAD_DIM) of some pixels of one image and head, zeros where they are not real."""
    pointers = _pixel_rows(_map_of(ptr, image, head, strides), y, x, strides, HEAD_DIM, FAR)
    return tl.load(pointers, mask=real[:, None], other=0.0)


@triton.jit
def _store_pixels(ptr, image, head, y, x, real, strides, values, HEAD_DIM: tl.constexpr, FAR: tl.constexpr):
    """Writes what `_load_pixels` reads."""
    pointers = _pixel_rows(_map_of(ptr, image, head, strides), y, x, strides, HEAD_DIM, FAR)
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _corner(
    map_ptr, at_y, at_x, exists, height, width, strides, DOWN: tl.constexpr, RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Rows (tokens, HEAD_DIM) of a map at one of the four pixels around some points, zeros outside the map."""
    y, _ = _neighbour(at_y)
    x, _ = _neighbour(at_x)
    inside = exists & (y >= -DOWN) & (y < height - DOWN) & (x >= -RIGHT) & (x < width - RIGHT)
    pointers = _pixel_rows(map_ptr, y, x, strides, HEAD_DIM, FAR) + DOWN * strides[1] + RIGHT * strides[2]
    return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def _corners(map_ptr, at_y, at_x, exists, height, width, strides, HEAD_DIM: tl.constexpr, FAR: tl.constexpr):
    """Upper left, upper right, lower left and lower right `_corner`."""
    return (
        _corner(map_ptr, at_y, at_x, exists, height, width, strides, 0, 0, HEAD_DIM, FAR),
        _corner(map_ptr, at_y, at_x, exists, height, width, strides, 0, 1, HEAD_DIM, FAR),
        _corner(map_ptr, at_y, at_x, exists, height, width, strides, 1, 0, HEAD_DIM, FAR),
        _corner(map_ptr, at_y, at_x, exists, height, width, strides, 1, 1, HEAD_DIM, FAR),
    )


@triton.jit
def _mix(corners, at_y, at_x, DTYPE: tl.constexpr):
    """Bilinear interpolation of `_corners`, (tokens, HEAD_DIM)."""
    _, lower = _neighbour(at_y)
    _, right = _neighbour(at_x)
    mixed = corners[0].to(tl.float32) * ((1 - lower) * (1 - right))[:, None]
    mixed += corners[1].to(tl.float32) * ((1 - lower) * right)[:, None]
    mixed += corners[2].to(tl.float32) * (lower * (1 - right))[:, None]
    mixed += corners[3].to(tl.float32) * (lower * right)[:, None]
    return mixed.to(DTYPE)


@triton.jit
def _grouped(x):
    """(tokens,) -> (tokens / 16, 16), tokens in the order of `_grouped_rows`."""
    GROUPS: tl.constexpr = x.shape[0] // 16
    return tl.reshape(tl.permute(tl.reshape(x, (2, GROUPS, 8)), (1, 0, 2)), (GROUPS, 16))


@triton.jit
def _grouped_rows(x):
    """(tokens, channels) -> (tokens / 16, 16, channels), tokens and channels in another order.

    For 64 tokens and 32 channels it is that in which threads that load rows, 16 bytes each, have the operand of a
    product with 16 rows.
    """
    GROUPS: tl.constexpr = x.shape[0] // 16
    CHANNELS: tl.constexpr = x.shape[1]
    parts = tl.permute(tl.reshape(x, (2, GROUPS, 8, CHANNELS // 8, 4, 2)), (1, 0, 2, 4, 3, 5))
    return tl.reshape(parts, (GROUPS, 16, CHANNELS))


@triton.jit
def _row_products(k_rows, v_rows, d_k, d_v):
    """Products of each sample's grouped gradients with its own rows of keys and values, (groups, 16)."""
    k_rows, v_rows = _grouped_rows(k_rows), _grouped_rows(v_rows)
    if d_k.dtype == tl.float32:  # which tensor cores do not take
        return tl.sum(d_k * k_rows + d_v * v_rows, 2)
    products = tl.dot(d_k, tl.permute(k_rows, (0, 2, 1)))
    products = tl.dot(d_v, tl.permute(v_rows, (0, 2, 1)), acc=products)
    own = (tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :])[None, :, :]
    return tl.sum(tl.where(own, products, 0.0), 2)


@triton.jit
def _read_products(
    maps, d_k, d_v, at_y, at_x, exists, height, width, DOWN: tl.constexpr, RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """`_row_products` of one of the four pixels, read for them."""
    k_map, v_map, k_strides, v_strides = maps
    k_rows = _corner(k_map, at_y, at_x, exists, height, width, k_strides, DOWN, RIGHT, HEAD_DIM, FAR)
    v_rows = _corner(v_map, at_y, at_x, exists, height, width, v_strides, DOWN, RIGHT, HEAD_DIM, FAR)
    return _row_products(k_rows, v_rows, d_k, d_v)


@triton.jit
def _slopes(products, at_y, at_x):
    """Gradients of the samples' coordinates, (groups, 16) each, from the `_row_products` of the four pixels."""
    upper_left, upper_right, lower_left, lower_right = products
    _, lower = _neighbour(at_y)
    _, right = _neighbour(at_x)
    lower, right = _grouped(lower), _grouped(right)
    d_y = (1 - right) * (lower_left - upper_left) + right * (lower_right - upper_right)
    d_x = (1 - lower) * (upper_right - upper_left) + lower * (lower_right - lower_left)
    return d_y, d_x


@triton.jit
def _load_bias(ptr, head, tokens, N_TOKENS: tl.constexpr):
    """Bias tile of one head, in units of log2; keys that do not exist have minus infinity."""
    offsets = (head * N_TOKENS + tokens[:, None]) * N_TOKENS + tokens[None, :]
    inside = (tokens[:, None] < N_TOKENS) & (tokens[None, :] < N_TOKENS)
    bias = tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    return tl.where(tokens[None, :] < N_TOKENS, bias, float("-inf"))


@triton.jit
def _weights(q, k, b_bias, exists, scale, HAS_BIAS: tl.constexpr):
    """Softmax weights before their division by their sums, and those sums."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
    if HAS_BIAS:
        logits += b_bias
    else:
        logits = tl.where(exists[None, :], logits, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit
def _moved(ptr, prediction):
    """What is predicted for one window and head, vertically and horizontally, from (B, rows, columns, heads, 2)."""
    return tl.load(ptr + 2 * prediction).to(tl.float32), tl.load(ptr + 2 * prediction + 1).to(tl.float32)


@triton.jit
def _points(
    offsets_ptr, stretch_ptr, prediction, row, column, tokens, height, width, pad_y, pad_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
):  # fmt: skip
    """Vertical and horizontal coordinates of a window's samples in one head, (tokens,) each."""
    down, right = _moved(offsets_ptr, prediction)
    vertical, horizontal = _moved(stretch_ptr, prediction)
    at_y = _coordinate(down, vertical, row, tokens // WINDOW_W, height, pad_y, WINDOW_H)
    at_x = _coordinate(right, horizontal, column, tokens % WINDOW_W, width, pad_x, WINDOW_W)
    return at_y, at_x


@triton.jit
def _place(window, rows, columns):
    """(image, row, column) of a window, by which a number of windows may be counted, too."""
    line = window // columns
    return line // rows, line % rows, window % columns


@triton.jit
def _stepped(place, step, rows, columns):
    """The place of the window that is `step`, a number of windows as `_place` counts them, behind another."""
    image, row, column = place[0] + step[0], place[1] + step[1], place[2] + step[2]
    row += (column >= columns).to(tl.int32)
    column = tl.where(column >= columns, column - columns, column)
    image += (row >= rows).to(tl.int32)
    row = tl.where(row >= rows, row - rows, row)
    return image, row, column


@triton.jit
def _pixels(
    tokens, row, column, height, width, pad_y, pad_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
):  # fmt: skip
    """Where a window's queries stand, and whether that is inside the map."""
    y = row * WINDOW_H - pad_y + tokens // WINDOW_W
    x = column * WINDOW_W - pad_x + tokens % WINDOW_W
    return y, x, (tokens < WINDOW_H * WINDOW_W) & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "pad_y", "pad_x", "n_windows"])
def _varied_window_fwd_kernel(
    q_ptr, k_ptr, v_ptr, offsets_ptr, stretch_ptr, bias_ptr, out_ptr,
    q_strides, k_strides, v_strides, out_strides, height, width, rows, columns, pad_y, pad_x, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One program: one head, every `step`-th window, each a single tile."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % n_heads
    first = tl.program_id(0) // n_heads
    step = tl.num_programs(0) // n_heads
    tokens = tl.arange(0, BLOCK)
    exists = tokens < N_TOKENS
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = _load_bias(bias_ptr, head, tokens, N_TOKENS)
    image, row, column = _place(first, rows, columns)
    step_place = _place(step, rows, columns)
    prediction = first.to(tl.int64) * n_heads + head
    for _ in range(first, n_windows, step):
        at_y, at_x = _points(
            offsets_ptr, stretch_ptr, prediction, row, column, tokens, height, width, pad_y, pad_x, WINDOW_H, WINDOW_W
        )
        y, x, real = _pixels(tokens, row, column, height, width, pad_y, pad_x, WINDOW_H, WINDOW_W)
        q = _load_pixels(q_ptr, image, head, y, x, real, q_strides, HEAD_DIM, FAR)
        k_map, v_map = _map_of(k_ptr, image, head, k_strides), _map_of(v_ptr, image, head, v_strides)
        k_corners = _corners(k_map, at_y, at_x, exists, height, width, k_strides, HEAD_DIM, FAR)
        v_corners = _corners(v_map, at_y, at_x, exists, height, width, v_strides, HEAD_DIM, FAR)
        k, v = _mix(k_corners, at_y, at_x, q.dtype), _mix(v_corners, at_y, at_x, q.dtype)
        weights, total = _weights(q, k, b_bias, exists, scale, HAS_BIAS)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / total[:, None]
        _store_pixels(out_ptr, image, head, y, x, real, out_strides, out, HEAD_DIM, FAR)
        image, row, column = _stepped((image, row, column), step_place, rows, columns)
        prediction += step.to(tl.int64) * n_heads


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "pad_y", "pad_x", "n_windows"])
def _varied_window_bwd_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, offsets_ptr, stretch_ptr, bias_ptr,
    d_q_ptr, d_samples_ptr, d_offsets_ptr, d_stretch_ptr, d_bias_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides,
    height, width, rows, columns, pad_y, pad_x, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, FAR: tl.constexpr,
    READ_AGAIN: tl.constexpr,
):  # fmt: skip
    """Gradients of everything but the maps of keys and values, for which it leaves those of the samples.

    Programs are those of `_varied_window_fwd_kernel`; each writes one partial gradient of the bias.
    """
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % n_heads
    first = tl.program_id(0) // n_heads
    step = tl.num_programs(0) // n_heads
    tokens = tl.arange(0, BLOCK)
    exists = tokens < N_TOKENS
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = _load_bias(bias_ptr, head, tokens, N_TOKENS)
        d_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    image, row, column = _place(first, rows, columns)
    step_place = _place(step, rows, columns)
    prediction = first.to(tl.int64) * n_heads + head
    for _ in tl.range(first, n_windows, step, disable_licm=True):
        at_y, at_x = _points(
            offsets_ptr, stretch_ptr, prediction, row, column, tokens, height, width, pad_y, pad_x, WINDOW_H, WINDOW_W
        )
        y, x, real = _pixels(tokens, row, column, height, width, pad_y, pad_x, WINDOW_H, WINDOW_W)
        q = _load_pixels(q_ptr, image, head, y, x, real, q_strides, HEAD_DIM, FAR)
        grad = _load_pixels(grad_ptr, image, head, y, x, real, grad_strides, HEAD_DIM, FAR)
        k_map, v_map = _map_of(k_ptr, image, head, k_strides), _map_of(v_ptr, image, head, v_strides)
        k_corners = _corners(k_map, at_y, at_x, exists, height, width, k_strides, HEAD_DIM, FAR)
        v_corners = _corners(v_map, at_y, at_x, exists, height, width, v_strides, HEAD_DIM, FAR)
        k, v = _mix(k_corners, at_y, at_x, q.dtype), _mix(v_corners, at_y, at_x, q.dtype)
        weights, total = _weights(q, k, b_bias, exists, scale, HAS_BIAS)
        weights *= (1 / total)[:, None]
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_logits = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None])
        if HAS_BIAS:
            d_bias += d_logits
        d_scores = d_logits.to(q.dtype)
        d_q = tl.dot(d_scores, k, input_precision="ieee") * scale
        _store_pixels(d_q_ptr, image, head, y, x, real, d_q_strides, d_q, HEAD_DIM, FAR)
        d_k = (tl.dot(tl.trans(d_scores), q, input_precision="ieee") * scale).to(q.dtype)
        d_v = tl.dot(tl.trans(weights.to(q.dtype)), grad, input_precision="ieee").to(q.dtype)
        samples = d_samples_ptr + (prediction * N_TOKENS + tokens)[:, None] * (2 * HEAD_DIM)
        samples += tl.arange(0, HEAD_DIM)[None, :]
        tl.store(samples, d_k, mask=exists[:, None])
        tl.store(samples + HEAD_DIM, d_v, mask=exists[:, None])
        if READ_AGAIN:
            at_y, at_x = _points(
                offsets_ptr, stretch_ptr, prediction, row, column, tokens, height, width, pad_y, pad_x,
                WINDOW_H, WINDOW_W,
            )  # fmt: skip
            d_k, d_v = _grouped_rows(d_k), _grouped_rows(d_v)
            maps = (k_map, v_map, k_strides, v_strides)
            products = (
                _read_products(maps, d_k, d_v, at_y, at_x, exists, height, width, 0, 0, HEAD_DIM, FAR),
                _read_products(maps, d_k, d_v, at_y, at_x, exists, height, width, 0, 1, HEAD_DIM, FAR),
                _read_products(maps, d_k, d_v, at_y, at_x, exists, height, width, 1, 0, HEAD_DIM, FAR),
                _read_products(maps, d_k, d_v, at_y, at_x, exists, height, width, 1, 1, HEAD_DIM, FAR),
            )
        else:
            d_k, d_v = _grouped_rows(d_k), _grouped_rows(d_v)
            products = (
                _row_products(k_corners[0], v_corners[0], d_k, d_v),
                _row_products(k_corners[1], v_corners[1], d_k, d_v),
                _row_products(k_corners[2], v_corners[2], d_k, d_v),
                _row_products(k_corners[3], v_corners[3], d_k, d_v),
            )
        d_y, d_x = _slopes(products, at_y, at_x)
        from_middle_y = _grouped(tokens // WINDOW_W - (WINDOW_H - 1) / 2)
        from_middle_x = _grouped(tokens % WINDOW_W - (WINDOW_W - 1) / 2)
        d_moved = tl.join(tl.join(d_y, d_x), tl.join(d_y * from_middle_y, d_x * from_middle_x))
        d_offsets, d_stretch = tl.split(tl.sum(tl.reshape(d_moved, (BLOCK, 2, 2)), 0))
        axes = 2 * prediction + tl.arange(0, 2)
        tl.store(d_offsets_ptr + axes, d_offsets.to(d_offsets_ptr.dtype.element_ty))
        tl.store(d_stretch_ptr + axes, d_stretch.to(d_stretch_ptr.dtype.element_ty))
        image, row, column = _stepped((image, row, column), step_place, rows, columns)
        prediction += step.to(tl.int64) * n_heads
    if HAS_BIAS:
        pairs = (tl.program_id(0) * N_TOKENS + tokens[:, None]) * N_TOKENS + tokens[None, :]
        tl.store(d_bias_ptr + pairs, d_bias, mask=exists[:, None] & exists[None, :])


@triton.jit
def _meets(low, high, first, LENGTH: tl.constexpr):
    """Whether a sample between two coordinates, in any order, can have a neighbour among LENGTH pixels."""
    return (tl.maximum(low, high) > first - 1) & (tl.minimum(low, high) < first + LENGTH)


@triton.jit
def _tents(at, pixel):
    """Shares of pixels in samples along one axis, (pixels, samples); zero for coordinates that are NaN."""
    return tl.maximum(1 - tl.abs(at[None, :] - pixel[:, None].to(tl.float32)), 0.0)


@triton.jit
def _shares(
    moved, row, column, chunk, pixel_y, pixel_x, pad_y, pad_x,
    CHUNK_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Bilinear weights of pixels in a chunk of N samples of a window, (pixels, N).

    Samples are computed in pairs, which makes Triton do so in the registers of the product that they enter.
    """
    first_y, first_x = chunk
    down, right, vertical, horizontal = moved
    pair = 2 * tl.arange(0, N // 2)
    y, x = first_y + pair // CHUNK_W, first_x + pair % CHUNK_W
    at_y = _unbounded(down, vertical, row, y, pad_y, WINDOW_H)
    even_x = _unbounded(right, horizontal, column, x, pad_x, WINDOW_W)
    odd_x = _unbounded(right, horizontal, column, x + 1, pad_x, WINDOW_W)
    along_y = _tents(at_y, pixel_y)
    even = (along_y * _tents(even_x, pixel_x)).to(DTYPE)
    odd = (along_y * _tents(odd_x, pixel_x)).to(DTYPE)
    return tl.reshape(tl.join(even, odd), (even.shape[0], N))


@triton.jit
def _reaches(
    offsets_ptr, stretch_ptr, listed, n_heads, top, left, rows, columns, pad_y, pad_x,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Which of an image's listed windows have samples that a pixel of the tile has a share in."""
    known = listed < rows * columns
    predictions = tl.where(known, listed, 0).to(tl.int64) * n_heads
    down, right = _moved(offsets_ptr, predictions)
    vertical, horizontal = _moved(stretch_ptr, predictions)
    row, column = listed // columns, listed % columns
    from_y = _unbounded(down, vertical, row, 0, pad_y, WINDOW_H)
    to_y = _unbounded(down, vertical, row, WINDOW_H - 1, pad_y, WINDOW_H)
    from_x = _unbounded(right, horizontal, column, 0, pad_x, WINDOW_W)
    to_x = _unbounded(right, horizontal, column, WINDOW_W - 1, pad_x, WINDOW_W)
    return known & _meets(from_y, to_y, top, TILE_H) & _meets(from_x, to_x, left, TILE_W)


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "pad_y", "pad_x"])
def _varied_window_bwd_dkdv_kernel(
    d_samples_ptr, offsets_ptr, stretch_ptr, d_k_ptr, d_v_ptr, d_k_strides, d_v_strides,
    height, width, rows, columns, pad_y, pad_x, n_heads,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, CHUNK_H: tl.constexpr, CHUNK_W: tl.constexpr, LIST: tl.constexpr,
    HEAD_DIM: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values for one tile of pixels and one head: sums over the samples near them.

    The windows that reach the tile are visited in raster order. Of each, a chunk of samples meets the tile in a
    product with the matrix of bilinear weights.
    """
    N: tl.constexpr = CHUNK_H * CHUNK_W
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % n_heads
    tile = tl.program_id(0) // n_heads
    tile_columns = tl.cdiv(width, TILE_W)
    per_image = tl.cdiv(height, TILE_H) * tile_columns
    image = tile // per_image
    top = (tile % per_image) // tile_columns * TILE_H
    left = tile % tile_columns * TILE_W
    pixels = tl.arange(0, TILE_H * TILE_W)
    pixel_y, pixel_x = top + pixels // TILE_W, left + pixels % TILE_W
    n_local = rows * columns
    of_image = image.to(tl.int64) * n_local * n_heads + head
    offsets_ptr += 2 * of_image
    stretch_ptr += 2 * of_image
    d_samples_ptr += of_image * (2 * N_TOKENS * HEAD_DIM)
    sample = tl.arange(0, N)
    channels = tl.arange(0, 2 * HEAD_DIM)
    d_kv = tl.zeros((TILE_H * TILE_W, 2 * HEAD_DIM), tl.float32)
    for first in range(0, n_local, LIST):
        listed = first + tl.arange(0, LIST)
        reach = _reaches(
            offsets_ptr, stretch_ptr, listed, n_heads, top, left, rows, columns,
            pad_y, pad_x, WINDOW_H, WINDOW_W, TILE_H, TILE_W,
        )  # fmt: skip
        local = tl.min(tl.where(reach, listed, n_local), 0)
        for _ in range(tl.sum(reach.to(tl.int32), 0)):
            prediction = local.to(tl.int64) * n_heads
            row, column = local // columns, local % columns
            down, right = _moved(offsets_ptr, prediction)
            vertical, horizontal = _moved(stretch_ptr, prediction)
            moved = (down, right, vertical, horizontal)
            for i in tl.static_range(0, WINDOW_H, CHUNK_H):
                for j in tl.static_range(0, WINDOW_W, CHUNK_W):
                    y, x = i + sample // CHUNK_W, j + sample % CHUNK_W
                    d_samples = tl.load(
                        d_samples_ptr + prediction * (2 * N_TOKENS * HEAD_DIM)
                        + ((y * WINDOW_W + x) * (2 * HEAD_DIM))[:, None] + channels[None, :],
                        mask=((y < WINDOW_H) & (x < WINDOW_W))[:, None],
                        other=0.0,
                    )  # fmt: skip
                    shares = _shares(
                        moved, row, column, (i, j), pixel_y, pixel_x, pad_y, pad_x, CHUNK_W, WINDOW_H, WINDOW_W, N,
                        d_samples.dtype,
                    )  # fmt: skip
                    d_kv = tl.dot(shares, d_samples, acc=d_kv, input_precision="ieee")
            local = tl.min(tl.where(reach & (listed > local), listed, n_local), 0)
    d_k, d_v = tl.split(tl.permute(tl.reshape(d_kv, (TILE_H * TILE_W, 2, HEAD_DIM)), (0, 2, 1)))
    inside = (pixel_y < height) & (pixel_x < width)
    _store_pixels(d_k_ptr, image, head, pixel_y, pixel_x, inside, d_k_strides, d_k, HEAD_DIM, FAR)
    _store_pixels(d_v_ptr, image, head, pixel_y, pixel_x, inside, d_v_strides, d_v, HEAD_DIM, FAR)


# Heads whose channels take more than `_NARROW` bytes need more registers.
CONFIGS = {
    "fwd": Config(4, 3, 4),
    "fwd_wide": Config(8, 1, 2),
    "bwd": Config(4, 1, 2),
    "bwd_wide": Config(8, 1, 1),
    "bwd_dkdv": Config(4, 1),
    "bwd_dkdv_wide": Config(8, 1),
}
_NARROW = 64
_TILE = (8, 8)  # pixels whose gradients one program computes
_CHUNK = 64  # samples that meet them at once
_LIST = 32  # windows that are tried at once whether they reach the tile: as many as a warp has threads
_INT32 = 2**31


def _is_far(*maps: Tensor) -> bool:
    """Whether offsets inside an image, up to two pixels beyond its borders, may not fit into 32 bits."""
    return any((t.shape[1] + 2) * t.stride(1) + (t.shape[2] + 2) * t.stride(2) >= _INT32 for t in maps)


class _Problem:
    """The launch parameters that all kernels of one call share."""

    def __init__(
        self, q: Tensor, offsets: Tensor, bias: Tensor | None, window: tuple[int, int], pad: tuple[int, int]
    ) -> None:
        self.batch, self.height, self.width, self.heads, self.head_dim = q.shape
        self.rows, self.columns = offsets.shape[1:3]
        self.is_wide = self.head_dim * q.element_size() > _NARROW
        self.window, self.tokens = window, window[0] * window[1]
        self.n_windows = self.batch * self.rows * self.columns
        self.scalars = (self.height, self.width, self.rows, self.columns, *pad)
        self.constants: dict[str, Any] = {
            "WINDOW_H": window[0],
            "WINDOW_W": window[1],
            "HEAD_DIM": self.head_dim,
        }
        self.block = max(16, triton.next_power_of_2(self.tokens))
        self.tiling = {"HAS_BIAS": bias is not None, "BLOCK": self.block}
        self.multiprocessors = multiprocessors(q.device)

    def config(self, kernel: str) -> Config:
        """How one of the kernels is launched."""
        return CONFIGS[f"{kernel}_wide" if self.is_wide else kernel]

    def walkers(self, per_multiprocessor: int) -> int:
        """How many programs share the windows of one head, for so many programs of all heads on a multiprocessor."""
        return shares(self.n_windows, self.heads, per_multiprocessor * self.multiprocessors)


def varied_window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    stretch: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    pad_start: tuple[int, int],
    scale: float,
) -> Tensor:
    """Fused forward; arguments as in `varied_window_attention_reference`."""
    q, k, v = unit_stride(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    problem = _Problem(q, offsets, bias, window, pad_start)
    config = problem.config("fwd")
    launch(
        _varied_window_fwd_kernel, (problem.walkers(config.programs) * problem.heads,),
        q, k, v, offsets.contiguous(), stretch.contiguous(), None if bias is None else bias.contiguous(), out,
        *map_strides(q, k, v, out), *problem.scalars, problem.n_windows, problem.heads, scale,
        **problem.constants, **problem.tiling, FAR=_is_far(q, k, v, out), **config.launch,
    )  # fmt: skip
    return out


def varied_window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    offsets: Tensor,
    stretch: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    pad_start: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused backward: fills `d_q`, `d_k`, `d_v`; returns the gradients of offsets, stretch and bias (empty if none)."""
    grad, q, k, v = unit_stride(grad, q, k, v)
    offsets, stretch = offsets.contiguous(), stretch.contiguous()
    if q.numel() == 0:
        d_bias = empty_gradient(grad) if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
        return torch.zeros_like(offsets), torch.zeros_like(stretch), d_bias
    problem = _Problem(q, offsets, bias, window, pad_start)
    config = problem.config("bwd")
    d_offsets, d_stretch = torch.empty_like(offsets), torch.empty_like(stretch)
    walkers = problem.walkers(config.programs)
    bias_slots = torch.empty(
        (0 if bias is None else walkers, problem.heads, problem.tokens, problem.tokens),
        dtype=torch.float32,
        device=q.device,
    )
    # In the inputs' dtype, like the gradients that any attention returns for the keys and values it was given.
    d_samples = torch.empty(
        (problem.n_windows, problem.heads, problem.tokens, 2, problem.head_dim), dtype=q.dtype, device=q.device
    )
    launch(
        _varied_window_bwd_kernel, (walkers * problem.heads,),
        grad, q, k, v, offsets, stretch, None if bias is None else bias.contiguous(),
        d_q, d_samples, d_offsets, d_stretch, bias_slots, *map_strides(grad, q, k, v, d_q),
        *problem.scalars, problem.n_windows, problem.heads, scale,
        **problem.constants, **problem.tiling, FAR=_is_far(grad, q, k, v, d_q),
        READ_AGAIN=problem.is_wide, **config.launch,
    )  # fmt: skip
    _map_gradients(problem, d_samples, offsets, stretch, d_k, d_v)
    d_bias = empty_gradient(grad) if bias is None else sum_of_parts(bias_slots, bias.dtype)
    return d_offsets, d_stretch, d_bias


def _map_gradients(
    problem: _Problem, d_samples: Tensor, offsets: Tensor, stretch: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """Gives the gradients of the samples to the pixels they were mixed from."""
    chunk_w = min(_CHUNK, max(2, triton.next_power_of_2(problem.window[1])))  # samples are computed in pairs
    chunk_h = min(_CHUNK // chunk_w, triton.next_power_of_2(problem.window[0]))
    chunk_w = max(chunk_w, 16 // chunk_h)  # products need 16 samples
    tiles = math.ceil(problem.height / _TILE[0]) * math.ceil(problem.width / _TILE[1])
    launch(
        _varied_window_bwd_dkdv_kernel, (problem.batch * tiles * problem.heads,),
        d_samples, offsets, stretch, d_k, d_v, *map_strides(d_k, d_v), *problem.scalars, problem.heads,
        TILE_H=_TILE[0], TILE_W=_TILE[1], CHUNK_H=chunk_h, CHUNK_W=chunk_w, LIST=_LIST,
        **problem.constants, FAR=_is_far(d_k, d_v), **problem.config("bwd_dkdv").launch,
    )  # fmt: skip
