"""Registration of `vitrail::routing_attention_lepe` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only; the backward recomputes the attention weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.depthwise_conv import op as depthwise_conv
from vitrail.kernels.routing_attention import op as routing_attention
from vitrail.kernels.routing_attention_lepe.reference import routing_attention_lepe_reference

_ARGUMENTS = "Tensor qkv, Tensor? pads, Tensor weight, Tensor? bias, Tensor routes, int[] n_regions, float scale"


def fused_support(qkv: Tensor, weight: Tensor) -> Support:
    """The one place that says when both parts are handed to the reference, and why: one of them cannot be fused."""
    attention = routing_attention.fused_support(qkv)
    return depthwise_conv.fused_support(qkv, weight) if attention.ok else attention


def _forward(qkv: Tensor, pads: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    if fused_support(qkv, weight).ok:
        from vitrail.kernels.routing_attention_lepe.triton import routing_attention_lepe_forward

        return routing_attention_lepe_forward(qkv, pads, weight, *rest)
    return routing_attention_lepe_reference(qkv, pads, weight, *rest).contiguous()


def _backward(
    grad: Tensor, qkv: Tensor, pads: Tensor | None, weight: Tensor, bias: Tensor | None, *constants: Any
) -> tuple[Tensor, ...]:
    if fused_support(qkv, weight).ok:
        from vitrail.kernels.routing_attention_lepe.triton import routing_attention_lepe_backward

        return routing_attention_lepe_backward(grad, qkv, pads, weight, bias, *constants)
    return reference_gradients(routing_attention_lepe_reference, (qkv, pads, weight, bias), constants, grad)


def _fake_forward(qkv: Tensor, *_: Any) -> Tensor:
    shape = (*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    return torch.empty(shape, dtype=qkv.dtype, device=qkv.device)


run_routing_attention_lepe = register_operator(
    "routing_attention_lepe",
    _ARGUMENTS,
    ("d_qkv", "d_pads", "d_weight", "d_bias"),
    _forward,
    _backward,
    _fake_forward,
)


@register_flop_formula(torch.ops.vitrail.routing_attention_lepe)
def _forward_flops(
    qkv_shape: Any, pads: Any, weight: Any, bias: Any, routes: Any, n_regions: Any, *_: Any, **__: Any
) -> int:
    return _flops(qkv_shape, weight, routes, n_regions, 2, 1)


@register_flop_formula(torch.ops.vitrail.routing_attention_lepe_backward)
def _backward_flops(
    grad: Any, qkv_shape: Any, pads: Any, weight: Any, bias: Any, routes: Any, n_regions: Any, *_: Any, **__: Any
) -> int:
    return _flops(qkv_shape, weight, routes, n_regions, 5, 2)


def _flops(qkv: Any, weight: Any, routes: Any, n_regions: Any, n_products: int, n_convolutions: int) -> int:
    """Those of the two operators, each with so many products or convolutions."""
    shape = (*qkv[:3], *qkv[4:])
    convolution = 2 * math.prod(shape) * math.prod(weight[2:])
    return routing_attention.routing_flops(shape, routes, n_regions, n_products) + n_convolutions * convolution
