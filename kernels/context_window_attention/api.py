"""Public function of context window attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_together,
    check_alike,
    check_dims,
    check_floating,
    check_shape,
    to_pair,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.context_window_attention.op import fused_support, run_context_window_attention
from vitrail.kernels.context_window_attention.reference import context_window_attention_reference

_NAME = "context_window_attention"


@shortened
def context_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | Sequence[int],
    row_starts: Sequence[int],
    column_starts: Sequence[int],
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention of each window of one map over a window of another: :math:`\mathrm{softmax}(s\, q k^\top) v`.

    The query window in row a and column b attends to the context window whose first token stands in row
    `row_starts[a]` and column `column_starts[b]` of `k` and `v`. Both windows have the same size, so that the cost is
    that of window attention; a context that is to show more of the image has coarser tokens (varying window
    attention of Yan et al., ICLR 2024, arXiv 2404.16573). Context windows may overlap.

    Args:
        q: Queries, (B, H, W, heads, D), any strides, any floating dtype. The last windows may be cut off by the map.
        k: Keys, (B, H_k, W_k, heads, D), any strides, q's dtype.
        v: Values, like `k`.
        window_size: Height and width in tokens of the query windows and of the context windows.
        row_starts: First row in `k` and `v` of each row of windows, `ceil(H / window height)` of them.
        column_starts: First column in `k` and `v` of each column of windows, `ceil(W / window width)` of them.
        scale: Factor on `q k^T`; `D ** -0.5` by default.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`. "auto" is the reference until the
            Triton kernels have been timed on a GPU.

    Returns:
        (B, H, W, heads, D), contiguous, in q's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes, devices or sizes do not fit together, or a context window leaves the map.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    window = _check(q, k, v, window_size, row_starts, column_starts)
    q, k, v = autocast_together(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, window, row_starts, column_starts, scale)
    fused = fused_support(q, row_starts, column_starts)
    if choose_backend(_NAME, backend, fused, q) == "triton":
        return run_context_window_attention(*arguments)
    return context_window_attention_reference(*arguments)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | Sequence[int],
    row_starts: Sequence[int],
    column_starts: Sequence[int],
) -> tuple[int, int]:
    """Checks all arguments; returns the normalised window."""
    check_dims(_NAME, "q", q, "(B, H, W, heads, D)")
    check_dims(_NAME, "k", k, "(B, H_k, W_k, heads, D)")
    check_shape(_NAME, "k", k, (q.shape[0], *k.shape[1:3], *q.shape[3:]))
    check_alike(_NAME, q=q[:, :0, :0], k=k[:, :0, :0])
    check_alike(_NAME, k=k, v=v)
    check_floating(_NAME, q=q)
    window = to_pair(_NAME, "window_size", window_size, 1)
    _check_starts("row_starts", row_starts, window[0], q.shape[1], k.shape[1])
    _check_starts("column_starts", column_starts, window[1], q.shape[2], k.shape[2])
    return window


def _check_starts(name: str, starts: Sequence[int], window: int, size: int, context_size: int) -> None:
    if len(starts) != math.ceil(size / window):
        raise ValueError(
            f"{_NAME}: {name} has {len(starts)} entries; expected {math.ceil(size / window)}, one for every window of "
            f"{window} tokens in a map of {size}"
        )
    if min(starts, default=0) < 0 or max(starts, default=0) + window > context_size:
        raise ValueError(
            f"{_NAME}: {name} is {list(starts)}; allowed: 0 to {context_size - window}, so that windows of {window} "
            f"tokens stay inside k, which has {context_size}"
        )
