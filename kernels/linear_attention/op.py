"""Registration of `vitrail::linear_attention` and `vitrail::linear_attention_packed` with PyTorch.

The operators run on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. They save their inputs only; the backward computes the sums anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support, triton_support
from vitrail.kernels._common.registration import like_first_of_packed, register_operator
from vitrail.kernels.linear_attention.reference import linear_attention_gradients, linear_attention_reference

_SEPARATE = "Tensor q, Tensor k, Tensor v, Tensor temperature, float floor"
_PACKED = "Tensor qkv, Tensor temperature, float floor"


def fused_support(q: Tensor) -> Support:
    """The one place that says when linear attention is handed to the reference, and why."""
    return triton_support(q, q.shape[-1])


def _forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, floor: float) -> Tensor:
    if fused_support(q).ok:
        from vitrail.kernels.linear_attention.triton import linear_attention_forward

        return linear_attention_forward(q, k, v, temperature, floor)
    return linear_attention_reference(q, k, v, temperature, floor)


def _packed_forward(qkv: Tensor, temperature: Tensor, floor: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    return _forward(q, k, v, temperature, floor)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if fused_support(q).ok:
        from vitrail.kernels.linear_attention.triton import linear_attention_backward

        d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        return d_q, d_k, d_v, linear_attention_backward(grad, q, k, v, temperature, d_q, d_k, d_v, floor)
    return linear_attention_gradients(grad, q, k, v, temperature, floor)


def _packed_backward(grad: Tensor, qkv: Tensor, temperature: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(3)
    if fused_support(q).ok:
        from vitrail.kernels.linear_attention.triton import linear_attention_backward

        d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        d_q, d_k, d_v = d_qkv.unbind(3)
        return d_qkv, linear_attention_backward(grad, q, k, v, temperature, d_q, d_k, d_v, floor)
    *gradients, d_temperature = linear_attention_gradients(grad, q, k, v, temperature, floor)
    return torch.stack(gradients, 3), d_temperature


run_linear_attention = register_operator(
    "linear_attention", _SEPARATE, ("d_q", "d_k", "d_v", "d_temperature"), _forward, _backward
)
run_linear_attention_packed = register_operator(
    "linear_attention_packed",
    _PACKED,
    ("d_qkv", "d_temperature"),
    _packed_forward,
    _packed_backward,
    fake_forward=like_first_of_packed,
)


def _flops(shape: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` products between (N, D) and (D, D) in every head."""
    return 2 * n_products * math.prod(shape) * shape[-1]


@register_flop_formula(torch.ops.vitrail.linear_attention)
def _forward_flops(q_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, 2)


@register_flop_formula(torch.ops.vitrail.linear_attention_packed)
def _packed_forward_flops(qkv_shape: Any, *_: Any, **__: Any) -> int:
    return _flops((*qkv_shape[:3], *qkv_shape[4:]), 2)


@register_flop_formula(
    [torch.ops.vitrail.linear_attention_backward, torch.ops.vitrail.linear_attention_packed_backward]
)
def _backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(grad_shape, 5)
