"""Registration of `vitrail::retention` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only; the backward recomputes the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support, triton_support
from vitrail.kernels._common.gradients import empty_gradient, fake_gradients, requested_gradients
from vitrail.kernels.retention.reference import retention_gradients, retention_reference
from vitrail.kernels.window_attention.op import MAX_WINDOW

_N_TENSORS = 5
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? slopes, int[] window_size, int[] shift_size, "
    "str activation, bool signed_slopes, bool length_offset, float scale"
)
torch.library.define("vitrail::retention", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "vitrail::retention_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_decay, Tensor d_slopes)",
)


def fused_support(q: Tensor, window_size: Sequence[int], activation: str) -> Support:
    """The one place that says when retention is handed to the reference, and why."""
    if activation != "softmax":
        return Support(False, f"Triton kernels compute the softmax, the activation is {activation!r}")
    if math.prod(window_size) > MAX_WINDOW:
        taken = f"Triton kernels take windows of up to {MAX_WINDOW} tokens"
        return Support(False, f"{taken}, the window is {tuple(window_size)}")
    return triton_support(q, q.shape[-1])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, slopes: Tensor | None, window: Any, shift: Any, activation: str,
    *rest: Any,
) -> Tensor:  # fmt: skip
    if fused_support(q, window, activation).ok:
        from vitrail.kernels.retention.triton import retention_forward

        return retention_forward(q, k, v, decay, window, shift, rest[-1])
    return retention_reference(q, k, v, decay, slopes, window, shift, activation, *rest)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, slopes: Tensor | None, window: Any, shift: Any,
    activation: str, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    if fused_support(q, window, activation).ok:
        from vitrail.kernels.retention.triton import retention_backward

        return *retention_backward(grad, q, k, v, decay, window, shift, rest[-1]), empty_gradient(grad)
    return retention_gradients(grad, q, k, v, decay, slopes, window, shift, activation, *rest)


def _fake_forward(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return fake_gradients(grad, inputs[:_N_TENSORS])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS])
    ctx.constants = inputs[_N_TENSORS:]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vitrail.retention_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return requested_gradients(ctx, gradients)


for _device in ("CPU", "CUDA"):
    torch.library.impl("vitrail::retention", _device)(_forward)
    torch.library.impl("vitrail::retention_backward", _device)(_backward)
torch.library.register_fake("vitrail::retention")(_fake_forward)
torch.library.register_fake("vitrail::retention_backward")(_fake_backward)
torch.library.register_autograd("vitrail::retention", _autograd_backward, setup_context=_save_inputs)


def _flops(q_shape: Sequence[int], window_size: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` (T, D) x (D, T) products in every window, padded positions included."""
    batch, height, width, heads, dim = q_shape
    n_windows = batch * math.ceil(height / window_size[0]) * math.ceil(width / window_size[1])
    return 2 * n_products * n_windows * heads * math.prod(window_size) ** 2 * dim


@register_flop_formula(torch.ops.vitrail.retention)
def _forward_flops(q_shape: Any, k: Any, v: Any, decay: Any, slopes: Any, window: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, window, 2)


@register_flop_formula(torch.ops.vitrail.retention_backward)
def _backward_flops(
    grad: Any, q_shape: Any, k: Any, v: Any, decay: Any, slopes: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(q_shape, window, 5)
