"""Registration of `vitrail::linear_attention` with PyTorch.

The operator runs on any device, by the reference. It saves its inputs only; the backward computes the sums anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support
from vitrail.kernels._common.gradients import fake_gradients, requested_gradients
from vitrail.kernels.linear_attention.reference import linear_attention_gradients, linear_attention_reference

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor temperature, float floor"
torch.library.define("vitrail::linear_attention", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "vitrail::linear_attention_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_temperature)",
)


def fused_support(q: Tensor) -> Support:
    """The one place that says when linear attention is handed to the reference, and why."""
    return Support(False, "linear attention has no Triton kernel yet")


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return fake_gradients(grad, inputs[:-1])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.floor = inputs[-1]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vitrail.linear_attention_backward(grad, *ctx.saved_tensors, ctx.floor)
    return requested_gradients(ctx, gradients)


for _device in ("CPU", "CUDA"):
    torch.library.impl("vitrail::linear_attention", _device)(linear_attention_reference)
    torch.library.impl("vitrail::linear_attention_backward", _device)(linear_attention_gradients)
torch.library.register_fake("vitrail::linear_attention")(_fake_forward)
torch.library.register_fake("vitrail::linear_attention_backward")(_fake_backward)
torch.library.register_autograd("vitrail::linear_attention", _autograd_backward, setup_context=_save_inputs)


def _flops(q_shape: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` products between (N, D) and (D, D) in every head."""
    return 2 * n_products * math.prod(q_shape) * q_shape[-1]


@register_flop_formula(torch.ops.vitrail.linear_attention)
def _forward_flops(q_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, 2)


@register_flop_formula(torch.ops.vitrail.linear_attention_backward)
def _backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(grad_shape, 6)
