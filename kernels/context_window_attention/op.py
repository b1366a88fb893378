"""Registration of `vitrail::context_window_attention` with PyTorch.

The operator runs on any device, by the reference. It saves its inputs only; the backward recomputes the weights.
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
from vitrail.kernels.context_window_attention.reference import (
    context_window_attention_gradients,
    context_window_attention_reference,
)

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, int[] window_size, int[] row_starts, int[] column_starts, float scale"
torch.library.define("vitrail::context_window_attention", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "vitrail::context_window_attention_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor d_q, Tensor d_k, Tensor d_v)",
)


def fused_support(q: Tensor) -> Support:
    """The one place that says when context window attention is handed to the reference, and why."""
    return Support(False, "context window attention has no Triton kernel yet")


def _fake_forward(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return fake_gradients(grad, inputs[:3])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.constants = inputs[3:]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vitrail.context_window_attention_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return requested_gradients(ctx, gradients)


for _device in ("CPU", "CUDA"):
    torch.library.impl("vitrail::context_window_attention", _device)(context_window_attention_reference)
    torch.library.impl("vitrail::context_window_attention_backward", _device)(context_window_attention_gradients)
torch.library.register_fake("vitrail::context_window_attention")(_fake_forward)
torch.library.register_fake("vitrail::context_window_attention_backward")(_fake_backward)
torch.library.register_autograd("vitrail::context_window_attention", _autograd_backward, setup_context=_save_inputs)


def _flops(q_shape: Sequence[int], window_size: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` (T, D) x (D, T) products in every window, cut-off ones in full."""
    batch, height, width, heads, dim = q_shape
    n_windows = batch * math.ceil(height / window_size[0]) * math.ceil(width / window_size[1])
    return 2 * n_products * n_windows * heads * math.prod(window_size) ** 2 * dim


@register_flop_formula(torch.ops.vitrail.context_window_attention)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, window: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, window, 2)


@register_flop_formula(torch.ops.vitrail.context_window_attention_backward)
def _backward_flops(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, window: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, window, 5)
