"""Public functions of varied-size window attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_alike,
    check_floating,
    check_packed,
    check_projections,
    check_shape,
    to_pair,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.varied_window_attention.op import (
    fused_support,
    run_varied_window_attention,
    run_varied_window_attention_packed,
)
from vitrail.kernels.varied_window_attention.reference import varied_window_attention_reference

_NAME = "varied_window_attention"


@shortened
def varied_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    stretch: Tensor,
    *,
    window_size: int | Sequence[int],
    pad_start: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention of every window to keys and values sampled from a window of another place and size.

    Windows tile the plane from `pad_start` tokens above and left of the map. In each, and for each head, the query at
    offset :math:`u` from the window's centre :math:`c` has a key and a value of its own: those that bilinear
    interpolation reads at :math:`c + o + s \odot u`, where :math:`o` are the window's `offsets` and :math:`s` its
    `stretch`. Outside the map keys and values are zero; such keys take part with the logit `bias`. With offsets 0 and
    stretch 1 this is ordinary window attention with zero padding behind the projection.
    Source: VSA (arXiv 2204.08446, section 3.2), the authors' normalised coordinates turned into tokens.

    Args:
        q: Queries, (B, H, W, heads, D), any strides, any floating dtype.
        k: Keys, like `q`.
        v: Values, like `q`.
        offsets: Shift (down, right) of each window in tokens, (B, rows, columns, heads, 2), with
            rows = ceil((H + top) / window height) and columns likewise. Best in float32 also where `q` is not.
        stretch: Factor (vertical, horizontal) on each window's extent, like `offsets`.
        window_size: Window height and width in tokens, T = height * width.
        pad_start: Rows and columns (top, left) of the first windows that lie outside the map, smaller than the window.
        bias: Added to the logits, (heads, T, T): row the query's, column the key's raster position in the window.
        scale: Factor on `q k^T`; `D ** -0.5` by default.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, H, W, heads, D), contiguous, in q's dtype (the autocast dtype under autocast). Coordinates are computed and
        samples are interpolated in at least float32. Where a coordinate is whole, its gradient is that from above.

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes, devices or sizes do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    window, start, scale = _check_separate(q, k, v, offsets, stretch, window_size, pad_start, bias, scale)
    q, k, v = autocast_together(q, k, v)
    arguments = (offsets, stretch, bias, window, start, scale)
    if choose_backend(_NAME, backend, fused_support(q, offsets, window), q) == "triton":
        return run_varied_window_attention(q, k, v, *arguments)
    return varied_window_attention_reference(q, k, v, *arguments)


@shortened
def varied_window_attention_packed(
    qkv: Tensor,
    offsets: Tensor,
    stretch: Tensor,
    *,
    window_size: int | Sequence[int],
    pad_start: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`varied_window_attention` of queries, keys and values that one projection produced: (B, H, W, 3, heads, D).

    Same result as `varied_window_attention(*qkv.unbind(3), ...)`; its backward writes the gradient of `qkv` directly
    instead of stacking three. See `varied_window_attention` for the other arguments, the result and the errors.
    """
    window, start, scale = _check_packed(qkv, offsets, stretch, window_size, pad_start, bias, scale)
    (qkv,) = autocast_together(qkv)
    arguments = (offsets, stretch, bias, window, start, scale)
    if choose_backend(_NAME, backend, fused_support(qkv, offsets, window), qkv, packed_at=3) == "triton":
        return run_varied_window_attention_packed(qkv, *arguments)
    q, k, v = qkv.unbind(3)
    return varied_window_attention_reference(q, k, v, *arguments)


def _check_separate(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[tuple[int, int], tuple[int, int], float]:
    check_projections(_NAME, "(B, H, W, heads, D)", q=q, k=k, v=v)
    return _check_arguments(q, *others)


def _check_packed(qkv: Tensor, *others: Any) -> tuple[tuple[int, int], tuple[int, int], float]:
    check_packed(_NAME, "(B, H, W, 3, heads, D)", qkv)
    return _check_arguments(qkv.select(3, 0), *others)


def _check_arguments(
    q: Tensor,
    offsets: Tensor,
    stretch: Tensor,
    window_size: int | Sequence[int],
    pad_start: int | Sequence[int],
    bias: Tensor | None,
    scale: float | None,
) -> tuple[tuple[int, int], tuple[int, int], float]:
    """Checks what both public functions share; returns the normalised window, padding and scale."""
    check_alike(_NAME, offsets=offsets, stretch=stretch)
    check_floating(_NAME, offsets=offsets)
    batch, height, width, heads, dim = q.shape
    window = to_pair(_NAME, "window_size", window_size, 1)
    start = to_pair(_NAME, "pad_start", pad_start, 0)
    if start[0] >= window[0] or start[1] >= window[1]:
        raise ValueError(f"{_NAME}: pad_start is {start}; allowed: smaller than window_size {window}")
    rows, columns = -(-(height + start[0]) // window[0]), -(-(width + start[1]) // window[1])
    check_shape(_NAME, "offsets", offsets, (batch, rows, columns, heads, 2))
    if bias is not None:
        check_floating(_NAME, bias=bias)
        check_shape(_NAME, "bias", bias, (heads, window[0] * window[1], window[0] * window[1]))
    return window, start, dim**-0.5 if scale is None else float(scale)
