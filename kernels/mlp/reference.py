"""Two linear layers with GELU between them in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mlp_reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Computes `gelu(x @ w1.T + b1) @ w2.T + b2`; see `vitrail.kernels.mlp.mlp` for the arguments."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def mlp_gradients(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2; the hidden map is computed again. Those of absent biases are empty."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    before = F.linear(rows, w1, b1)
    d_hidden = torch.ops.aten.gelu_backward(grads @ w2, before)
    return (
        (d_hidden @ w1).view(x.shape),
        d_hidden.t() @ rows,
        d_hidden.sum(0) if b1 is not None else d_hidden.new_empty(0),
        grads.t() @ F.gelu(before),
        grads.sum(0) if b2 is not None else grads.new_empty(0),
    )
