"""Registration of `vitrail::channel_attention` and `vitrail::channel_attention_packed` with PyTorch.

The operators run on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. They save their inputs only; the backward recomputes the map.
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
from vitrail.kernels.channel_attention.reference import (
    channel_attention_gradients,
    channel_attention_reference,
    packed_reference,
)


def fused_support(q: Tensor) -> Support:
    """The one place that says when channel attention is handed to the reference, and why."""
    return triton_support(q, q.shape[-1])


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if fused_support(q).ok:
        from vitrail.kernels.channel_attention.triton import channel_attention_forward

        return channel_attention_forward(q, k, v, scale)
    return channel_attention_reference(q, k, v, scale)


def _packed_forward(qkv: Tensor, scale: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    return _forward(q, k, v, scale) if fused_support(q).ok else packed_reference(qkv, scale)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    if fused_support(q).ok:
        from vitrail.kernels.channel_attention.triton import channel_attention_backward

        d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        channel_attention_backward(grad, q, k, v, d_q, d_k, d_v, scale)
        return d_q, d_k, d_v
    return channel_attention_gradients(grad, q, k, v, scale)


def _packed_backward(grad: Tensor, qkv: Tensor, scale: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    if fused_support(q).ok:
        from vitrail.kernels.channel_attention.triton import channel_attention_backward

        d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        d_q, d_k, d_v = d_qkv.unbind(3)
        channel_attention_backward(grad, q, k, v, d_q, d_k, d_v, scale)
        return d_qkv
    return torch.stack(channel_attention_gradients(grad, q, k, v, scale), 3)


run_channel_attention = register_operator(
    "channel_attention", "Tensor q, Tensor k, Tensor v, float scale", ("d_q", "d_k", "d_v"), _forward, _backward
)
run_channel_attention_packed = register_operator(
    "channel_attention_packed",
    "Tensor qkv, float scale",
    ("d_qkv",),
    _packed_forward,
    _packed_backward,
    like_first_of_packed,
)


def _flops(shape: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` products between (N, D) and (D, D) in every group."""
    batch, height, width, groups, dim = shape
    return 2 * n_products * math.prod((batch, height, width, groups, dim, dim))


@register_flop_formula(torch.ops.vitrail.channel_attention)
def _forward_flops(q_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, 2)


@register_flop_formula(torch.ops.vitrail.channel_attention_packed)
def _packed_forward_flops(qkv_shape: Any, *_: Any, **__: Any) -> int:
    return _flops((*qkv_shape[:3], *qkv_shape[4:]), 2)


@register_flop_formula(torch.ops.vitrail.channel_attention_backward)
def _backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(grad_shape, 5)


@register_flop_formula(torch.ops.vitrail.channel_attention_packed_backward)
def _packed_backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(grad_shape, 5)
