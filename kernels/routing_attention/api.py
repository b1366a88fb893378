"""Public functions of routing attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_dims,
    check_pads,
    check_projections,
    check_shape,
    to_pair,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.routing_attention.op import fused_support, run_region_routes, run_routing_attention
from vitrail.kernels.routing_attention.reference import region_routes_reference, routing_attention_reference

_NAME = "routing_attention"


@shortened
def region_routes(
    q: Tensor,
    k: Tensor,
    *,
    n_regions: int | Sequence[int],
    topk: int,
    pad_q: Tensor | None = None,
    pad_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The regions that each region attends to: those whose mean keys fit its mean query best.

    Computed over all heads together, in float32 (float64 for float64 inputs), without gradients
    (BiFormer, arXiv 2303.08810, section 3.2, equations 3 and 4).

    Args:
        q: Queries, (B, H, W, heads, D).
        k: Keys, like `q`.
        n_regions: Rows and columns of the region grid; the map is padded to whole regions.
        topk: Routed regions of each region.
        pad_q: Query that every padded position holds, (heads, D); zeros by default.
        pad_k: Key that every padded position holds, (heads, D); zeros by default.
        backend: "auto", "eager" or "triton".

    Returns:
        Raster indices of regions, (B, R, topk), int64.

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes do not fit together or `topk` is out of range.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    regions = _check_routes(q, k, pad_q, pad_k, n_regions, topk)
    arguments = (q, k, pad_q, pad_k, regions, topk)
    if choose_backend("region_routes", backend, fused_support(q), q) == "triton":
        return run_region_routes(*arguments)
    return region_routes_reference(*arguments)


@shortened
def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    n_regions: int | Sequence[int],
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every region over the tokens of its routed regions.

    Args:
        q: Queries, (B, H, W, heads, D).
        k: Keys, like `q`.
        v: Values, like `q`.
        routes: Distinct regions that each region attends to, (B, R, topk), int64, in 0 ... R - 1; see `region_routes`.
        n_regions: Rows and columns of the region grid; the map is padded at the bottom and right to whole regions.
        pad_k: Key that every padded position holds, (heads, D); zeros by default. Padded positions are keys.
        pad_v: Value that every padded position holds, (heads, D); zeros by default.
        scale: Factor on `q k^T`; `D ** -0.5` by default.
        backend: "auto", "eager" or "triton".

    Returns:
        (B, H, W, heads, D), contiguous.

    Raises:
        TypeError: An input is not floating point, or `routes` is not int64.
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    regions = _check_attention(q, k, v, pad_k, pad_v, routes, n_regions)
    q, k, v = autocast_together(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, pad_k, pad_v, routes, regions, scale)
    if choose_backend(_NAME, backend, fused_support(q), q) == "triton":
        return run_routing_attention(*arguments)
    return routing_attention_reference(*arguments)


def _check_routes(
    q: Tensor, k: Tensor, pad_q: Tensor | None, pad_k: Tensor | None, n_regions: int | Sequence[int], topk: int
) -> tuple[int, int]:
    """Checks the arguments of `region_routes`; returns the normalised number of regions."""
    check_projections(_NAME, "(B, H, W, heads, D)", q=q, k=k)
    regions = to_pair(_NAME, "n_regions", n_regions, 1)
    if not 1 <= topk <= regions[0] * regions[1]:
        raise ValueError(f"{_NAME}: topk is {topk}; allowed: 1 to the number of regions, {regions[0] * regions[1]}")
    check_pads(_NAME, q, pad_q=pad_q, pad_k=pad_k)
    return regions


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    routes: Tensor,
    n_regions: int | Sequence[int],
) -> tuple[int, int]:
    """Checks the arguments of `routing_attention`; returns the normalised number of regions."""
    check_projections(_NAME, "(B, H, W, heads, D)", q=q, k=k, v=v)
    regions = check_routing(_NAME, q.shape[0], routes, n_regions)
    check_pads(_NAME, q, pad_k=pad_k, pad_v=pad_v)
    return regions


def check_routing(op: str, batch: int, routes: Tensor, n_regions: int | Sequence[int]) -> tuple[int, int]:
    """Checks the routes of a batch; returns the normalised number of regions."""
    regions = to_pair(op, "n_regions", n_regions, 1)
    check_dims(op, "routes", routes, "(B, R, topk)")
    check_shape(op, "routes", routes, (batch, regions[0] * regions[1], routes.shape[2]))
    if routes.dtype != torch.int64:
        raise TypeError(f"{op}: routes is {routes.dtype}; allowed: torch.int64")
    return regions
