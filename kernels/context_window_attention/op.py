"""Registration of `vitrail::context_window_attention` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only; the backward recomputes the attention weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS, Support, triton_support
from vitrail.kernels._common.flops import window_flops
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.context_window_attention.reference import (
    context_window_attention_gradients,
    context_window_attention_reference,
)

HEAD_DIMS = (*FUSED_HEAD_DIMS, 256, 512)  # VWFormer's head for ADE20K has one head of 512 channels
MAX_WINDOWS = 32  # along an axis, that the Triton kernels take

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, int[] window_size, int[] row_starts, int[] column_starts, float scale"


def fused_support(q: Tensor, row_starts: Sequence[int], column_starts: Sequence[int]) -> Support:
    """The one place that says when context window attention is handed to the reference, and why."""
    support = triton_support(q, q.shape[-1], HEAD_DIMS)
    n_windows = (len(row_starts), len(column_starts))
    if support.ok and max(n_windows) > MAX_WINDOWS:
        taken = f"Triton kernels take up to {MAX_WINDOWS} windows along an axis"
        return Support(False, f"{taken}, the map has {n_windows}")
    return support


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    if fused_support(q, rest[1], rest[2]).ok:
        from vitrail.kernels.context_window_attention.triton import context_window_attention_forward

        return context_window_attention_forward(q, k, v, *rest)
    return context_window_attention_reference(q, k, v, *rest)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if fused_support(q, rest[1], rest[2]).ok:
        from vitrail.kernels.context_window_attention.triton import context_window_attention_backward

        return context_window_attention_backward(grad, q, k, v, *rest)
    return context_window_attention_gradients(grad, q, k, v, *rest)


run_context_window_attention = register_operator(
    "context_window_attention", _ARGUMENTS, ("d_q", "d_k", "d_v"), _forward, _backward
)


@register_flop_formula(torch.ops.vitrail.context_window_attention)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, window: Any, *_: Any, **__: Any) -> int:
    return window_flops(q_shape, window, 2)


@register_flop_formula(torch.ops.vitrail.context_window_attention_backward)
def _backward_flops(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, window: Any, *_: Any, **__: Any) -> int:
    return window_flops(q_shape, window, 5)
