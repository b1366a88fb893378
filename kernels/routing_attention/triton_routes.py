"""Triton kernels of the routes: which regions attend to which.

Means. A program takes several regions of the queries or of the keys, and some channels of all heads, so that regions of
a few tokens do not each need one: rows of its tile are (region, lane), and each lane adds every LANES-th token.

Ranking. A program has a block of regions of one image: their products with all means of keys are one tile. From it the
largest is taken `topk` times (passes); or each region's place is found by counting those before it, all places at once.
For the latter a region has to be compared with every other: the tile's columns cannot be indexed, so that the program
leaves them in memory, close by in its multiprocessor's cache, and reads them one after the other. Passes take time as
the routes do, counting as the regions (`_is_counted`). Either way equal regions keep their order.

All in float32 with full products: rounding must not change which regions are chosen.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, batch 64, CUDA-graph replay), microseconds of all routes:
14x14x256 top-16 35 (once 65), 28x28x128 top-4 28, 56x56x64 top-1 31, 7x7x512 all of 49 60; 200x336x64, batch 2,
16 x 16 regions, top-1 31. At 14x14 ranking takes 29 of them, the means 6. With 16 lanes at most 7 % less than with 64,
over six shapes. Ranking with 8 warps, or 8 regions a program, takes 6 to 68 % longer; other pipelines, other numbers of
channels at once change less than 4 %; so do counts for a single route. Four passes over 256 regions take twice as long
as counting.

Numbers of instructions are static ones of Triton 3.6 for sm_90, bfloat16.

| idea | outcome |
|---|---|
| a program for the mean of each region and head | replaced: 50,176 of them at 64 x 14x14x256, now 1,568 |
| lanes of a region's tokens even where it has few | rejected: sums of four tokens in one thread need no exchange |
| two kernels, of the similarities and of the places | rejected: one more launch, and its tile read again |
| all pairs of a block in one 3-D tile | rejected: 512 comparisons a thread unrolled, and 512 regions do not fit |
| indices in the low half of 64-bit keys, sorted | not tried: 21 exchanges of 64 keys, each across threads |
| masks for the regions beyond the last in the count | removed: the scratch is of whole tiles, minus infinity beyond |
| similarities loaded again in the layout of loads | rejected: 307 instructions for 8 regions, not 315 |
| 32 channels of 512 regions at once | rejected: spills; 16 do not |
| division of every sum by the tokens | replaced by one reciprocal a thread |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import contiguous, launch, map_strides, unit_stride
from vitrail.kernels.routing_attention.reference import region_routes_reference, region_size, routes_of_means
from vitrail.kernels.routing_attention.triton import _pixels

_UNROLL = 4  # tokens whose loads are under way at the same time
_ROWS = 16  # of a tile of the means
_MOST_LANES = 16  # that share the tokens of a region
_CHANNELS = 64  # of a tile
_MOST_RANKED = 512  # regions whose similarities fit into one tile
_RANK_ROWS = 16  # regions of a program
_RANK_WARPS = 4
_RANK_CHANNELS = 32  # that are loaded at once
_RANK_STAGES = 2
_COUNTED_A_PASS = 16  # regions that are counted in the time of taking the largest once
_COUNTS = tl.constexpr(8)  # regions whose loads are under way at the same time


@triton.jit
def _write_means(
    x_ptr, pad_ptr, means_ptr, strides, geometry, n_heads, n_slots, block,
    HAS_PAD: tl.constexpr, REGIONS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Means over some regions, of the `n_slots` of all images, and some channels, written to (B, R, heads * D)."""
    height, width, n_regions, columns, region_h, region_w = geometry
    stride_b, stride_y, stride_x, stride_h = strides
    n_channels = n_heads * HEAD_DIM
    n_blocks = tl.cdiv(n_channels, BLOCK_C)
    channel = (block % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, REGIONS * LANES)
    slot = (block // n_blocks) * REGIONS + row // LANES
    region = slot % n_regions
    first = x_ptr + (slot // n_regions).to(tl.int64)[:, None] * stride_b
    first += ((channel // HEAD_DIM).to(tl.int64) * stride_h + channel % HEAD_DIM)[None, :]
    is_wanted = (slot < n_slots)[:, None] & (channel < n_channels)[None, :]
    total = tl.zeros((REGIONS * LANES, BLOCK_C), tl.float32)
    for start in range(0, region_h * region_w, LANES * UNROLL):
        for step in tl.static_range(UNROLL):
            token = start + step * LANES + row % LANES
            y, x, real = _pixels(region, token, geometry)
            real = real & (token < region_h * region_w)
            pixels = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
            total += tl.load(first + pixels[:, None], mask=real[:, None] & is_wanted, other=0.0).to(tl.float32)
    mean = tl.sum(tl.reshape(total, (REGIONS, LANES, BLOCK_C)), 1)
    slot = (block // n_blocks) * REGIONS + tl.arange(0, REGIONS)
    is_wanted = (slot < n_slots)[:, None] & (channel < n_channels)[None, :]
    if HAS_PAD:
        region = slot % n_regions
        rows = tl.minimum(tl.maximum(height - (region // columns) * region_h, 0), region_h)
        real_columns = tl.minimum(tl.maximum(width - (region % columns) * region_w, 0), region_w)
        n_pads = region_h * region_w - rows * real_columns
        pad = tl.load(pad_ptr + channel, mask=channel < n_channels, other=0.0).to(tl.float32)
        mean += n_pads.to(tl.float32)[:, None] * pad[None, :]
    mean = mean * (1.0 / (region_h * region_w).to(tl.float32))
    tl.store(means_ptr + slot.to(tl.int64)[:, None] * n_channels + channel[None, :], mean, mask=is_wanted)


@triton.jit(do_not_specialize=["height", "width", "n_regions", "columns", "region_h", "region_w", "n_heads", "n_slots"])
def _means_kernel(
    q_ptr, k_ptr, pad_q_ptr, pad_k_ptr, means_ptr, q_strides, k_strides,
    height, width, n_regions, columns, region_h, region_w, n_heads, n_slots,
    HAS_PAD: tl.constexpr, REGIONS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: means of the queries of some regions and channels, or of the keys, to (2, B, R, heads * D)."""
    geometry = (height, width, n_regions, columns, region_h, region_w)
    block = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        _write_means(
            q_ptr, pad_q_ptr, means_ptr, q_strides, geometry, n_heads, n_slots, block,
            HAS_PAD, REGIONS, LANES, UNROLL, BLOCK_C, HEAD_DIM,
        )  # fmt: skip
    else:
        means_ptr += n_slots.to(tl.int64) * (n_heads * HEAD_DIM)
        _write_means(
            k_ptr, pad_k_ptr, means_ptr, k_strides, geometry, n_heads, n_slots, block,
            HAS_PAD, REGIONS, LANES, UNROLL, BLOCK_C, HEAD_DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_regions", "n_channels", "topk", "n_images"])
def _rank_kernel(
    means_ptr, similarity_ptr, routes_ptr, n_images, n_regions, n_channels, topk,
    COUNT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the `topk` regions whose mean keys fit best, best first, for a block of regions of one image."""
    n_blocks = tl.cdiv(n_regions, BLOCK_Q)
    image = (tl.program_id(0) // n_blocks).to(tl.int64)
    q_regions = (tl.program_id(0) % n_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_regions = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_C)[None, :]
    q_rows = ((image * n_regions + q_regions) * n_channels)[:, None] + channels
    k_rows = (((n_images + image) * n_regions + k_regions) * n_channels)[:, None] + channels
    similarity = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for start in range(0, n_channels, BLOCK_C):
        q = tl.load(means_ptr + q_rows + start, mask=(q_regions < n_regions)[:, None], other=0.0)
        k = tl.load(means_ptr + k_rows + start, mask=(k_regions < n_regions)[:, None], other=0.0)
        similarity = tl.dot(q, tl.trans(k), acc=similarity, input_precision="ieee")
    # What is no number ranks last but before what is no region: routes must not point outside the map.
    similarity = tl.where(similarity > -3e38, similarity, -3e38)
    similarity = tl.where((k_regions < n_regions)[None, :], similarity, float("-inf"))
    places = routes_ptr + (image * n_regions + q_regions) * topk
    if COUNT:
        rows = similarity_ptr + (tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)) * BLOCK_K
        tl.store(rows[:, None] + k_regions[None, :], similarity)
        tl.debug_barrier()  # from here on every thread sees what the others have stored
        n_before = tl.zeros((BLOCK_Q, BLOCK_K), tl.int32)
        for start in range(0, n_regions, _COUNTS):
            for step in tl.static_range(_COUNTS):
                other = tl.load(rows + start + step)[:, None]
                is_first = (k_regions > start + step)[None, :]
                n_before += ((other > similarity) | ((other == similarity) & is_first)).to(tl.int32)
        is_pair = (q_regions < n_regions)[:, None] & (k_regions < n_regions)[None, :]
        tl.store(places[:, None] + n_before, k_regions[None, :].to(tl.int64), mask=is_pair & (n_before < topk))
    else:
        for place in range(topk):
            best = tl.argmax(similarity, 1)
            tl.store(places + place, best.to(tl.int64), mask=q_regions < n_regions)
            similarity = tl.where(k_regions[None, :] == best[:, None], float("-inf"), similarity)


def region_routes_fused(
    q: Tensor, k: Tensor, pad_q: Tensor | None, pad_k: Tensor | None, n_regions: tuple[int, int], topk: int
) -> Tensor:
    """Fused `region_routes_reference`: reads q and k once and copies neither."""
    batch, regions = q.shape[0], n_regions[0] * n_regions[1]
    if q.numel() == 0:
        return region_routes_reference(q, k, pad_q, pad_k, n_regions, topk)
    means = _region_means(q, k, pad_q, pad_k, n_regions)
    if regions > _MOST_RANKED:
        return routes_of_means(means[0], means[1], topk)
    routes = torch.empty((batch, regions, topk), dtype=torch.int64, device=q.device)
    count, options = _is_counted(regions, topk), _rank_options(regions, means.shape[3])
    programs = batch * triton.cdiv(regions, options["BLOCK_Q"])
    tile = options["BLOCK_Q"] * options["BLOCK_K"]
    similarity = torch.empty(programs * tile, dtype=torch.float32, device=q.device) if count else None
    launch(
        _rank_kernel, (programs,), means, similarity, routes, batch, regions, means.shape[3], topk, COUNT=count,
        **options,
    )  # fmt: skip
    return routes


def _is_counted(regions: int, topk: int) -> bool:
    """Whether counting, whose time grows with the regions, is quicker than one pass for each route."""
    return topk > regions // _COUNTED_A_PASS


def _rank_options(regions: int, channels: int) -> dict[str, int]:
    """Tile and launch options of `_rank_kernel`."""
    block_k = max(16, triton.next_power_of_2(regions))
    return {
        "BLOCK_Q": _RANK_ROWS,
        "BLOCK_K": block_k,
        # A divisor of the channels; the widest tile has no registers for more.
        "BLOCK_C": min(_RANK_CHANNELS if block_k <= 256 else 16, channels & -channels),
        "num_warps": max(_RANK_WARPS, block_k // 32),
        "num_stages": _RANK_STAGES,
    }


def _region_means(
    q: Tensor, k: Tensor, pad_q: Tensor | None, pad_k: Tensor | None, n_regions: tuple[int, int]
) -> Tensor:
    """Means of each region's queries and keys, (2, B, R, heads * D), float32."""
    q, k = unit_stride(q, k)
    batch, height, width, heads, dim = q.shape
    (region_h, region_w), pads = region_size(height, width, n_regions)
    regions = n_regions[0] * n_regions[1]
    means = torch.empty((2, batch, regions, heads * dim), dtype=torch.float32, device=q.device)
    tile = _means_tile(region_h * region_w, heads * dim)
    blocks = triton.cdiv(batch * regions, tile["REGIONS"]) * triton.cdiv(heads * dim, tile["BLOCK_C"])
    launch(
        _means_kernel, (2 * blocks,), q, k, contiguous(pad_q), contiguous(pad_k), means, *map_strides(q, k),
        height, width, regions, n_regions[1], region_h, region_w, heads, batch * regions,
        HAS_PAD=pads != (0, 0) and pad_q is not None, HEAD_DIM=dim, **tile,
    )  # fmt: skip
    return means


def _means_tile(tokens: int, channels: int) -> dict[str, int]:
    """Tile and launch options of `_means_kernel`."""
    unroll = min(_UNROLL, triton.next_power_of_2(tokens))
    lanes = min(_MOST_LANES, triton.next_power_of_2(tokens) // unroll)
    regions = max(1, _ROWS // lanes)
    block_c = min(_CHANNELS, triton.next_power_of_2(channels))
    warps = max(1, regions * lanes * block_c // 512)  # two loads of 16 bytes a thread and token
    return {
        "REGIONS": regions,
        "LANES": lanes,
        "UNROLL": unroll,
        "BLOCK_C": block_c,
        "num_warps": warps,
        "num_stages": 1,
    }
