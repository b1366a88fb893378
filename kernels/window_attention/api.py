"""Public functions of window attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_floating,
    check_packed,
    check_pads,
    check_projections,
    check_shape,
    to_pair,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.window_attention.op import fused_support, run_window_attention, run_window_attention_packed
from vitrail.kernels.window_attention.reference import window_attention_reference

_NAME = "window_attention"


@shortened
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    scale: float | None = None,
    roll_first: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention inside each window of a map: :math:`\mathrm{softmax}(s\, q k^\top + \mathrm{bias})\, v`.

    The map is padded at the bottom and right to multiples of the window and, with a shift, rolled cyclically by it
    (Swin, arXiv 2103.14030, section 3.2): a window then holds tokens from opposite borders, and only tokens that
    were neighbours before the roll attend to each other. The fused backend materialises none of pad, roll,
    partition and crop.

    Args:
        q: Queries, (B, H, W, heads, D), any strides, any floating dtype.
        k: Keys, like `q`.
        v: Values, like `q`.
        window_size: Window height and width in tokens, T = height * width.
        shift_size: Cyclic shift up and left in tokens, smaller than the window.
        bias: Added to the logits, (heads, T, T): row the query's, column the key's raster position in the window.
        pad_k: Key that every padded position holds, (heads, D). Without it padded positions are hidden.
        pad_v: Value that every padded position holds, (heads, D); given exactly where `pad_k` is.
        scale: Factor on `q k^T`; `D ** -0.5` by default.
        roll_first: Roll the map, then pad it, as timm's Swin does; by default it is padded, then rolled, as the
            authors do. The two differ where the map is shifted and no multiple of the window.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, H, W, heads, D), contiguous, in q's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes, devices or sizes do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    window, shift, scale = _check_separate(q, k, v, bias, pad_k, pad_v, window_size, shift_size, scale)
    q, k, v = autocast_together(q, k, v)
    arguments = (bias, pad_k, pad_v, window, shift, scale, roll_first)
    if choose_backend(_NAME, backend, fused_support(q, window), q) == "triton":
        return run_window_attention(q, k, v, *arguments)
    return window_attention_reference(q, k, v, *arguments)


@shortened
def window_attention_packed(
    qkv: Tensor,
    *,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    scale: float | None = None,
    roll_first: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`window_attention` of queries, keys and values that one projection produced: (B, H, W, 3, heads, D).

    Same result as `window_attention(*qkv.unbind(3), ...)`; its backward writes the gradient of `qkv` directly
    instead of stacking three. See `window_attention` for the other arguments, the result and the errors.
    """
    window, shift, scale = _check_packed(qkv, bias, pad_k, pad_v, window_size, shift_size, scale)
    (qkv,) = autocast_together(qkv)
    arguments = (bias, pad_k, pad_v, window, shift, scale, roll_first)
    if choose_backend(_NAME, backend, fused_support(qkv, window), qkv, packed_at=3) == "triton":
        return run_window_attention_packed(qkv, *arguments)
    q, k, v = qkv.unbind(3)
    return window_attention_reference(q, k, v, *arguments)


def _check_separate(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[tuple[int, int], tuple[int, int], float]:
    check_projections(_NAME, "(B, H, W, heads, D)", q=q, k=k, v=v)
    return _check_arguments(q, *others)


def _check_packed(qkv: Tensor, *others: Any) -> tuple[tuple[int, int], tuple[int, int], float]:
    check_packed(_NAME, "(B, H, W, 3, heads, D)", qkv)
    return _check_arguments(qkv.select(3, 0), *others)


def _check_arguments(
    q: Tensor,
    bias: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int],
    scale: float | None,
) -> tuple[tuple[int, int], tuple[int, int], float]:
    """Checks what both public functions share; returns the normalised window, shift and scale."""
    heads, dim = q.shape[3:]
    window = to_pair(_NAME, "window_size", window_size, 1)
    shift = to_pair(_NAME, "shift_size", shift_size, 0)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"{_NAME}: shift_size is {shift}; allowed: smaller than window_size {window}")
    check_pads(_NAME, q, pad_k=pad_k, pad_v=pad_v)
    if bias is not None:
        check_floating(_NAME, bias=bias)
        check_shape(_NAME, "bias", bias, (heads, window[0] * window[1], window[0] * window[1]))
    return window, shift, dim**-0.5 if scale is None else float(scale)
