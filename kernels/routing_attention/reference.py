"""Bi-level routing attention in plain PyTorch (BiFormer, arXiv 2303.08810, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.partition import from_windows, pad_map, to_windows


def region_size(height: int, width: int, n_regions: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a region, and of the padding that makes all regions whole."""
    # No negative number is divided: ONNX rounds such a quotient towards zero.
    size = ((height + n_regions[0] - 1) // n_regions[0], (width + n_regions[1] - 1) // n_regions[1])
    return size, (size[0] * n_regions[0] - height, size[1] * n_regions[1] - width)


@torch.no_grad()
def region_routes_reference(
    q: Tensor, k: Tensor, pad_q: Tensor | None, pad_k: Tensor | None, n_regions: tuple[int, int], topk: int
) -> Tensor:
    """The `topk` regions whose mean key has the largest product with each region's mean query; (B, R, topk)."""
    return region_similarities(q, k, pad_q, pad_k, n_regions).topk(topk, dim=-1).indices


def region_similarities(
    q: Tensor, k: Tensor, pad_q: Tensor | None, pad_k: Tensor | None, n_regions: tuple[int, int]
) -> Tensor:
    """Products of each region's mean query with the mean keys of all, (B, R, R), in float32 or float64."""
    size, pads = region_size(q.shape[1], q.shape[2], n_regions)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, regions = q.shape[0], n_regions[0] * n_regions[1]
    means = [
        to_windows(pad_map(x.to(dtype), pads, pad), size, (0, 0))
        .mean(1)
        .reshape(batch, regions, x.shape[3] * x.shape[4])
        for x, pad in ((q, pad_q), (k, pad_k))
    ]
    return _product(means[0], means[1].transpose(1, 2))


def routes_of_means(q_means: Tensor, k_means: Tensor, topk: int) -> Tensor:
    """The `topk` regions whose mean keys (B, R, C) fit each mean query best, best first; (B, R, topk)."""
    return _product(q_means, k_means.transpose(1, 2)).topk(topk, dim=-1).indices


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product that autocast leaves alone: rounding must not change which regions are chosen."""
    device_type = a.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return a @ b
    with torch.autocast(device_type, enabled=False):
        return a @ b


def routing_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    routes: Tensor,
    n_regions: tuple[int, int],
    scale: float,
) -> Tensor:
    """Softmax attention of every region's queries over the keys of its routed regions."""
    size, pads = region_size(q.shape[1], q.shape[2], n_regions)
    batch, regions = routes.shape[:2]
    heads, dim = q.shape[3:]
    q_regions = to_windows(pad_map(q, pads, None), size, (0, 0))  # (B * R, T, heads, D)
    tokens = size[0] * size[1]
    rows = routes + regions * torch.arange(batch, device=q.device)[:, None, None]

    def gather(x: Tensor, pad: Tensor | None) -> Tensor:
        table = to_windows(pad_map(x, pads, pad), size, (0, 0)).reshape(batch * regions, tokens * heads * dim)
        # A table look-up, for its backward: quicker on CPUs than that of indexing, and summed in a fixed order.
        gathered = F.embedding(rows, table)  # (B, R, k, T * heads * D)
        gathered = gathered.reshape(batch * regions, routes.shape[2] * tokens, heads, dim)
        return gathered.transpose(1, 2)  # (B * R, heads, kT, D)

    out = F.scaled_dot_product_attention(q_regions.transpose(1, 2), gather(k, pad_k), gather(v, pad_v), scale=scale)
    return from_windows(out.transpose(1, 2), q, pads, size, (0, 0))
