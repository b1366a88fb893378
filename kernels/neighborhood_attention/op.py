"""Registration of `vitrail::neighborhood_attention` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only; the backward recomputes the attention weights.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import Support, triton_support
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.neighborhood_attention.reference import neighborhood_attention_reference

HAS_NATTEN = importlib.util.find_spec("natten") is not None
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? rpb, Tensor? extra_k, Tensor? extra_v, Tensor? pad_k, Tensor? pad_v"
_ARGUMENTS = f"{_TENSORS}, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
_GRADIENTS = ("d_q", "d_k", "d_v", "d_rpb", "d_extra_k", "d_extra_v", "d_pad_k", "d_pad_v")


def fused_support(q: Tensor) -> Support:
    """The one place that says when neighborhood attention is handed to the reference, and why.

    The kernels take every number of axes, kernel, stride, dilation and causal axis, and all optional inputs: only
    device, dtype and head width decide.
    """
    return triton_support(q, q.shape[-1])


def natten_support(q: Tensor, rpb: Tensor | None, kernel_size: Sequence[int], dilation: Sequence[int]) -> Support:
    """Whether the NATTEN library, where it is installed with its CUDA kernels, can compute a call, and if not, why."""
    if not HAS_NATTEN:
        return Support(False, "NATTEN is not installed")
    if q.device.type != "cuda":
        return Support(False, f"NATTEN's kernels run on CUDA devices, the input is on {q.device.type}")
    import natten  # not a requirement of this package

    if not natten.HAS_LIBNATTEN:
        return Support(False, "NATTEN is installed without its CUDA kernels")
    if rpb is not None:
        return Support(False, "NATTEN has no relative position bias since version 0.20")
    if q.dtype == torch.float64:
        return Support(False, "NATTEN's kernels do not take float64")
    if min(kernel_size) < 2:
        return Support(False, f"NATTEN takes kernels of at least 2, kernel_size is {tuple(kernel_size)}")
    if any(n < k * d for n, k, d in zip(q.shape[1:-2], kernel_size, dilation, strict=True)):
        return Support(False, "NATTEN does not take maps smaller than kernel x dilation")
    return Support(True, "supported")


def _forward(q: Tensor, *rest: Any) -> Tensor:
    if fused_support(q).ok:
        from vitrail.kernels.neighborhood_attention.triton import neighborhood_attention_forward

        return neighborhood_attention_forward(q, *rest)
    return neighborhood_attention_reference(q, *rest)


def _backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    if fused_support(inputs[0]).ok:
        from vitrail.kernels.neighborhood_attention.triton import neighborhood_attention_backward

        return neighborhood_attention_backward(grad, *inputs)
    return reference_gradients(neighborhood_attention_reference, inputs[:8], inputs[8:], grad)


run_neighborhood_attention = register_operator("neighborhood_attention", _ARGUMENTS, _GRADIENTS, _forward, _backward)


def _flops(q_shape: Sequence[int], kernel_size: Sequence[int], extra_shape: Any, n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` products of every query with its keys."""
    n_keys = math.prod(kernel_size) + (extra_shape[1] if extra_shape else 0)
    return 2 * n_products * math.prod(q_shape) * n_keys


@register_flop_formula(torch.ops.vitrail.neighborhood_attention)
def _forward_flops(
    q_shape: Any,
    k: Any,
    v: Any,
    rpb: Any,
    extra_k: Any,
    extra_v: Any,
    pad_k: Any,
    pad_v: Any,
    kernel_size: Any,
    *_: Any,
    **__: Any,
) -> int:
    return _flops(q_shape, kernel_size, extra_k, 2)


@register_flop_formula(torch.ops.vitrail.neighborhood_attention_backward)
def _backward_flops(
    grad_shape: Any,
    q_shape: Any,
    k: Any,
    v: Any,
    rpb: Any,
    extra_k: Any,
    extra_v: Any,
    pad_k: Any,
    pad_v: Any,
    kernel_size: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Five products where the forward has two: the logits anew, and four gradients."""
    return _flops(q_shape, kernel_size, extra_k, 5)
