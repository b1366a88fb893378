"""Registration of `vitrail::varied_window_attention` and `vitrail::varied_window_attention_packed` with PyTorch.

The operators run on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. They save their inputs only; the backward samples anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support, triton_support
from vitrail.kernels._common.registration import like_first_of_packed, register_operator
from vitrail.kernels.varied_window_attention.reference import (
    varied_window_attention_gradients,
    varied_window_attention_reference,
)

MAX_WINDOW = 64  # tokens that the Triton kernels take

_TAIL = "Tensor offsets, Tensor stretch, Tensor? bias, int[] window_size, int[] pad_start, float scale"
_TAIL_GRADIENTS = ("d_offsets", "d_stretch", "d_bias")


def fused_support(q: Tensor, offsets: Tensor, window_size: Sequence[int]) -> Support:
    """The one place that says when varied-size window attention is handed to the reference, and why."""
    support = triton_support(q, q.shape[-1])
    if support.ok and math.prod(window_size) > MAX_WINDOW:
        taken = f"Triton kernels take windows of up to {MAX_WINDOW} tokens"
        return Support(False, f"{taken}, the window is {tuple(window_size)}")
    if support.ok and offsets.dtype == torch.float64:
        return Support(False, "Triton kernels compute coordinates in float32, offsets and stretch are float64")
    return support


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    if fused_support(q, rest[0], rest[3]).ok:
        from vitrail.kernels.varied_window_attention.triton import varied_window_attention_forward

        return varied_window_attention_forward(q, k, v, *rest)
    return varied_window_attention_reference(q, k, v, *rest)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if fused_support(q, rest[0], rest[3]).ok:
        from vitrail.kernels.varied_window_attention.triton import varied_window_attention_backward

        d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        return d_q, d_k, d_v, *varied_window_attention_backward(grad, q, k, v, d_q, d_k, d_v, *rest)
    return varied_window_attention_gradients(grad, q, k, v, *rest)


def _packed_forward(qkv: Tensor, *rest: Any) -> Tensor:
    q, k, v = qkv.unbind(3)
    return _forward(q, k, v, *rest)


def _packed_backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(3)
    if fused_support(q, rest[0], rest[3]).ok:
        from vitrail.kernels.varied_window_attention.triton import varied_window_attention_backward

        d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        d_q, d_k, d_v = d_qkv.unbind(3)
        return d_qkv, *varied_window_attention_backward(grad, q, k, v, d_q, d_k, d_v, *rest)
    d_q, d_k, d_v, *others = varied_window_attention_gradients(grad, q, k, v, *rest)
    return torch.stack((d_q, d_k, d_v), 3), *others


run_varied_window_attention = register_operator(
    "varied_window_attention",
    f"Tensor q, Tensor k, Tensor v, {_TAIL}",
    ("d_q", "d_k", "d_v", *_TAIL_GRADIENTS),
    _forward,
    _backward,
)
run_varied_window_attention_packed = register_operator(
    "varied_window_attention_packed",
    f"Tensor qkv, {_TAIL}",
    ("d_qkv", *_TAIL_GRADIENTS),
    _packed_forward,
    _packed_backward,
    like_first_of_packed,
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


@register_flop_formula(torch.ops.vitrail.varied_window_attention_packed)
def _packed_forward_flops(qkv: Any, offsets: Any, stretch: Any, bias: Any, window: Any, *_: Any, **__: Any) -> int:
    return _flops(qkv, offsets, window, 2)


@register_flop_formula(torch.ops.vitrail.varied_window_attention_backward)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, offsets: Any, stretch: Any, bias: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(q, offsets, window, 5)


@register_flop_formula(torch.ops.vitrail.varied_window_attention_packed_backward)
def _packed_backward_flops(
    grad: Any, qkv: Any, offsets: Any, stretch: Any, bias: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(qkv, offsets, window, 5)
