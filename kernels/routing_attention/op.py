"""Registration of `vitrail::region_routes` and `vitrail::routing_attention` with PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.routing_attention.reference import (
    region_routes_reference,
    region_size,
    routing_attention_reference,
)

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? pad_k, Tensor? pad_v, Tensor routes, int[] n_regions, float scale"
torch.library.define(
    "vitrail::region_routes",
    "(Tensor q, Tensor k, Tensor? pad_q, Tensor? pad_k, int[] n_regions, int topk) -> Tensor",
)


def fused_support(q: Tensor) -> Support:
    """The one place that says when routing attention is handed to the reference, and why."""
    return Support(False, "routing attention has no fused kernel yet")


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return reference_gradients(routing_attention_reference, (q, k, v, *rest[:2]), rest[2:], grad)


def _fake_routes(q: Tensor, k: Tensor, pad_q: Any, pad_k: Any, n_regions: Sequence[int], topk: int) -> Tensor:
    return torch.empty((q.shape[0], n_regions[0] * n_regions[1], topk), dtype=torch.int64, device=q.device)


for _device in ("CPU", "CUDA"):
    torch.library.impl("vitrail::region_routes", _device)(region_routes_reference)
torch.library.register_fake("vitrail::region_routes")(_fake_routes)
register_operator(
    "routing_attention",
    _ARGUMENTS,
    ("d_q", "d_k", "d_v", "d_pad_k", "d_pad_v"),
    routing_attention_reference,
    _backward,
)


@register_flop_formula(torch.ops.vitrail.region_routes)
def _routes_flops(q_shape: Any, k: Any, pad_q: Any, pad_k: Any, n_regions: Any, *_: Any, **__: Any) -> int:
    """One product of all mean queries with all mean keys."""
    batch, _, _, heads, dim = q_shape
    return 2 * batch * math.prod(n_regions) ** 2 * heads * dim


@register_flop_formula(torch.ops.vitrail.routing_attention_backward)
def _backward_flops(grad_shape: Any, *forward_shapes: Any, **__: Any) -> int:
    """Five products where the forward has two: the logits anew, and four gradients."""
    return _forward_flops(*forward_shapes) // 2 * 5


@register_flop_formula(torch.ops.vitrail.routing_attention)
def _forward_flops(
    q_shape: Any, k: Any, v: Any, pad_k: Any, pad_v: Any, routes: Any, n_regions: Any, *_: Any, **__: Any
) -> int:
    """Two products of a region's queries with the keys of its routed regions, padded positions included."""
    batch, height, width, heads, dim = q_shape
    tokens = math.prod(region_size(height, width, n_regions)[0])
    return 4 * batch * math.prod(n_regions) * tokens * routes[2] * tokens * heads * dim
