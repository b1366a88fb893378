"""How far a fused operator may be off."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 64


def error_in_norm(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the truth."""
    return ((found.double() - exact).norm() / (exact.norm() + 1e-12)).item()


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """The fused operator's result has the eager one's dtype, is finite, and no further off than `allowed_error`."""
    assert ours.dtype == theirs.dtype
    assert ours.isfinite().all()
    assert error_in_norm(ours, exact) <= allowed_error(exact, theirs, ours.dtype)


def allowed_error(exact: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """Twice the eager operator's relative error and a rounding of `dtype`.

    The error of a few numbers, such as the gradient of a decay, is one draw of the noise of float32 sums, in which
    eager may have been lucky: three roundings of float32 are added there.
    """
    error = error_in_norm(eager, exact)
    luck = 3 * torch.finfo(torch.float32).eps if exact.numel() < _FEW else 0.0
    return 2 * error + torch.finfo(dtype).eps + luck
