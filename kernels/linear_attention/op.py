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
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.linear_attention.reference import linear_attention_gradients, linear_attention_reference

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor temperature, float floor"


def fused_support(q: Tensor) -> Support:
    """The one place that says when linear attention is handed to the reference, and why."""
    return Support(False, "linear attention has no Triton kernel yet")


register_operator(
    "linear_attention",
    _ARGUMENTS,
    ("d_q", "d_k", "d_v", "d_temperature"),
    linear_attention_reference,
    linear_attention_gradients,
)


def _flops(q_shape: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` products between (N, D) and (D, D) in every head."""
    return 2 * n_products * math.prod(q_shape) * q_shape[-1]


@register_flop_formula(torch.ops.vitrail.linear_attention)
def _forward_flops(q_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, 2)


@register_flop_formula(torch.ops.vitrail.linear_attention_backward)
def _backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    return _flops(grad_shape, 6)
