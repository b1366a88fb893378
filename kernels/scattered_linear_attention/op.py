"""Registration of `vitrail::scattered_linear_attention` and its packed form with PyTorch.

The operators run on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. They save their inputs only; the backward computes the windows' sums anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support, triton_support
from vitrail.kernels._common.registration import like_first, register_operator
from vitrail.kernels.scattered_linear_attention.reference import (
    scattered_linear_attention_gradients,
    scattered_linear_attention_reference,
)

_WINDOWS = "Tensor order, Tensor starts, Tensor ends, Tensor parts, float eps"
_MOST_HEAD_DIM = 64  # a program holds the sums of a window and their gradients, (D, D) each, in registers


def fused_support(q: Tensor) -> Support:
    """The one place that says when scattered linear attention is handed to the reference, and why."""
    if q.shape[-1] > _MOST_HEAD_DIM:
        return Support(False, f"the kernel takes heads up to {_MOST_HEAD_DIM} channels, the input has {q.shape[-1]}")
    return triton_support(q, q.shape[-1])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, starts: Tensor, ends: Tensor, parts: Tensor, eps: float
) -> Tensor:
    if fused_support(q).ok:
        from vitrail.kernels.scattered_linear_attention.triton import scattered_linear_attention_forward

        return scattered_linear_attention_forward(q, k, v, order, starts, ends, parts, eps)
    return scattered_linear_attention_reference(q, k, v, order, starts, ends, parts, eps)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    starts: Tensor,
    ends: Tensor,
    parts: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if fused_support(q).ok:
        from vitrail.kernels.scattered_linear_attention.triton import scattered_linear_attention_backward

        d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        scattered_linear_attention_backward(grad, q, k, v, d_q, d_k, d_v, order, starts, ends, parts, eps)
        return d_q, d_k, d_v
    return scattered_linear_attention_gradients(grad, q, k, v, order, starts, ends, parts, eps)


def _packed_forward(qkv: Tensor, order: Tensor, starts: Tensor, ends: Tensor, parts: Tensor, eps: float) -> Tensor:
    q, k, v = qkv.unbind(1)
    return _forward(q, k, v, order, starts, ends, parts, eps)


def _packed_backward(
    grad: Tensor, qkv: Tensor, order: Tensor, starts: Tensor, ends: Tensor, parts: Tensor, eps: float
) -> Tensor:
    q, k, v = qkv.unbind(1)
    if fused_support(q).ok:
        from vitrail.kernels.scattered_linear_attention.triton import scattered_linear_attention_backward

        d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        d_q, d_k, d_v = d_qkv.unbind(1)
        scattered_linear_attention_backward(grad, q, k, v, d_q, d_k, d_v, order, starts, ends, parts, eps)
        return d_qkv
    return torch.stack(scattered_linear_attention_gradients(grad, q, k, v, order, starts, ends, parts, eps), 1)


def _like_first_of_packed(qkv: Tensor, *_: Any) -> Tensor:
    return like_first(qkv.select(1, 0))


run_scattered_linear_attention = register_operator(
    "scattered_linear_attention",
    f"Tensor q, Tensor k, Tensor v, {_WINDOWS}",
    ("d_q", "d_k", "d_v"),
    _forward,
    _backward,
)
run_scattered_linear_attention_packed = register_operator(
    "scattered_linear_attention_packed",
    f"Tensor qkv, {_WINDOWS}",
    ("d_qkv",),
    _packed_forward,
    _packed_backward,
    _like_first_of_packed,
)


def _flops(shape: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` products between (N, D) and (D, D) in every head, padding left out."""
    return 2 * n_products * math.prod(shape) * shape[-1]


@register_flop_formula(torch.ops.vitrail.scattered_linear_attention)
def _forward_flops(q_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, 2)


@register_flop_formula(torch.ops.vitrail.scattered_linear_attention_packed)
def _packed_forward_flops(qkv_shape: Any, *_: Any, **__: Any) -> int:
    return _flops((qkv_shape[0], *qkv_shape[2:]), 2)


@register_flop_formula(torch.ops.vitrail.scattered_linear_attention_backward)
def _backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(grad_shape, 6)


@register_flop_formula(torch.ops.vitrail.scattered_linear_attention_packed_backward)
def _packed_backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(grad_shape, 6)
