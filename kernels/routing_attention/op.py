"""Registration of `vitrail::region_routes` and `vitrail::routing_attention` with PyTorch.

The operators run on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. They save their inputs only; the backward recomputes the attention weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support, triton_support
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import register_choice, register_operator
from vitrail.kernels.routing_attention.reference import (
    region_routes_reference,
    region_size,
    routing_attention_reference,
)

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? pad_k, Tensor? pad_v, Tensor routes, int[] n_regions, float scale"
_ROUTES_ARGUMENTS = "Tensor q, Tensor k, Tensor? pad_q, Tensor? pad_k, int[] n_regions, int topk"


def fused_support(q: Tensor) -> Support:
    """The one place that says when routes and routing attention are handed to the reference, and why."""
    return triton_support(q, q.shape[-1])


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    if fused_support(q).ok:
        from vitrail.kernels.routing_attention.triton import routing_attention_forward

        return routing_attention_forward(q, k, v, *rest)
    return routing_attention_reference(q, k, v, *rest)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if fused_support(q).ok:
        from vitrail.kernels.routing_attention.triton import routing_attention_backward

        return routing_attention_backward(grad, q, k, v, *rest)
    return reference_gradients(routing_attention_reference, (q, k, v, *rest[:2]), rest[2:], grad)


def _routes(q: Tensor, k: Tensor, pad_q: Any, pad_k: Any, n_regions: Any, topk: int) -> Tensor:
    if fused_support(q).ok:
        from vitrail.kernels.routing_attention.triton_routes import region_routes_fused

        return region_routes_fused(q, k, pad_q, pad_k, n_regions, topk)
    return region_routes_reference(q, k, pad_q, pad_k, n_regions, topk)


def _fake_routes(q: Tensor, k: Tensor, pad_q: Any, pad_k: Any, n_regions: Sequence[int], topk: int) -> Tensor:
    return torch.empty((q.shape[0], n_regions[0] * n_regions[1], topk), dtype=torch.int64, device=q.device)


run_region_routes = register_choice("region_routes", _ROUTES_ARGUMENTS, _routes, _fake_routes)
run_routing_attention = register_operator(
    "routing_attention",
    _ARGUMENTS,
    ("d_q", "d_k", "d_v", "d_pad_k", "d_pad_v"),
    _forward,
    _backward,
)


@register_flop_formula(torch.ops.vitrail.region_routes)
def _routes_flops(q_shape: Any, k: Any, pad_q: Any, pad_k: Any, n_regions: Any, *_: Any, **__: Any) -> int:
    """One product of all mean queries with all mean keys."""
    batch, _, _, heads, dim = q_shape
    return 2 * batch * math.prod(n_regions) ** 2 * heads * dim


def routing_flops(q_shape: Sequence[int], routes: Sequence[int], n_regions: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` products of a region's queries with the keys of its routed regions.

    Padded positions are included.
    """
    batch, height, width, heads, dim = q_shape
    tokens = math.prod(region_size(height, width, (n_regions[0], n_regions[1]))[0])
    return 2 * n_products * batch * math.prod(n_regions) * tokens * routes[2] * tokens * heads * dim


@register_flop_formula(torch.ops.vitrail.routing_attention)
def _forward_flops(
    q_shape: Any, k: Any, v: Any, pad_k: Any, pad_v: Any, routes: Any, n_regions: Any, *_: Any, **__: Any
) -> int:
    return routing_flops(q_shape, routes, n_regions, 2)


@register_flop_formula(torch.ops.vitrail.routing_attention_backward)
def _backward_flops(
    grad: Any, q_shape: Any, k: Any, v: Any, pad_k: Any, pad_v: Any, routes: Any, n_regions: Any, *_: Any, **__: Any
) -> int:
    """Five products where the forward has two: the logits anew, and four gradients."""
    return routing_flops(q_shape, routes, n_regions, 5)
