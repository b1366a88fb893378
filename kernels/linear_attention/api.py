"""Public functions of linear attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_floating,
    check_packed,
    check_projections,
    check_shape,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.linear_attention.op import fused_support, run_linear_attention, run_linear_attention_packed
from vitrail.kernels.linear_attention.reference import linear_attention_reference

_NAME = "linear_attention"


@shortened
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, floor: float = 100.0, backend: str = "auto"
) -> Tensor:
    r"""Global attention with rectified queries and keys in place of the softmax.

    Per image and head, with :math:`\phi = \mathrm{ReLU}` and sums over all H * W positions,

    .. math:: y_i = t\, \frac{\phi(q_i) \sum_j \phi(k_j) v_j^\top}{\max(f,\ \phi(q_i) \cdot \sum_j \phi(k_j))}

    (L2ViT, arXiv 2501.16182, as released). The sums are not normalised and grow with the number of positions, so they
    are taken in at least float32: a 512 x 2048 image leaves float16's range.

    Args:
        q: Queries, (B, H, W, heads, D), any strides, any floating dtype.
        k: Keys, like `q`.
        v: Values, like `q`.
        temperature: Factor t of each head, (heads,), any floating dtype.
        floor: Least denominator f, above 0. It does not depend on the map's size.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, H, W, heads, D), contiguous, in q's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes or devices do not fit together, or `floor` is not above 0.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    _check_separate(q, k, v, temperature, floor)
    q, k, v = autocast_together(q, k, v)
    if choose_backend(_NAME, backend, fused_support(q), q) == "triton":
        return run_linear_attention(q, k, v, temperature, float(floor))
    return linear_attention_reference(q, k, v, temperature, float(floor))


@shortened
def linear_attention_packed(qkv: Tensor, temperature: Tensor, *, floor: float = 100.0, backend: str = "auto") -> Tensor:
    """`linear_attention` of q, k and v that one projection produced: (B, H, W, 3, heads, D).

    Same result as `linear_attention(*qkv.unbind(3), ...)`; its backward writes the gradient of `qkv` directly instead
    of stacking three. See `linear_attention` for the other arguments, the result and the errors.
    """
    _check_packed(qkv, temperature, floor)
    (qkv,) = autocast_together(qkv)
    if choose_backend(_NAME, backend, fused_support(qkv), qkv, packed_at=3) == "triton":
        return run_linear_attention_packed(qkv, temperature, float(floor))
    q, k, v = qkv.unbind(3)
    return linear_attention_reference(q, k, v, temperature, float(floor))


def _check_separate(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, floor: float) -> None:
    check_projections(_NAME, "(B, H, W, heads, D)", q=q, k=k, v=v)
    _check_constants(q, temperature, floor)


def _check_packed(qkv: Tensor, temperature: Tensor, floor: float) -> None:
    check_packed(_NAME, "(B, H, W, 3, heads, D)", qkv)
    _check_constants(qkv.select(3, 0), temperature, floor)


def _check_constants(q: Tensor, temperature: Tensor, floor: float) -> None:
    check_floating(_NAME, temperature=temperature)
    check_shape(_NAME, "temperature", temperature, (q.shape[3],))
    if temperature.device != q.device:
        raise ValueError(f"{_NAME}: temperature is on {temperature.device}, the map on {q.device}; they must agree")
    if not floor > 0:
        raise ValueError(f"{_NAME}: floor is {floor}; allowed: above 0")
