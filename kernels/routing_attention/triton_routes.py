"""Triton kernels of the routes: which regions attend to which.

One kernel takes the means of all regions, a region and head a program, and so reads q and k once, where they lie. The
other has a block of regions a program: their products with all means of keys are one tile, from which it takes the
largest one after the other. All in float32 with full products: rounding must not change which regions are chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch, map_strides, unit_stride
from vitrail.kernels.routing_attention.reference import region_routes_reference, region_size, routes_of_means
from vitrail.kernels.routing_attention.triton import _offsets, _pixels

_BLOCK = 64  # tokens that a program adds at a time
_MOST_RANKED = 512  # regions whose similarities fit into one tile


@triton.jit(do_not_specialize=["height", "width", "n_regions", "columns", "region_h", "region_w", "n_heads"])
def _means_kernel(
    x_ptr, pad_ptr, means_ptr, x_strides, height, width, n_regions, columns, region_h, region_w, n_heads,
    HAS_PAD: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program: mean over one region of one image and head, written to (B, R, heads, D)."""
    geometry = (height, width, n_regions, columns, region_h, region_w)
    head = tl.program_id(0) % n_heads
    slot = tl.program_id(0) // n_heads
    image = slot // n_regions
    region = slot % n_regions
    total = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for start in range(0, region_h * region_w, BLOCK):
        token = start + tl.arange(0, BLOCK)
        y, x, real = _pixels(region, token, geometry)
        real = real & (token < region_h * region_w)
        offsets = _offsets(image, y, x, head, x_strides, HEAD_DIM)
        total += tl.load(x_ptr + offsets, mask=real[:, None], other=0.0).to(tl.float32)
    mean = tl.sum(total, 0)
    channel = tl.arange(0, HEAD_DIM)
    if HAS_PAD:
        rows = tl.minimum(tl.maximum(height - (region // columns) * region_h, 0), region_h)
        real_columns = tl.minimum(tl.maximum(width - (region % columns) * region_w, 0), region_w)
        n_pads = region_h * region_w - rows * real_columns
        mean += n_pads.to(tl.float32) * tl.load(pad_ptr + head * HEAD_DIM + channel).to(tl.float32)
    mean = mean / (region_h * region_w).to(tl.float32)
    tl.store(means_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + channel, mean)


@triton.jit(do_not_specialize=["n_regions", "n_channels", "topk"])
def _rank_kernel(
    q_means_ptr, k_means_ptr, routes_ptr, n_regions, n_channels, topk,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the `topk` regions whose mean keys fit best, best first, for a block of regions of one image."""
    n_blocks = tl.cdiv(n_regions, BLOCK_Q)
    first = (tl.program_id(0) // n_blocks).to(tl.int64) * n_regions
    q_regions = (tl.program_id(0) % n_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_regions = tl.arange(0, BLOCK_K)
    q_rows = ((first + q_regions) * n_channels)[:, None] + tl.arange(0, BLOCK_C)[None, :]
    k_rows = ((first + k_regions) * n_channels)[:, None] + tl.arange(0, BLOCK_C)[None, :]
    similarity = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for start in range(0, n_channels, BLOCK_C):
        q = tl.load(q_means_ptr + q_rows + start, mask=(q_regions < n_regions)[:, None], other=0.0)
        k = tl.load(k_means_ptr + k_rows + start, mask=(k_regions < n_regions)[:, None], other=0.0)
        similarity = tl.dot(q, tl.trans(k), acc=similarity, input_precision="ieee")
    # What is no number ranks last but before what is no region: routes must not point outside the map.
    similarity = tl.where(similarity > -3e38, similarity, -3e38)
    similarity = tl.where((k_regions < n_regions)[None, :], similarity, float("-inf"))
    for place in range(topk):
        best = tl.argmax(similarity, 1)
        tl.store(routes_ptr + (first + q_regions) * topk + place, best.to(tl.int64), mask=q_regions < n_regions)
        similarity = tl.where(k_regions[None, :] == best[:, None], float("-inf"), similarity)


def region_routes_fused(
    q: Tensor, k: Tensor, pad_q: Tensor | None, pad_k: Tensor | None, n_regions: tuple[int, int], topk: int
) -> Tensor:
    """Fused `region_routes_reference`: reads q and k once and copies neither."""
    regions = n_regions[0] * n_regions[1]
    routes = torch.empty((q.shape[0], regions, topk), dtype=torch.int64, device=q.device)
    if routes.numel() == 0 or q.numel() == 0:
        return region_routes_reference(q, k, pad_q, pad_k, n_regions, topk)
    q_means, k_means = _region_means(q, pad_q, n_regions), _region_means(k, pad_k, n_regions)
    if regions > _MOST_RANKED:
        return routes_of_means(q_means, k_means, topk)
    blocks = {"BLOCK_Q": 16, "BLOCK_K": max(16, triton.next_power_of_2(regions)), "BLOCK_C": 16}
    grid = (q.shape[0] * triton.cdiv(regions, 16),)
    warps = 4 if regions <= 256 else 8
    launch(_rank_kernel, grid, q_means, k_means, routes, regions, q_means.shape[2], topk, **blocks, num_warps=warps)
    return routes


def _region_means(x: Tensor, pad: Tensor | None, n_regions: tuple[int, int]) -> Tensor:
    """Mean of each region, (B, R, heads * D), float32."""
    (x,) = unit_stride(x)
    batch, height, width, heads, dim = x.shape
    (region_h, region_w), pads = region_size(height, width, n_regions)
    regions = n_regions[0] * n_regions[1]
    means = torch.empty((batch, regions, heads * dim), dtype=torch.float32, device=x.device)
    has_pad = pads != (0, 0) and pad is not None
    block = min(_BLOCK, triton.next_power_of_2(region_h * region_w))
    pad = None if pad is None else pad.contiguous()
    launch(
        _means_kernel, (batch * regions * heads,), x, pad, means, *map_strides(x), height, width, regions, n_regions[1],
        region_h, region_w, heads, HAS_PAD=has_pad, BLOCK=block, HEAD_DIM=dim, num_warps=max(1, block * dim // 1024),
        num_stages=2,
    )  # fmt: skip
    return means
