"""Registration of `vitrail::varied_window_attention` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only; the backward samples anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support, triton_support
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.varied_window_attention.reference import (
    varied_window_attention_gradients,
    varied_window_attention_reference,
)

MAX_WINDOW = 64  # tokens that the Triton kernels take

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor stretch, Tensor? bias, int[] window_size, int[] pad_start, "
    "float scale"
)


def fused_support(q: Tensor, offsets: Tensor, window_size: Sequence[int]) -> Support:
    """The one place that says when varied-size window attention is handed to the reference, and why."""
    support = triton_support(q, q.shape[-1])
    if support.ok and math.prod(window_size) > MAX_WINDOW:
        taken = f"Triton kernels take windows of up to {MAX_WINDOW} tokens"
        return Support(False, f"{taken}, the window is {tuple(window_size)}")
    if support.ok and offsets.dtype == torch.float64:
        return Support(False, "Triton kernels compute coordinates in float32, offsets and stretch are float64")
    return support


def _forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    if fused_support(q, offsets, rest[2]).ok:
        from vitrail.kernels.varied_window_attention.triton import varied_window_attention_forward

        return varied_window_attention_forward(q, k, v, offsets, *rest)
    return varied_window_attention_reference(q, k, v, offsets, *rest)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if fused_support(q, offsets, rest[2]).ok:
        from vitrail.kernels.varied_window_attention.triton import varied_window_attention_backward

        return varied_window_attention_backward(grad, q, k, v, offsets, *rest)
    return varied_window_attention_gradients(grad, q, k, v, offsets, *rest)


register_operator(
    "varied_window_attention",
    _ARGUMENTS,
    ("d_q", "d_k", "d_v", "d_offsets", "d_stretch", "d_bias"),
    _forward,
    _backward,
)


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
