"""Registration of `vitrail::{sparse_conv,depthwise_sparse_conv,mixed_depthwise_conv}` with PyTorch.

The operators run on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. They save their inputs only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS, Support, triton_support
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.sparse_conv.reference import (
    depthwise_gradients,
    depthwise_reference,
    mix_gradients,
    mix_reference,
    sparse_conv_gradients,
    sparse_conv_reference,
)

_ARGUMENTS = "Tensor features, Tensor weight, Tensor table, Tensor transposed"
_MIX_ARGUMENTS = (
    "Tensor features, Tensor weight_a, Tensor weight_b, Tensor weight_c, Tensor table_a, Tensor transposed_a, "
    "Tensor table_b, Tensor transposed_b, Tensor table_c, Tensor transposed_c"
)


def fused_support(features: Tensor) -> Support:
    """The one place that says when sparse convolution is handed to the reference, and why."""
    # Channels are masked: only device and dtype matter, and any width that the shared conditions allow stands for all.
    return triton_support(features, FUSED_HEAD_DIMS[0])


def _forward(features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor) -> Tensor:
    if fused_support(features).ok:
        from vitrail.kernels.sparse_conv.triton import sparse_conv_forward

        return sparse_conv_forward(features, weight, table)
    return sparse_conv_reference(features, weight, table, transposed)


def _backward(
    grad: Tensor, features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor
) -> tuple[Tensor, Tensor]:
    if fused_support(features).ok:
        from vitrail.kernels.sparse_conv.triton import sparse_conv_backward

        return sparse_conv_backward(grad, features, weight, table, transposed)
    return sparse_conv_gradients(grad, features, weight, table, transposed)


def _depthwise_forward(features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor) -> Tensor:
    if fused_support(features).ok:
        from vitrail.kernels.sparse_conv.triton import depthwise_forward

        return depthwise_forward(features, weight, table)
    return depthwise_reference(features, weight, table, transposed)


def _depthwise_backward(
    grad: Tensor, features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor
) -> tuple[Tensor, Tensor]:
    if fused_support(features).ok:
        from vitrail.kernels.sparse_conv.triton import depthwise_backward

        return depthwise_backward(grad, features, weight, table, transposed)
    return depthwise_gradients(grad, features, weight, table, transposed)


def _mix_forward(features: Tensor, *others: Tensor) -> Tensor:
    weights, tables = others[:3], others[3::2]
    if fused_support(features).ok:
        from vitrail.kernels.sparse_conv.triton import mix_forward

        return mix_forward(features, weights, tables)
    return mix_reference(features, weights, tables)


def _mix_backward(grad: Tensor, features: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    weights, tables, transposed = others[:3], others[3::2], others[4::2]
    if fused_support(features).ok:
        from vitrail.kernels.sparse_conv.triton import mix_backward

        return mix_backward(grad, features, weights, tables, transposed)
    return mix_gradients(grad, features, weights, tables, transposed)


def _fake_forward(features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor) -> Tensor:
    return features.new_empty(table.shape[1], weight.shape[0])


def _fake_depthwise(features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor) -> Tensor:
    return features.new_empty(table.shape[1], features.shape[1])


run_sparse_conv = register_operator(
    "sparse_conv", _ARGUMENTS, ("d_features", "d_weight"), _forward, _backward, _fake_forward
)
run_depthwise_sparse_conv = register_operator(
    "depthwise_sparse_conv",
    _ARGUMENTS,
    ("d_features", "d_weight"),
    _depthwise_forward,
    _depthwise_backward,
    _fake_depthwise,
)
run_mixed_depthwise_conv = register_operator(
    "mixed_depthwise_conv",
    _MIX_ARGUMENTS,
    ("d_features", "d_weight_a", "d_weight_b", "d_weight_c"),
    _mix_forward,
    _mix_backward,
)


@register_flop_formula(torch.ops.vitrail.sparse_conv)
def _forward_flops(features_shape: Any, weight_shape: Any, table_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight_shape) * table_shape[1]


@register_flop_formula(torch.ops.vitrail.sparse_conv_backward)
def _backward_flops(grad_shape: Any, features_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight_shape) * (grad_shape[0] + features_shape[0])
