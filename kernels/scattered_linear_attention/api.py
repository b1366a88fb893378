"""Public functions of scattered linear attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_packed,
    check_projections,
    check_shape,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.scattered_linear_attention.op import (
    fused_support,
    run_scattered_linear_attention,
    run_scattered_linear_attention_packed,
)
from vitrail.kernels.scattered_linear_attention.reference import scattered_linear_attention_reference
from vitrail.kernels.scattered_linear_attention.windows import Windows, most_parts

_NAME = "scattered_linear_attention"


@shortened
def scattered_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    r"""Attention with rectified queries and keys inside windows that hold any number of voxels.

    Per head, with :math:`\phi = \mathrm{ReLU}` and sums over the voxels j in the window of voxel i,

    .. math:: y_i = \frac{\phi(q_i) \sum_j \phi(k_j) v_j^\top}{\phi(q_i) \cdot \sum_j \phi(k_j) + \epsilon}

    (ScatterFormer, arXiv 2401.00912, as released; there the rectification stands before the operator). The sums grow
    with the number of voxels in a window, so they are taken in at least float32.

    Args:
        q: Queries, (N, heads, D), any strides, any floating dtype.
        k: Keys, like `q`.
        v: Values, like `q`.
        windows: Windows of the N voxels, from `sort_windows`; one value serves all layers on the same voxels.
        eps: Added to the denominator, above 0.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (N, heads, D), contiguous, in q's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point, or the windows are not int32.
        ValueError: Shapes, dtypes or devices do not fit together, or `eps` is not above 0.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    _check_separate(q, k, v, *windows, eps)
    q, k, v = autocast_together(q, k, v)
    if choose_backend(_NAME, backend, fused_support(q), q) == "triton":
        return run_scattered_linear_attention(q, k, v, *windows, float(eps))
    return scattered_linear_attention_reference(q, k, v, *windows, float(eps))


@shortened
def scattered_linear_attention_packed(
    qkv: Tensor, windows: Windows, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """`scattered_linear_attention` of q, k and v that one projection produced: (N, 3, heads, D).

    Same result as `scattered_linear_attention(*qkv.unbind(1), ...)`; its backward writes the gradient of `qkv`
    directly instead of stacking three. See there for the other arguments, the result and the errors.
    """
    _check_packed(qkv, *windows, eps)
    (qkv,) = autocast_together(qkv)
    if choose_backend(_NAME, backend, fused_support(qkv), qkv, packed_at=1) == "triton":
        return run_scattered_linear_attention_packed(qkv, *windows, float(eps))
    q, k, v = qkv.unbind(1)
    return scattered_linear_attention_reference(q, k, v, *windows, float(eps))


def _check_separate(q: Tensor, k: Tensor, v: Tensor, *windows_and_eps: Any) -> None:
    check_projections(_NAME, "(N, heads, D)", q=q, k=k, v=v)
    _check_windows(q, *windows_and_eps)


def _check_packed(qkv: Tensor, *windows_and_eps: Any) -> None:
    check_packed(_NAME, "(N, 3, heads, D)", qkv)
    _check_windows(qkv, *windows_and_eps)


def _check_windows(q: Tensor, order: Tensor, starts: Tensor, ends: Tensor, parts: Tensor, eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"{_NAME}: eps is {eps}; allowed: above 0")
    for name, tensor in Windows(order, starts, ends, parts)._asdict().items():
        rows = (1 + most_parts(len(q)), 4) if name == "parts" else (len(q),)
        check_shape(_NAME, f"windows.{name}", tensor, rows)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{_NAME}: windows.{name} is {tensor.dtype}; allowed: torch.int32")
        if tensor.device != q.device:
            raise ValueError(f"{_NAME}: windows.{name} is on {tensor.device}, q on {q.device}; they must agree")
