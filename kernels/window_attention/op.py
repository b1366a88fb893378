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
from vitrail.kernels._common.gradients import fake_gradients, reference_gradients, requested_gradients
from vitrail.kernels.window_attention.reference import window_attention_reference

MAX_WINDOW = 1024  # tokens that the Triton kernels take

_TAIL = "Tensor? bias, Tensor? pad_k, Tensor? pad_v, int[] window_size, int[] shift_size, float scale, bool roll_first"
_N_CONSTANTS = 4  # the last four of them
_TAIL_GRADS = "Tensor d_bias, Tensor d_pad_k, Tensor d_pad_v"

torch.library.define("vitrail::window_attention", f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> Tensor")
torch.library.define("vitrail::window_attention_packed", f"(Tensor qkv, {_TAIL}) -> Tensor")
torch.library.define(
    "vitrail::window_attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor d_q, Tensor d_k, Tensor d_v, {_TAIL_GRADS})",
)
torch.library.define(
    "vitrail::window_attention_packed_backward", f"(Tensor grad, Tensor qkv, {_TAIL}) -> (Tensor d_qkv, {_TAIL_GRADS})"
)


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


def _fake_forward(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_packed_forward(qkv: Tensor, *rest: Any) -> Tensor:
    return _fake_forward(qkv.select(3, 0))


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return fake_gradients(grad, inputs[:-_N_CONSTANTS])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-_N_CONSTANTS])
    ctx.constants = inputs[-_N_CONSTANTS:]


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vitrail.window_attention_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return requested_gradients(ctx, gradients)


def _autograd_packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vitrail.window_attention_packed_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return requested_gradients(ctx, gradients)


for _device in ("CPU", "CUDA"):
    torch.library.impl("vitrail::window_attention", _device)(_forward)
    torch.library.impl("vitrail::window_attention_packed", _device)(_packed_forward)
    torch.library.impl("vitrail::window_attention_backward", _device)(_backward)
    torch.library.impl("vitrail::window_attention_packed_backward", _device)(_packed_backward)
torch.library.register_fake("vitrail::window_attention")(_fake_forward)
torch.library.register_fake("vitrail::window_attention_packed")(_fake_packed_forward)
torch.library.register_fake("vitrail::window_attention_backward")(_fake_backward)
torch.library.register_fake("vitrail::window_attention_packed_backward")(_fake_backward)
torch.library.register_autograd("vitrail::window_attention", _autograd_backward, setup_context=_save_inputs)
torch.library.register_autograd(
    "vitrail::window_attention_packed", _autograd_packed_backward, setup_context=_save_inputs
)


def _flops(q_shape: Sequence[int], window_size: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` (T, D) x (D, T) products in every window, padded positions included."""
    batch, height, width, heads, dim = q_shape
    n_windows = batch * math.ceil(height / window_size[0]) * math.ceil(width / window_size[1])
    return 2 * n_products * n_windows * heads * math.prod(window_size) ** 2 * dim


@register_flop_formula(torch.ops.vitrail.window_attention)
def _forward_flops(
    q_shape: Any, k_shape: Any, v_shape: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(q_shape, window, 2)


@register_flop_formula(torch.ops.vitrail.window_attention_packed)
def _packed_forward_flops(qkv_shape: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any) -> int:
    return _flops((*qkv_shape[:3], *qkv_shape[4:]), window, 2)


@register_flop_formula(torch.ops.vitrail.window_attention_backward)
def _backward_flops(
    grad_shape: Any, q_shape: Any, k: Any, v: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(q_shape, window, 5)


@register_flop_formula(torch.ops.vitrail.window_attention_packed_backward)
def _packed_backward_flops(
    grad_shape: Any, qkv_shape: Any, bias: Any, pad_k: Any, pad_v: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _flops(grad_shape, window, 5)
