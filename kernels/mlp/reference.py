"""Two linear layers with GELU between them in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.gradients import empty_gradient


def mlp_reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Computes `gelu(x @ w1.T + b1) @ w2.T + b2`; see `vitrail.kernels.mlp.mlp` for the arguments."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def mlp_gradients(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    needed: Sequence[bool] = (True,) * 5,
) -> tuple[Tensor, ...]:
    """Gradients of x, w1, b1, w2 and b2; the hidden map is computed again.

    Those that are not needed are empty, as are those of absent biases.
    """
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    need_x, need_w1, need_b1, need_w2, need_b2 = needed
    found: list[Tensor | None] = [None] * 5
    if any(needed[:4]):
        before = F.linear(rows, w1, b1)
    if need_w2:
        found[3] = grads.t() @ F.gelu(before)
    if any(needed[:3]):
        d_hidden = torch.ops.aten.gelu_backward(grads @ w2, before)
    if need_x:
        found[0] = (d_hidden @ w1).view(x.shape)
    if need_w1:
        found[1] = d_hidden.t() @ rows
    if need_b1 and b1 is not None:
        found[2] = d_hidden.sum(0)
    if need_b2 and b2 is not None:
        found[4] = grads.sum(0)
    return tuple(empty_gradient(grad) if gradient is None else gradient for gradient in found)
