"""Layer normalisation in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalises the last axis, then scales by `weight` and adds `bias`.

    See `vitrail.kernels.layer_norm.layer_norm` for the arguments.
    """
    dtype = x.dtype if weight is None else weight.dtype
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)
