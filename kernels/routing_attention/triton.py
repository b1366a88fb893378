"""Triton kernels of routing attention: index map, tiling and numerics.

Index map. Token t of region r stands at row (r // columns) * region_h + t // region_w and column
(r % columns) * region_w + t % region_w of the map. Tokens outside the image are padding: they are never read or
written; as keys they hold `pad_k` and `pad_v`, or zeros. The keys of a query region are numbered through its routes:
key j is token j % T of region `routes[j // T]`, so that tiles of keys are full whatever the size of a region.

Tiling. Two forms, chosen by the products that they would do (`_is_dense`):

- by region: a program has one head and a block of queries of one region, and walks over the keys of its routes. The
  gradients of a region's keys need the opposite list, the regions that chose it: it is built on the device first, and
  queries are numbered through it as keys are through the routes.
- dense: regions of a few tokens would leave most rows of the tensor cores' tiles empty, and every key would be read
  once for each of the many regions that chose it. There a program has a block of queries from anywhere in the image
  and walks over all keys; a query carries its region's routes as the bits of a 64-bit mask.

Neighbouring programs work on the heads of the same tokens, which share memory lines. Where the keys of a query fit
into one tile, as in BiFormer's first two stages at 224 pixels, there is no online softmax.

Numerics. Logits, softmax and all sums are float32; the weights are rounded to the inputs' dtype before they meet values
or gradients; float32 inputs use full float32 products. The forward leaves nothing but its output: the backward of the
queries finds the rows' softmax statistics, with the correction sum_j P_ij dP_ij, anew and keeps them for the backward
of the keys. That costs a second pass over the keys only where they need several tiles, and no memory between the
passes. No atomics: every gradient has one program, which sums it in the order of a list; those of the padding go to one
slot a program and are added afterwards. Gradients are therefore deterministic.

Roofline. The forward has to move q, k, v and the output once, the backward these, the output's gradient and three
gradients. What the kernels read beyond that are keys and values that several regions chose, mostly from the L2 cache.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, batch 64, D 32, CUDA-graph replay), microseconds forward /
forward and backward, and the eager reference's forward: 56x56, 2 heads, top-1: 37 / 172, 298; 28x28, 4 heads, top-4:
33 / 156, 339; 14x14, 8 heads, top-16 (dense): 45 / 187, 536. Where all regions choose the same ones the backward of the
keys has a long tail: 56x56 takes 248. A 200x336 map of 16x16 regions, batch 2: 138 / 704, 392.

Ideas, with what the compiler makes of them (Triton 3.6 for sm_90, bfloat16, D 32):

| idea | outcome |
|---|---|
| several regions of a few tokens in one tile | rejected: rows of a tile share its keys, regions do not; hence dense |
| counts instead of a mask, so that regions may be listed twice | rejected: a look-up for every logit, not every row |
| log-sum-exp kept by the forward | rejected: found anew for nothing where the keys are one tile |
| sorting the routes to get the opposite lists | replaced by one kernel of counts: no sort, no copies |
| keys as rows in the backward of the keys | rejected: a thread locates 16 queries, not 2; 254 registers, not 151 |
| a pipelined loop over the queries there | rejected: 151 registers, 122 without, and mostly one or two rounds |
| dense, tokens in raster order | rejected: two divisions more a key; 2000 instructions forward instead of 1304 |
| dense, 256 keys in one tile | forward: 2097 instructions at 14x14, not 2635; in the backward of the queries: spills |
| dense, columns and width of regions compiled in, one test for hidden and missing keys | 527 a tile of keys, not 630 |
| float32, 8 warps for heads of 32, not 4 | spills are gone dense, and shrink by region (forward: 48 bytes, not 3528) |
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.gradients import zeros_or_empty
from vitrail.kernels._common.launch import contiguous, launch, map_strides, unit_stride
from vitrail.kernels._common.triton import (
    add_product,
    empty_statistics,
    finite,
    load_kv,
    load_statistics,
    online_softmax,
    softmax_statistics,
    statistics_of,
    store_statistics,
    sums_of_pairs,
)
from vitrail.kernels.routing_attention.reference import region_size

_LOG2E = tl.constexpr(math.log2(math.e))
_BLOCK = 64  # tokens of a tile, at most
_TILE_BYTES = 16384  # of one tile of tokens, at most
_STAGES = {"fwd": 2, "bwd_dq": 2, "bwd_dkdv": 1}  # of the pipelines; the last one's would cost half of the occupancy
_DENSE_FWD = (64, 256)  # most queries and keys of a tile of the dense forward, where all keys fit; heads up to 32
_ADDING_REGISTERS = 128  # of a thread: four programs of four warps to a multiprocessor, where one more would be three
_MASK_BITS = 64  # regions that an integer can tell apart
_DENSE_ADVANTAGE = 2  # how many times more products the dense form may do: it reads far fewer keys


@triton.jit
def _pixels(region, token, geometry):
    """Tokens of regions -> (row, column, whether the pixel exists)."""
    height, width, _, columns, region_h, region_w = geometry
    y = (region // columns) * region_h + token // region_w
    x = (region % columns) * region_w + token % region_w
    return y, x, (y < height) & (x < width)


@triton.jit
def _region_tokens(geometry, DENSE: tl.constexpr):
    """Tokens of a region. In the dense form `DENSE` is this number, since every key there needs a division by it."""
    if DENSE:
        return DENSE
    else:
        _, _, _, _, region_h, region_w = geometry
        return region_h * region_w


@triton.jit
def _own_tokens(geometry, n_heads, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """The block of tokens that a program works for: (image, head, region, rank, row, column, exists, real).

    Dense, the block goes through all regions and has a region for each token, otherwise it is of one region. `rank`
    numbers the tokens of an image; `exists` tells tokens from the tile's padding, `real` those with a pixel.
    """
    _, _, n_regions, _, _, _ = geometry
    n_tokens = _region_tokens(geometry, DENSE)
    head = tl.program_id(0) % n_heads
    slot = tl.program_id(0) // n_heads
    if DENSE:
        n_blocks = tl.cdiv(n_regions * n_tokens, BLOCK)
        image = slot // n_blocks
        rank = (slot % n_blocks) * BLOCK + tl.arange(0, BLOCK)
        region = rank // n_tokens
        token = rank % n_tokens
        exists = rank < n_regions * n_tokens
    else:
        n_blocks = tl.cdiv(n_tokens, BLOCK)
        image = slot // (n_blocks * n_regions)
        region = (slot // n_blocks) % n_regions
        token = (slot % n_blocks) * BLOCK + tl.arange(0, BLOCK)
        exists = token < n_tokens
        rank = region * n_tokens + token
    y, x, real = _pixels(region, token, geometry)
    return image, head, region, rank, y, x, exists, real & exists


@triton.jit
def _other_tokens(start, n_others, list_ptr, geometry, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of the tokens of listed regions, or of all: (region, rank, row, column, exists, real)."""
    n_tokens = _region_tokens(geometry, DENSE)
    index = start + tl.arange(0, BLOCK)
    exists = index < n_others
    region = index // n_tokens
    token = index % n_tokens
    if not DENSE:
        region = tl.load(list_ptr + region, mask=exists, other=0).to(tl.int32)
    y, x, real = _pixels(region, token, geometry)
    return region, region * n_tokens + token, y, x, exists, real & exists


