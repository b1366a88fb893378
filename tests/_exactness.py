"""How far a fused operator may be off."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 64


def allowed_error(exact: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """Twice the eager operator's relative error and a rounding of `dtype`.

    The error of a few numbers, such as the gradient of a decay, is one draw of the noise of float32 sums, in which
    eager may have been lucky: three roundings of float32 are added there.
    """
    error = ((eager.double() - exact).norm() / (exact.norm() + 1e-12)).item()
    luck = 3 * torch.finfo(torch.float32).eps if exact.numel() < _FEW else 0.0
    return 2 * error + torch.finfo(dtype).eps + luck
