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
from vitrail.kernels._common.flops import window_flops
from vitrail.kernels._common.gradients import empty_gradient
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.retention.reference import retention_gradients, retention_reference
from vitrail.kernels.window_attention.op import MAX_WINDOW

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? slopes, int[] window_size, int[] shift_size, "
    "str activation, bool signed_slopes, bool length_offset, float scale"
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


run_retention = register_operator(
    "retention", _ARGUMENTS, ("d_q", "d_k", "d_v", "d_decay", "d_slopes"), _forward, _backward
)


@register_flop_formula(torch.ops.vitrail.retention)
def _forward_flops(q_shape: Any, k: Any, v: Any, decay: Any, slopes: Any, window: Any, *_: Any, **__: Any) -> int:
    return window_flops(q_shape, window, 2)


@register_flop_formula(torch.ops.vitrail.retention_backward)
def _backward_flops(
    grad: Any, q_shape: Any, k: Any, v: Any, decay: Any, slopes: Any, window: Any, *_: Any, **__: Any
) -> int:
    return window_flops(q_shape, window, 5)