@triton.jit
def _offsets(image, y, x, head, strides, HEAD_DIM: tl.constexpr):
    """Element offsets (tokens, HEAD_DIM) into a (B, H, W, heads, D) tensor whose last stride is 1."""
    stride_b, stride_y, stride_x, stride_h = strides
    base = image.to(tl.int64) * stride_b + head * stride_h
    rows = base + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return rows[:, None] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _load_masks(masks_ptr, image, region, real, geometry, DENSE: tl.constexpr):
    """Which regions each query sees, as bits; by region nothing, since every listed key is seen."""
    masks = real
    if DENSE:
        _, _, n_regions, _, _, _ = geometry
        masks = tl.load(masks_ptr + image.to(tl.int64) * n_regions + region, mask=real, other=0)
    return masks


@triton.jit
def _sees(masks, region, exists):
    """Whether the bit of the key's region is set in the query's mask; the tile's padding may be of any region."""
    return (((masks >> (region & 63)) & 1).to(tl.int32) & exists.to(tl.int32)) != 0


@triton.jit
def _key_tile(
    start, n_keys, list_ptr, q, q_masks, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, image, head, k_strides, v_strides,
    geometry, scale, DENSE: tl.constexpr, HAS_PAD: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values, and the queries' logits in units of log2, minus infinity where hidden."""
    region, _, y, x, exists, real = _other_tokens(start, n_keys, list_ptr, geometry, DENSE, BLOCK)
    k = load_kv(k_ptr, pad_k_ptr, _offsets(image, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    v = load_kv(v_ptr, pad_v_ptr, _offsets(image, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
    visible = exists[None, :]
    if DENSE:
        visible = _sees(q_masks[:, None], region[None, :], visible)
    return k, v, tl.where(visible, logits, float("-inf"))


@triton.jit
def _listed(list_ptr, image, region, geometry, topk, DENSE: tl.constexpr):
    """(where the routes of a region start, how many keys they have); dense, all keys of the image."""
    _, _, n_regions, _, region_h, region_w = geometry
    if DENSE:
        return list_ptr, n_regions * region_h * region_w
    else:
        return list_ptr + (image.to(tl.int64) * n_regions + region) * topk, topk * region_h * region_w


@triton.jit(do_not_specialize=["height", "width", "n_regions", "columns", "region_h", "region_w", "topk", "n_heads"])
def _routing_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, list_ptr, out_ptr, q_strides, k_strides, v_strides, out_strides,
    height, width, n_regions, columns, region_h, region_w, topk, n_heads, scale,
    DENSE: tl.constexpr, COLUMNS: tl.constexpr, REGION_W: tl.constexpr, SINGLE: tl.constexpr, HAS_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: one head, one block of queries. `list_ptr` holds the routes, or dense their masks."""
    geometry = (height, width, n_regions, COLUMNS or columns, region_h, REGION_W or region_w)
    image, head, region, _rank, y, x, _exists, real = _own_tokens(geometry, n_heads, DENSE, BLOCK_Q)
    routes, n_keys = _listed(list_ptr, image, region, geometry, topk, DENSE)
    q = tl.load(q_ptr + _offsets(image, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    masks = _load_masks(list_ptr, image, region, real, geometry, DENSE)
    if SINGLE:
        _k, v, logits = _key_tile(
            0, n_keys, routes, q, masks, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, image, head, k_strides, v_strides,
            geometry, scale, DENSE, HAS_PAD, BLOCK_K, HEAD_DIM,
        )  # fmt: skip
        weights = tl.exp2(logits - finite(tl.max(logits, 1))[:, None])
        total = tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    else:
        maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        out = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
        for start in range(0, n_keys, BLOCK_K):
            _k, v, logits = _key_tile(
                start, n_keys, routes, q, masks, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, image, head, k_strides, v_strides,
                geometry, scale, DENSE, HAS_PAD, BLOCK_K, HEAD_DIM,
            )  # fmt: skip
            weights, decay, maximum, total = online_softmax(logits, maximum, total, 1.0)
            out = add_product(out * decay[:, None], weights.to(v.dtype), v)
    out = out * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out_offsets = _offsets(image, y, x, head, out_strides, HEAD_DIM)
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["height", "width", "n_regions", "columns", "region_h", "region_w", "topk", "n_heads"])
def _routing_bwd_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, list_ptr, d_q_ptr, stats_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides,
    height, width, n_regions, columns, region_h, region_w, topk, n_heads, scale,
    DENSE: tl.constexpr, COLUMNS: tl.constexpr, REGION_W: tl.constexpr, SINGLE: tl.constexpr, HAS_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: gradient of one block of queries; leaves the rows' statistics for the kernel of the keys.

    Of several tiles of keys, a first pass finds each row's softmax statistics, a second its gradient.
    """
    geometry = (height, width, n_regions, COLUMNS or columns, region_h, REGION_W or region_w)
    image, head, region, rank, y, x, _exists, real = _own_tokens(geometry, n_heads, DENSE, BLOCK_Q)
    routes, n_keys = _listed(list_ptr, image, region, geometry, topk, DENSE)
    q = tl.load(q_ptr + _offsets(image, y, x, head, q_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    grad = tl.load(grad_ptr + _offsets(image, y, x, head, grad_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    masks = _load_masks(list_ptr, image, region, real, geometry, DENSE)
    if SINGLE:
        k, v, logits = _key_tile(
            0, n_keys, routes, q, masks, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, image, head, k_strides, v_strides,
            geometry, scale, DENSE, HAS_PAD, BLOCK_K, HEAD_DIM,
        )  # fmt: skip
        maximum = finite(tl.max(logits, 1))
        weights = tl.exp2(logits - maximum[:, None])
        total = tl.sum(weights, 1)
        total = tl.where(total == 0.0, 1.0, total)
        weights = weights * (1.0 / total)[:, None]
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        correction = tl.sum(weights * d_weights, 1)
        d_scores = weights * (d_weights - correction[:, None]) * scale
        d_q = tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")
        shift, factor = softmax_statistics(maximum, total, q.dtype)
    else:
        maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        correction = tl.zeros((BLOCK_Q,), tl.float32)
        for start in range(0, n_keys, BLOCK_K):
            _k, v, logits = _key_tile(
                start, n_keys, routes, q, masks, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, image, head, k_strides, v_strides,
                geometry, scale, DENSE, HAS_PAD, BLOCK_K, HEAD_DIM,
            )  # fmt: skip
            d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
            weights, decay, maximum, total = online_softmax(logits, maximum, total, 1.0)
            correction = correction * decay + tl.sum(weights * d_weights, 1)
        total = tl.where(total == 0.0, 1.0, total)
        correction = correction / total
        shift, factor = softmax_statistics(finite(maximum), total, q.dtype)
        d_q = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
        for start in range(0, n_keys, BLOCK_K):
            k, v, logits = _key_tile(
                start, n_keys, routes, q, masks, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, image, head, k_strides, v_strides,
                geometry, scale, DENSE, HAS_PAD, BLOCK_K, HEAD_DIM,
            )  # fmt: skip
            d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
            weights = tl.exp2(logits - shift[:, None])
            d_scores = weights * (d_weights - correction[:, None]) * scale
            d_q = tl.dot(d_scores.to(k.dtype), k, acc=d_q, input_precision="ieee")
        d_q *= factor[:, None]
    tl.store(d_q_ptr + _offsets(image, y, x, head, d_q_strides, HEAD_DIM), d_q.to(q.dtype), mask=real[:, None])
    n_ranks = n_regions * region_h * region_w
    stats = statistics_of(stats_ptr, image * n_heads + head, n_ranks, q.dtype) + rank
    store_statistics(stats, n_ranks, shift, factor, correction, real, q.dtype)


@triton.jit(
    do_not_specialize=["height", "width", "n_regions", "columns", "region_h", "region_w", "n_heads", "n_listed"]
)
def _routing_bwd_dkdv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, list_ptr, bounds_ptr, stats_ptr, d_k_ptr, d_v_ptr, d_pad_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_k_strides, d_v_strides,
    height, width, n_regions, columns, region_h, region_w, n_heads, n_listed, scale,
    DENSE: tl.constexpr, COLUMNS: tl.constexpr, REGION_W: tl.constexpr, HAS_PAD: tl.constexpr, ADDS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: gradients of one block of keys and values, over the queries of the regions that chose them.

    `list_ptr` holds these regions, `n_listed` an image, between the two bounds of each key region; dense, the masks.
    ADDS: None, "first" or "last": when what `d_v_ptr` holds, which no other program reads or writes, is added there.
    """
    geometry = (height, width, n_regions, COLUMNS or columns, region_h, REGION_W or region_w)
    n_ranks = n_regions * region_h * region_w
    image, head, region, _rank, y, x, exists, real = _own_tokens(geometry, n_heads, DENSE, BLOCK_K)
    if DENSE:
        others = list_ptr
        n_queries = n_ranks
    else:
        bounds = bounds_ptr + (image.to(tl.int64) * n_regions + region) * 2
        first = tl.load(bounds)
        others = list_ptr + image.to(tl.int64) * n_listed + first
        n_queries = (tl.load(bounds + 1) - first) * (region_h * region_w)
    k = load_kv(k_ptr, pad_k_ptr, _offsets(image, y, x, head, k_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    v = load_kv(v_ptr, pad_v_ptr, _offsets(image, y, x, head, v_strides, HEAD_DIM), real, head, HAS_PAD, HEAD_DIM)
    stats = statistics_of(stats_ptr, image * n_heads + head, n_ranks, q_ptr.dtype.element_ty)
    d_k = tl.zeros((BLOCK_K, HEAD_DIM), tl.float32)
    d_v = tl.zeros((BLOCK_K, HEAD_DIM), tl.float32)
    if ADDS == "first":
        begun = d_v_ptr + _offsets(image, y, x, head, d_v_strides, HEAD_DIM)
        d_v = tl.load(begun, mask=real[:, None], other=0.0).to(tl.float32)
    for start in range(0, n_queries, BLOCK_Q):
        q_region, rank, q_y, q_x, _q_exists, q_real = _other_tokens(start, n_queries, others, geometry, DENSE, BLOCK_Q)
        q_offsets = _offsets(image, q_y, q_x, head, q_strides, HEAD_DIM)
        q = tl.load(q_ptr + q_offsets, mask=q_real[:, None], other=0.0)
        grad_offsets = _offsets(image, q_y, q_x, head, grad_strides, HEAD_DIM)
        grad = tl.load(grad_ptr + grad_offsets, mask=q_real[:, None], other=0.0)
        shift, factor, correction = load_statistics(stats + rank, n_ranks, q_real, q.dtype)  # padded queries have none
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        weights = tl.exp2(logits - shift[:, None]) * factor[:, None]
        if DENSE:
            masks = _load_masks(list_ptr, image, q_region, q_real, geometry, DENSE)
            weights = tl.where(_sees(masks[:, None], region[None, :], exists[None, :]), weights, 0.0)
        d_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, acc=d_v, input_precision="ieee")
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_scores = weights * (d_weights - correction[:, None]) * scale
        d_k = tl.dot(tl.trans(d_scores.to(q.dtype)), q, acc=d_k, input_precision="ieee")
    tl.store(d_k_ptr + _offsets(image, y, x, head, d_k_strides, HEAD_DIM), d_k.to(k.dtype), mask=real[:, None])
    d_v_offsets = _offsets(image, y, x, head, d_v_strides, HEAD_DIM)
    if ADDS == "last":
        d_v += tl.load(d_v_ptr + d_v_offsets, mask=real[:, None], other=0.0)
    tl.store(d_v_ptr + d_v_offsets, d_v.to(v.dtype), mask=real[:, None])
    if HAS_PAD:
        is_pad = (exists & (real == 0))[:, None]
        slot = d_pad_ptr + tl.program_id(0).to(tl.int64) * (2 * HEAD_DIM) + tl.arange(0, HEAD_DIM)
        tl.store(slot, tl.sum(tl.where(is_pad, d_k, 0.0), 0))
        tl.store(slot + HEAD_DIM, tl.sum(tl.where(is_pad, d_v, 0.0), 0))


@triton.jit(do_not_specialize=["n_regions", "topk"])
def _invert_kernel(routes_ptr, list_ptr, bounds_ptr, n_regions, topk, BLOCK: tl.constexpr):
    """One program: lists, for one region of one image, the regions that chose it, in their order."""
    image = (tl.program_id(0) // n_regions).to(tl.int64)
    region = tl.program_id(0) % n_regions
    n_listed = n_regions * topk
    routes_ptr += image * n_listed
    first = 0
    for start in range(0, n_listed, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        chosen = tl.load(routes_ptr + entries, mask=entries < n_listed, other=n_regions)
        first += tl.sum((chosen < region).to(tl.int32), 0)
    last = first
    for start in range(0, n_listed, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        chosen = tl.load(routes_ptr + entries, mask=entries < n_listed, other=n_regions)
        chose_it = (chosen == region).to(tl.int32)
        places = last + tl.cumsum(chose_it, 0) - chose_it
        tl.store(list_ptr + image * n_listed + places, entries // topk, mask=chose_it != 0)
        last += tl.sum(chose_it, 0)
    bounds = bounds_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(bounds, first)
    tl.store(bounds + 1, last)


@triton.jit(do_not_specialize=["n_rows", "topk"])
def _masks_kernel(routes_ptr, masks_ptr, n_rows, topk, BLOCK: tl.constexpr):
    """The routes of each region as the bits of an integer."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    masks = tl.zeros((BLOCK,), tl.int64)
    for place in range(topk):
        region = tl.load(routes_ptr + rows * topk + place, mask=rows < n_rows, other=0)
        masks = masks | (tl.full((BLOCK,), 1, tl.int64) << region)
    tl.store(masks_ptr + rows, masks, mask=rows < n_rows)


def _is_dense(n_regions: int, tokens: int, topk: int) -> bool:
    """Whether regions are so small that attention to all keys, most of them hidden, is less work than to the routed."""
    dense = n_regions * tokens * tokens
    by_region = topk * tokens * max(16, tokens)  # no tile has fewer rows than 16
    return n_regions <= _MASK_BITS and dense <= _DENSE_ADVANTAGE * by_region


class _Problem:
    """The launch parameters that the kernels of one call share."""

    def __init__(
        self,
        q: Tensor,
        pad_k: Tensor | None,
        routes: Tensor,
        grid: tuple[int, int],
        scale: float,
        forward: bool = False,
    ) -> None:
        self.batch, height, width, self.heads, self.head_dim = q.shape
        (region_h, region_w), pads = region_size(height, width, grid)
        self.n_regions, self.topk, tokens = grid[0] * grid[1], routes.shape[2], region_h * region_w
        self.scale = scale
        self.geometry = (height, width, self.n_regions, grid[1], region_h, region_w)
        self.n_ranks = self.n_regions * tokens
        self.dense = tokens if _is_dense(self.n_regions, tokens, self.topk) else 0
        self.has_pad = pads != (0, 0) and pad_k is not None
        row_bytes = self.head_dim * q.element_size()
        n_keys = self.n_ranks if self.dense else self.topk * tokens
        most_own = most_others = min(_BLOCK, max(16, _TILE_BYTES // row_bytes))
        if forward and self.dense and row_bytes * q.element_size() <= 128 and n_keys <= _DENSE_FWD[1]:
            most_own, most_others = _DENSE_FWD
        self.own = _block(self.n_ranks if self.dense else tokens, most_own)
        self.others = _block(n_keys, most_others)
        self.single = n_keys <= self.others
        self.warps = min(8, max(1, self.own // 16) * max(1, row_bytes * q.element_size() // 256))
        self.registers = _ADDING_REGISTERS if row_bytes <= 64 and q.element_size() == 2 and self.warps == 4 else None
        blocks = math.ceil(self.n_ranks / self.own) if self.dense else self.n_regions * math.ceil(tokens / self.own)
        self.programs = self.batch * blocks  # for each head
        self.grid = (self.programs * self.heads,)

    def options(self, kernel: str) -> dict[str, Any]:
        """Compile-time constants and launch options; the own tokens of "bwd_dkdv" are keys, of the others queries."""
        of_keys = kernel == "bwd_dkdv"
        options = {
            "DENSE": self.dense,
            "COLUMNS": self.geometry[3] if self.dense else 0,
            "REGION_W": self.geometry[5] if self.dense else 0,
            "HAS_PAD": self.has_pad,
            "BLOCK_Q": self.others if of_keys else self.own,
            "BLOCK_K": self.own if of_keys else self.others,
            "HEAD_DIM": self.head_dim,
            "num_warps": self.warps,
            "num_stages": _STAGES[kernel],
        }
        return options if of_keys else {**options, "SINGLE": self.single}


def _block(n_tokens: int, most: int) -> int:
    """Tokens of a tile: a power of two that the tensor cores take."""
    return min(most, max(16, triton.next_power_of_2(n_tokens)))


def routing_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    routes: Tensor,
    n_regions: tuple[int, int],
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Fused forward; arguments as in `routing_attention_reference`.

    `out` receives the result, if it is given; its last stride is 1.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = unit_stride(q, k, v)
    problem = _Problem(q, pad_k, routes, n_regions, scale, forward=True)
    routes = routes.contiguous()
    launch(
        _routing_fwd_kernel, problem.grid, q, k, v, contiguous(pad_k), contiguous(pad_v),
        _masks(routes) if problem.dense else routes, out, *map_strides(q, k, v, out), *problem.geometry, problem.topk,
        problem.heads, scale, **problem.options("fwd"),
    )  # fmt: skip
    return out


def routing_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    routes: Tensor,
    n_regions: tuple[int, int],
    scale: float,
) -> tuple[Tensor, ...]:
    """Fused backward: the gradients of q, k, v, contiguous, and of pad_k and pad_v, empty if absent."""
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    d_pads = routing_attention_gradients(grad, q, k, v, d_q, d_k, d_v, pad_k, pad_v, routes, n_regions, scale)
    return d_q, d_k, d_v, *(d_pads or (zeros_or_empty(grad, pad_k), zeros_or_empty(grad, pad_v)))


def routing_attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    routes: Tensor,
    n_regions: tuple[int, int],
    scale: float,
    adds_to_v: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Writes d_q, d_k and d_v, whose last stride is 1; with `adds_to_v` the last is added to what d_v holds.

    Returns:
        The gradients of pad_k and pad_v, (heads, D), with `adds_to_v`, where more is to be added, in float32; None
        where they have no influence.
    """
    if q.numel() == 0:
        return None
    grad, q, k, v = unit_stride(grad, q, k, v)
    problem = _Problem(q, pad_k, routes, n_regions, scale)
    inputs = (grad, q, k, v, contiguous(pad_k), contiguous(pad_v))
    d_pad = _run_backward(problem, inputs, routes.contiguous(), (d_q, d_k, d_v), adds_to_v)
    if pad_k is None or pad_v is None or not problem.has_pad:
        return None
    dtypes = (torch.float32, torch.float32) if adds_to_v else (pad_k.dtype, pad_v.dtype)
    return sums_of_pairs(d_pad, *dtypes)


def _run_backward(
    problem: _Problem,
    inputs: tuple[Any, ...],
    routes: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    adds_to_v: bool,
) -> Tensor:
    """Fills the gradients of q, k and v; returns the partial sums of those of the padding, (slots, heads, 2, D)."""
    grad, q, k, v = inputs[:4]
    d_q, d_k, d_v = gradients
    listed = _masks(routes) if problem.dense else routes
    stats = empty_statistics(problem.batch * problem.heads, problem.n_ranks, q)
    strides = map_strides(grad, q, k, v)
    launch(
        _routing_bwd_dq_kernel, problem.grid, *inputs, listed, d_q, stats, *strides, *map_strides(d_q),
        *problem.geometry, problem.topk, problem.heads, problem.scale, **problem.options("bwd_dq"),
    )  # fmt: skip
    listed, bounds = (listed, None) if problem.dense else _inverse_lists(routes)
    slots = problem.programs if problem.has_pad else 0
    d_pad = torch.empty((slots, problem.heads, 2, problem.head_dim), dtype=torch.float32, device=q.device)
    # A sum that begins with a large value is rounded at its size with each product: in float32 that would show.
    adds = ("last" if q.dtype == torch.float32 else "first") if adds_to_v else None
    launch(
        _routing_bwd_dkdv_kernel, problem.grid, *inputs, listed, bounds, stats, d_k, d_v, d_pad, *strides,
        *map_strides(d_k, d_v), *problem.geometry, problem.heads, problem.n_regions * problem.topk, problem.scale,
        ADDS=adds, maxnreg=problem.registers if adds_to_v else None, **problem.options("bwd_dkdv"),
    )  # fmt: skip
    return d_pad


def _inverse_lists(routes: Tensor) -> tuple[Tensor, Tensor]:
    """For each region those that chose it: all lists of an image, (B, R * topk), and where each starts and ends."""
    batch, regions, topk = routes.shape
    listed = torch.empty((batch, regions * topk), dtype=torch.int32, device=routes.device)
    bounds = torch.empty((batch, regions, 2), dtype=torch.int32, device=routes.device)
    block = min(1024, max(32, triton.next_power_of_2(regions * topk)))
    launch(_invert_kernel, (batch * regions,), routes, listed, bounds, regions, topk, BLOCK=block, num_warps=1)
    return listed, bounds


def _masks(routes: Tensor) -> Tensor:
    """The routes of each region as the bits of an integer, (B, R), int64."""
    batch, regions, topk = routes.shape
    masks = torch.empty((batch, regions), dtype=torch.int64, device=routes.device)
    launch(
        _masks_kernel, (triton.cdiv(batch * regions, 128),), routes, masks, batch * regions, topk, BLOCK=128,
        num_warps=4,
    )  # fmt: skip
    return masks
