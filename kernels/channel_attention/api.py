"""Public functions of channel attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_packed,
    check_projections,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.channel_attention.op import fused_support, run_channel_attention, run_channel_attention_packed
from vitrail.kernels.channel_attention.reference import channel_attention_reference, packed_reference

_NAME = "channel_attention"


@shortened
def channel_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    r"""Mixes the channels of each group by a map computed from all positions.

    Per image and group, :math:`A = \mathrm{softmax}(s\, k^\top v)` of shape (D, D), the softmax over the last axis
    and the sum over all H * W positions; then :math:`y_{n,i} = \sum_j A_{i,j}\, q_{n,j}` (DaViT, arXiv 2204.03645,
    section 3.2). The roles are those of the authors' code: k and v make the map, q is mixed. The logits grow with
    the number of positions, so they are summed in at least float32.

    Args:
        q: Channels to mix, (B, H, W, groups, D), any strides, any floating dtype.
        k: Makes the rows of the map, like `q`.
        v: Makes the columns of the map, like `q`.
        scale: Factor on `k^T v`; `D ** -0.5` by default.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, H, W, groups, D), contiguous, in q's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    _check_separate(q, k, v)
    q, k, v = autocast_together(q, k, v)
    scale = _default_scale(q, scale)
    if choose_backend(_NAME, backend, fused_support(q), q) == "triton":
        return run_channel_attention(q, k, v, scale)
    return channel_attention_reference(q, k, v, scale)


@shortened
def channel_attention_packed(qkv: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """`channel_attention` of q, k and v that one projection produced: (B, H, W, 3, groups, D).

    Same result as `channel_attention(*qkv.unbind(3), ...)`; its backward writes the gradient of `qkv` directly
    instead of stacking three. See `channel_attention` for the other arguments, the result and the errors.
    """
    _check_packed(qkv)
    (qkv,) = autocast_together(qkv)
    scale = _default_scale(qkv, scale)
    if choose_backend(_NAME, backend, fused_support(qkv), qkv, packed_at=3) == "triton":
        return run_channel_attention_packed(qkv, scale)
    return packed_reference(qkv, scale)


def _check_separate(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_projections(_NAME, "(B, H, W, groups, D)", q=q, k=k, v=v)


def _check_packed(qkv: Tensor) -> None:
    check_packed(_NAME, "(B, H, W, 3, groups, D)", qkv)


def _default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
