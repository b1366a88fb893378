"""Registration of `vitrail::context_window_attention` with PyTorch.

The operator runs on any device, by the reference. It saves its inputs only; the backward recomputes the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support
from vitrail.kernels._common.flops import window_flops
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.context_window_attention.reference import (
    context_window_attention_gradients,
    context_window_attention_reference,
)

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, int[] window_size, int[] row_starts, int[] column_starts, float scale"


def fused_support(q: Tensor) -> Support:
    """The one place that says when context window attention is handed to the reference, and why."""
    return Support(False, "context window attention has no Triton kernel yet")


register_operator(
    "context_window_attention",
    _ARGUMENTS,
    ("d_q", "d_k", "d_v"),
    context_window_attention_reference,
    context_window_attention_gradients,
)


@register_flop_formula(torch.ops.vitrail.context_window_attention)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, window: Any, *_: Any, **__: Any) -> int:
    return window_flops(q_shape, window, 2)


@register_flop_formula(torch.ops.vitrail.context_window_attention_backward)
def _backward_flops(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, window: Any, *_: Any, **__: Any) -> int:
    return window_flops(q_shape, window, 5)
