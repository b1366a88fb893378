"""Registration of `vitrail::window_attention` and `vitrail::window_attention_packed` with PyTorch.

The operators run on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. They save their inputs only; the backward recomputes the attention weights.
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
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import like_first_of_packed, register_operator
from vitrail.kernels.window_attention.reference import window_attention_reference

MAX_WINDOW = 1024  # tokens that the Triton kernels take

_TAIL = "Tensor? bias, Tensor? pad_k, Tensor? pad_v, int[] window_size, int[] shift_size, float scale, bool roll_first"
_TAIL_GRADIENTS = ("d_bias", "d_pad_k", "d_pad_v")


def fused_support(q: Tensor, window_size: Sequence[int]) -> Support:
    """The one place that says when window attention is handed to the reference, and why."""
    support = triton_support(q, q.shape[-1])
    if support.ok and math.prod(window_size) > MAX_WINDOW:
        taken = f"Triton kernels take windows of up to {MAX_WINDOW} tokens"
        return Support(False, f"{taken}, the window is {tuple(window_size)}")
    return support


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    if fused_support(q, rest[3]).ok:
        from vitrail.kernels.window_attention.triton import window_attention_forward

        return window_attention_forward(q, k, v, *rest)
    return window_attention_reference(q, k, v, *rest)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if fused_support(q, rest[3]).ok:
        from vitrail.kernels.window_attention.triton import window_attention_backward

        d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        return d_q, d_k, d_v, *window_attention_backward(grad, q, k, v, d_q, d_k, d_v, *rest)
    return reference_gradients(window_attention_reference, (q, k, v, *rest[:3]), rest[3:], grad)


def _packed_forward(qkv: Tensor, *rest: Any) -> Tensor:
    q, k, v = qkv.unbind(3)
    return _forward(q, k, v, *rest)


def _packed_backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(3)
    if fused_support(q, rest[3]).ok:
        from vitrail.kernels.window_attention.triton import window_attention_backward

        d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        d_q, d_k, d_v = d_qkv.unbind(3)
        return d_qkv, *window_attention_backward(grad, q, k, v, d_q, d_k, d_v, *rest)
    return reference_gradients(_packed_reference, (qkv, *rest[:3]), rest[3:], grad)


def _packed_reference(qkv: Tensor, *rest: Any) -> Tensor:
    q, k, v = qkv.unbind(3)
    return window_attention_reference(q, k, v, *rest)


run_window_attention = register_operator(
    "window_attention",
    f"Tensor q, Tensor k, Tensor v, {_TAIL}",
    ("d_q", "d_k", "d_v", *_TAIL_GRADIENTS),
    _forward,
    _backward,
)
run_window_attention_packed = register_operator(
    "window_attention_packed",
    f"Tensor qkv, {_TAIL}",
    ("d_qkv", *_TAIL_GRADIENTS),
    _packed_forward,
    _packed_backward,
    like_first_of_packed,
)


@register_flop_formula(torch.ops.vitrail.window_attention)
def _forward_flops(
    q_shape: Any, k_shape: Any, v_shape: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any
) -> int:
    return window_flops(q_shape, window, 2)


@register_flop_formula(torch.ops.vitrail.window_attention_packed)
def _packed_forward_flops(qkv_shape: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any) -> int:
    return window_flops((*qkv_shape[:3], *qkv_shape[4:]), window, 2)


@register_flop_formula(torch.ops.vitrail.window_attention_backward)
def _backward_flops(
    grad_shape: Any, q_shape: Any, k: Any, v: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any
) -> int:
    return window_flops(q_shape, window, 5)


@register_flop_formula(torch.ops.vitrail.window_attention_packed_backward)
def _packed_backward_flops(
    grad_shape: Any, qkv_shape: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any
) -> int:
    return window_flops(grad_shape, window, 5)
