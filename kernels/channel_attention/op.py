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
from vitrail.kernels._common.gradients import fake_gradients, requested_gradients
from vitrail.kernels.channel_attention.reference import (
    channel_attention_gradients,
    channel_attention_reference,
    packed_reference,
)

torch.library.define("vitrail::channel_attention", "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
torch.library.define("vitrail::channel_attention_packed", "(Tensor qkv, float scale) -> Tensor")
torch.library.define(
    "vitrail::channel_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, float scale) -> (Tensor d_q, Tensor d_k, Tensor d_v)",
)
torch.library.define("vitrail::channel_attention_packed_backward", "(Tensor grad, Tensor qkv, float scale) -> Tensor")


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


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_packed_forward(qkv: Tensor, scale: float) -> Tensor:
    return torch.empty((*qkv.shape[:3], *qkv.shape[4:]), dtype=qkv.dtype, device=qkv.device)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    return fake_gradients(grad, (q, k, v))


def _fake_packed_backward(grad: Tensor, qkv: Tensor, scale: float) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.scale = inputs[-1]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vitrail.channel_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return requested_gradients(ctx, gradients)


def _autograd_packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.vitrail.channel_attention_packed_backward(grad, *ctx.saved_tensors, ctx.scale), None


for _device in ("CPU", "CUDA"):
    torch.library.impl("vitrail::channel_attention", _device)(_forward)
    torch.library.impl("vitrail::channel_attention_packed", _device)(_packed_forward)
    torch.library.impl("vitrail::channel_attention_backward", _device)(_backward)
    torch.library.impl("vitrail::channel_attention_packed_backward", _device)(_packed_backward)
torch.library.register_fake("vitrail::channel_attention")(_fake_forward)
torch.library.register_fake("vitrail::channel_attention_packed")(_fake_packed_forward)
torch.library.register_fake("vitrail::channel_attention_backward")(_fake_backward)
torch.library.register_fake("vitrail::channel_attention_packed_backward")(_fake_packed_backward)
torch.library.register_autograd("vitrail::channel_attention", _autograd_backward, setup_context=_save_inputs)
torch.library.register_autograd(
    "vitrail::channel_attention_packed", _autograd_packed_backward, setup_context=_save_inputs
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
