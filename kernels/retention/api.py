"""Public functions of retention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_dims,
    check_projections,
    check_shape,
    to_pair,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.retention.op import fused_support, run_retention
from vitrail.kernels.retention.reference import ACTIVATIONS, retention_reference

_NAME = "retention"


@shortened
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    window_size: int | Sequence[int] | None = None,
    shift_size: int | Sequence[int] = 0,
    activation: str = "softmax",
    slopes: Tensor | None = None,
    signed_slopes: bool = False,
    length_offset: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Attention that decays with the Manhattan distance: of query (y, x) and key (y', x'), :math:`|y-y'| + |x-x'|`.

    With :math:`\ell = s\, q k^\top`, the distance :math:`\delta` and the decay :math:`m \le 0` of the head:

    - "softmax" (RMT, arXiv 2309.11523, equation 8): :math:`\mathrm{softmax}(\ell + m \delta)\, v`;
    - "sigmoid" (our reading of Gated-SwinRMT, arXiv 2604.06014):
      :math:`\sigma(\ell - a \delta)\, e^{m \delta}\, v` with the head's slope :math:`a`.

    Windows are those of `window_attention`: cyclically shifted, only tokens that were neighbours before the shift see
    each other, and the positions that pad the map to whole windows are hidden.

    Args:
        q: Queries, (B, H, W, heads, D), any strides, any floating dtype.
        k: Keys, like `q`.
        v: Values, like `q`.
        decay: Logarithmic decay :math:`m` per step of distance, (heads,); in float32 or float64, whatever `q` is in.
        window_size: Window height and width in tokens; the whole map by default. It may exceed the map.
        shift_size: Cyclic shift up and left in tokens, smaller than the window.
        activation: "softmax" or "sigmoid".
        slopes: Only with "sigmoid": subtracted per step of distance before the activation, (heads,).
        signed_slopes: Only with `slopes`: they act on :math:`(y - y') + (x - x')` instead of the distance.
        length_offset: Only with "sigmoid": subtract the logarithm of the window's tokens before the activation.
        scale: Factor on `q k^T`; `D ** -0.5` by default.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, H, W, heads, D), contiguous, in q's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point, or `decay` or `slopes` has half precision.
        ValueError: Shapes, dtypes, devices or sizes do not fit together, or an argument needs another activation.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    window, shift = _check(
        q, k, v, decay, slopes, activation, signed_slopes, length_offset, window_size, shift_size
    )  # fmt: skip
    q, k, v = autocast_together(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, decay, slopes, window, shift, activation, signed_slopes, length_offset, scale)
    if choose_backend(_NAME, backend, fused_support(q, window, activation), q) == "triton":
        return run_retention(*arguments)
    return retention_reference(*arguments)


def decomposed_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    window_size: int | Sequence[int] | None = None,
    shift_size: int | Sequence[int] = 0,
    activation: str = "softmax",
    slopes: Tensor | None = None,
    signed_slopes: bool = False,
    length_offset: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Retention along the rows, then along the columns of its result, with the same queries and keys.

    Each axis has an activation of its own, so this is another function than `retention` (RMT, arXiv 2309.11523,
    equation 9). Rows of a window need nothing of other rows: both passes are windows of one token in the other axis.
    See `retention` for the arguments, the result and the errors.
    """
    check_dims(_NAME, "q", q, "(B, H, W, heads, D)")
    window, shift = _window(q, window_size, shift_size)

    def along(values: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        return retention(
            q,
            k,
            values,
            decay,
            window_size=window,
            shift_size=shift,
            activation=activation,
            slopes=slopes,
            signed_slopes=signed_slopes,
            length_offset=length_offset,
            scale=scale,
            backend=backend,
        )

    by_row = along(v, (1, window[1]), (0, shift[1]))
    return along(by_row.to(v.dtype), (window[0], 1), (shift[0], 0))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    slopes: Tensor | None,
    activation: str,
    signed_slopes: bool,
    length_offset: bool,
    window_size: int | Sequence[int] | None,
    shift_size: int | Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Checks all arguments of `retention`; returns the normalised window and shift."""
    _check_tensors(q, k, v, decay, slopes)
    _check_activation(activation, slopes, signed_slopes, length_offset)
    return _window(q, window_size, shift_size)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, slopes: Tensor | None) -> None:
    check_projections(_NAME, "(B, H, W, heads, D)", q=q, k=k, v=v)
    for name, tensor in (("decay", decay), ("slopes", slopes)):
        if tensor is None:
            continue
        check_shape(_NAME, name, tensor, (q.shape[3],))
        if tensor.dtype not in (torch.float32, torch.float64):
            # Times a distance of hundreds, the rounding of half precision would move whole logits.
            raise TypeError(f"{_NAME}: {name} is {tensor.dtype}; allowed: torch.float32 and torch.float64")


def _check_activation(activation: str, slopes: Tensor | None, signed_slopes: bool, length_offset: bool) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_NAME}: activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if activation == "softmax" and (slopes is not None or length_offset):
        raise ValueError(f"{_NAME}: slopes and length_offset need activation 'sigmoid'; add slopes to decay instead")
    if signed_slopes and slopes is None:
        raise ValueError(f"{_NAME}: signed_slopes is True without slopes; allowed: only together with slopes")


def _window(
    q: Tensor, window_size: int | Sequence[int] | None, shift_size: int | Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Normalised window and shift; the window is the map where none is given."""
    shift = to_pair(_NAME, "shift_size", shift_size, 0)
    if window_size is None:
        if shift != (0, 0):
            raise ValueError(f"{_NAME}: shift_size is {shift} without window_size; allowed: 0")
        return (q.shape[1], q.shape[2]), shift
    window = to_pair(_NAME, "window_size", window_size, 1)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"{_NAME}: shift_size is {shift}; allowed: smaller than window_size {window}")
    return window, shift
