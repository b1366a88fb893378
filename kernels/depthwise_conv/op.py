"""Registration of `vitrail::depthwise_conv` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only, without the residual; the backward recomputes what GELU saw.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS, Support, triton_support
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.depthwise_conv.reference import depthwise_conv_reference

FUSED_SIZES = (3, 5, 7)
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? pad_value, Tensor? residual, SymInt[] pads, bool gelu, bool skip"
)


def fused_support(x: Tensor, weight: Tensor) -> Support:
    """The one place that says when depth-wise convolution is handed to the reference, and why."""
    if weight.shape[3] not in FUSED_SIZES:
        return Support(False, f"Triton kernels take filters of {FUSED_SIZES} pixels, the filter has {weight.shape[3]}")
    # Channels are masked: only device and dtype matter, and any width that the shared conditions allow stands for all.
    return triton_support(x, FUSED_HEAD_DIMS[0])


def _forward(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    if fused_support(x, weight).ok:
        from vitrail.kernels.depthwise_conv.triton import depthwise_conv_forward

        return depthwise_conv_forward(x, weight, *rest)
    return depthwise_conv_reference(x, weight, *rest).contiguous()


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pad_value: Tensor | None, *constants: Any
) -> tuple[Tensor, ...]:
    if fused_support(x, weight).ok:
        from vitrail.kernels.depthwise_conv.triton import depthwise_conv_backward

        return depthwise_conv_backward(grad, x, weight, bias, pad_value, *constants)
    *gradients, _ = reference_gradients(
        depthwise_conv_reference, (x, weight, bias, pad_value, None), constants, grad
    )  # fmt: skip
    return tuple(gradients)


run_depthwise_conv = register_operator(
    "depthwise_conv", _ARGUMENTS, ("d_x", "d_weight", "d_bias", "d_pad_value"), _forward, _backward, adds_last=True
)


@register_flop_formula(torch.ops.vitrail.depthwise_conv)
def _forward_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """Two FLOPs a tap, like PyTorch's own convolution."""
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


@register_flop_formula(torch.ops.vitrail.depthwise_conv_backward)
def _backward_flops(
    grad: Any, x: Any, weight: Any, bias: Any, pad_value: Any, pads: Any, gelu: bool, *_: Any, **__: Any
) -> int:
    """As many for the map and for the filter, and once more for what GELU saw."""
    return (3 if gelu else 2) * _forward_flops(x, weight)
