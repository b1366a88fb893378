"""Registration of `vitrail::varied_window_attention` with PyTorch.

The operator runs on any device, by the reference. It saves its inputs only; the backward samples anew.
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
from vitrail.kernels.varied_window_attention.reference import (
    varied_window_attention_gradients,
    varied_window_attention_reference,
)

_N_TENSORS = 6
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor stretch, Tensor? bias, int[] window_size, int[] pad_start, "
    "float scale"
)
_GRADIENTS = "Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_offsets, Tensor d_stretch, Tensor d_bias"
torch.library.define("vitrail::varied_window_attention", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("vitrail::varied_window_attention_backward", f"(Tensor grad, {_ARGUMENTS}) -> ({_GRADIENTS})")


def fused_support(q: Tensor) -> Support:
    """The one place that says when varied-size window attention is handed to the reference, and why."""
    return Support(False, "varied-size window attention has no Triton kernel yet")


def _fake_forward(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return fake_gradients(grad, inputs[:_N_TENSORS])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS])
    ctx.constants = inputs[_N_TENSORS:]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vitrail.varied_window_attention_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return requested_gradients(ctx, gradients)


for _device in ("CPU", "CUDA"):
    torch.library.impl("vitrail::varied_window_attention", _device)(varied_window_attention_reference)
    torch.library.impl("vitrail::varied_window_attention_backward", _device)(varied_window_attention_gradients)
torch.library.register_fake("vitrail::varied_window_attention")(_fake_forward)
torch.library.register_fake("vitrail::varied_window_attention_backward")(_fake_backward)
torch.library.register_autograd("vitrail::varied_window_attention", _autograd_backward, setup_context=_save_inputs)


def _flops(q_shape: Sequence[int], offsets_shape: Sequence[int], window: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` (T, D) x (D, T) products in every window; sampling is not counted."""
    batch, rows, columns, heads, _ = offsets_shape
    return 2 * n_products * batch * rows * columns * heads * math.prod(window) ** 2 * q_shape[-1]


@register_flop_formula(torch.ops.vitrail.varied_window_attention)
def _forward_flops(
    q: Any, k: Any, v: Any, offsets: Any, stretch: Any, bias: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(q, offsets, window, 2)


@register_flop_formula(torch.ops.vitrail.varied_window_attention_backward)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, offsets: Any, stretch: Any, bias: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(q, offsets, window, 5)
