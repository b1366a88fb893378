"""Context window attention in plain PyTorch: what fused kernels are tested against, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.partition import from_windows, pad_map, to_windows


def context_window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Sequence[int],
    row_starts: Sequence[int],
    column_starts: Sequence[int],
    scale: float,
) -> Tensor:
    """Computes `softmax(scale * q k^T) v` between every window of `q` and its context window in `k` and `v`.

    See `vitrail.kernels.context_window_attention.context_window_attention` for the arguments.
    """
    cut = _Cut(q, window_size, row_starts, column_starts)
    out = F.scaled_dot_product_attention(cut.split_queries(q), cut.split_context(k), cut.split_context(v), scale=scale)
    return cut.join_queries(out)


def context_window_attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Sequence[int],
    row_starts: Sequence[int],
    column_starts: Sequence[int],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, contiguous; the weights are computed anew.

    Where context windows overlap, their gradients are added up in raster order, at least in float32.
    """
    cut = _Cut(q, window_size, row_starts, column_starts)
    grad_windows, q_windows = cut.split_queries(grad), cut.split_queries(q)
    k_windows, v_windows = cut.split_context(k), cut.split_context(v)
    weights = (torch.matmul(q_windows, k_windows.transpose(2, 3)).to(cut.dtype) * scale).softmax(-1)
    d_weights = torch.matmul(grad_windows, v_windows.transpose(2, 3)).to(cut.dtype)
    d_logits = (weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale).to(q.dtype)
    d_q = torch.matmul(d_logits, k_windows)
    d_k = torch.matmul(d_logits.transpose(2, 3), q_windows)
    d_v = torch.matmul(weights.to(q.dtype).transpose(2, 3), grad_windows)
    return cut.join_queries(d_q), cut.join_context(d_k, k), cut.join_context(d_v, v)


class _Cut:
    """How a call cuts `q` into nW windows of T tokens, and its context into as many of the same size."""

    def __init__(
        self, q: Tensor, window_size: Sequence[int], row_starts: Sequence[int], column_starts: Sequence[int]
    ) -> None:
        self.like = q
        self.window = (window_size[0], window_size[1])
        self.pads = (-q.shape[1] % self.window[0], -q.shape[2] % self.window[1])
        self.row_starts, self.column_starts = row_starts, column_starts
        self.dtype = torch.promote_types(q.dtype, torch.float32)

    def split_queries(self, x: Tensor) -> Tensor:
        """(B, H, W, heads, D) -> (B * nW, heads, T, D)."""
        return to_windows(pad_map(x, self.pads, None), self.window, (0, 0)).transpose(1, 2)

    def join_queries(self, x: Tensor) -> Tensor:
        """(B * nW, heads, T, D) -> contiguous (B, H, W, heads, D)."""
        return from_windows(x.transpose(1, 2), self.like, self.pads, self.window, (0, 0))

    def split_context(self, x: Tensor) -> Tensor:
        """(B, H_k, W_k, heads, D) -> (B * nW, heads, T, D)."""
        rows = torch.cat([x.narrow(1, start, self.window[0]) for start in self.row_starts], 1)
        side_by_side = torch.cat([rows.narrow(2, start, self.window[1]) for start in self.column_starts], 2)
        return to_windows(side_by_side, self.window, (0, 0)).transpose(1, 2)

    def join_context(self, x: Tensor, like: Tensor) -> Tensor:
        """Adds (B * nW, heads, T, D) up where the windows of `like` lie: the adjoint of `split_context`."""
        rows, columns = len(self.row_starts) * self.window[0], len(self.column_starts) * self.window[1]
        side_by_side = x.new_empty((like.shape[0], rows, columns, *like.shape[3:]))
        side_by_side = from_windows(x.transpose(1, 2), side_by_side, (0, 0), self.window, (0, 0)).to(self.dtype)
        added = _add_pieces(side_by_side, self.column_starts, 2, like.shape[2])
        return _add_pieces(added, self.row_starts, 1, like.shape[1]).to(like.dtype)


def _add_pieces(x: Tensor, starts: Sequence[int], dim: int, size: int) -> Tensor:
    """Cuts `x` along `dim` into as many pieces as `starts` and adds each into zeros of length `size` at its start."""
    shape = list(x.shape)
    shape[dim] = size
    total = x.new_zeros(shape)
    pieces = x.chunk(len(starts), dim)
    for start, piece in zip(starts, pieces, strict=True):
        total.narrow(dim, start, piece.shape[dim]).add_(piece)
    return total
