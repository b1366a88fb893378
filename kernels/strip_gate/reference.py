"""The strip gate in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def strip_gate_reference(x: Tensor, logits_h: Tensor, logits_w: Tensor, skip: bool) -> Tensor:
    """Computes `y[c, i, j] = x[c, i, j] * sigmoid(h[c, i]) * sigmoid(w[c, j])`, plus `x` with `skip`.

    See `vitrail.kernels.strip_gate.strip_gate` for the arguments.
    """
    gate_h, gate_w = _gates(x, logits_h, logits_w)
    half_gated = x * gate_h
    return torch.addcmul(x, half_gated, gate_w) if skip else half_gated * gate_w


def strip_gate_gradients(
    grad: Tensor, x: Tensor, logits_h: Tensor, logits_w: Tensor, skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map and of both strips from the gradient of the result, in the dtypes of the inputs."""
    gate_h, gate_w = _gates(x, logits_h, logits_w)
    # The strips sum over a row or a column of products, which float16 may not hold.
    dtype = torch.promote_types(x.dtype, torch.float32)
    d_gate = grad.to(dtype) * x.to(dtype)
    d_logits_h = (d_gate * gate_w).sum(3) * _sigmoid_slope(logits_h)
    d_logits_w = (d_gate * gate_h).sum(2) * _sigmoid_slope(logits_w)
    d_x = strip_gate_reference(grad, logits_h, logits_w, skip)
    return d_x, d_logits_h.to(logits_h.dtype), d_logits_w.to(logits_w.dtype)


def _gates(x: Tensor, logits_h: Tensor, logits_w: Tensor) -> tuple[Tensor, Tensor]:
    """The gates in x's dtype, as (B, C, H, 1) and (B, C, 1, W)."""
    return logits_h.sigmoid().to(x.dtype).unsqueeze(3), logits_w.sigmoid().to(x.dtype).unsqueeze(2)


def _sigmoid_slope(logits: Tensor) -> Tensor:
    gate = logits.sigmoid()
    return gate * (1 - gate)
