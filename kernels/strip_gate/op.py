"""Registration of `vitrail::strip_gate` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernel, everything else to the
reference. It saves its inputs only; the backward recomputes the gates.
Like all pointwise operators it has no entry in PyTorch's FLOP counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS, Support, triton_support
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.strip_gate.reference import strip_gate_gradients, strip_gate_reference

_ARGUMENTS = "Tensor x, Tensor logits_h, Tensor logits_w, bool skip"


def fused_support(x: Tensor) -> Support:
    """The one place that says when the strip gate is handed to the reference, and why."""
    # There are no heads: only device and dtype matter, and any width that the shared conditions allow stands for all.
    return triton_support(x, FUSED_HEAD_DIMS[0])


def _layout(x: Tensor) -> torch.memory_format:
    """Layout of the map that a call returns; what PyTorch makes of odd strides would be unknown to compilers."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _forward(x: Tensor, logits_h: Tensor, logits_w: Tensor, skip: bool) -> Tensor:
    if fused_support(x).ok:
        from vitrail.kernels.strip_gate.triton import strip_gate_forward

        out = torch.empty_like(x, memory_format=_layout(x))
        strip_gate_forward(x, logits_h, logits_w, out, skip)
        return out
    return strip_gate_reference(x, logits_h, logits_w, skip).contiguous(memory_format=_layout(x))


def _backward(grad: Tensor, x: Tensor, logits_h: Tensor, logits_w: Tensor, skip: bool) -> tuple[Tensor, Tensor, Tensor]:
    if fused_support(x).ok:
        from vitrail.kernels.strip_gate.triton import strip_gate_backward

        d_x = torch.empty_like(x, memory_format=_layout(x))
        return d_x, *strip_gate_backward(grad, x, logits_h, logits_w, d_x, skip)
    d_x, d_logits_h, d_logits_w = strip_gate_gradients(grad, x, logits_h, logits_w, skip)
    return d_x.contiguous(memory_format=_layout(x)), d_logits_h.contiguous(), d_logits_w.contiguous()


def _fake_forward(x: Tensor, logits_h: Tensor, logits_w: Tensor, skip: bool) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _fake_backward(
    grad: Tensor, x: Tensor, logits_h: Tensor, logits_w: Tensor, skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = torch.empty_like(x, memory_format=_layout(x))
    return d_x, logits_h.new_empty(logits_h.shape), logits_w.new_empty(logits_w.shape)


run_strip_gate = register_operator(
    "strip_gate",
    _ARGUMENTS,
    ("d_x", "d_logits_h", "d_logits_w"),
    _forward,
    _backward,
    _fake_forward,
    _fake_backward,
)
