"""Scattered linear attention in plain PyTorch: the definition that fused kernels are tested against, and its gradients.

Windows hold from one voxel to nearly all. They are cut into pieces of at most `_PIECE` voxels, so that the sums over a
window are batched products of padded pieces, of which few are padded much, added up piece by piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.kernels._common.checks import without_autocast

_PIECE = 32


class _Pieces(NamedTuple):
    """Where the voxels stand in the padded pieces.

    Attributes:
        slot: Row of each voxel among the rows of all pieces, (N,).
        window: Window of each piece, (pieces,).
        n_windows: Number of windows.
    """

    slot: Tensor
    window: Tensor
    n_windows: int


def scattered_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, starts: Tensor, ends: Tensor, parts: Tensor, eps: float
) -> Tensor:
    """Computes `relu(q) (sum relu(k) v^T) / (relu(q) . sum relu(k) + eps)`, sums over a voxel's window, for every head.

    See `vitrail.kernels.scattered_linear_attention.scattered_linear_attention` for the arguments; `parts` serves fused
    kernels alone.
    """
    if q.numel() == 0:
        return (q + k + v).contiguous()
    pieces = _cut(order, starts)
    with without_autocast(q):
        queries, keys, values = _padded(q, pieces).relu(), _padded(k, pieces).relu(), _padded(v, pieces)
        products = _over_windows(torch.matmul(keys.transpose(2, 3), values), pieces)
        key_sums = _over_windows(keys.sum(2, keepdim=True), pieces)
        denominator = (queries * key_sums).sum(-1, keepdim=True) + eps
        return _unpadded(torch.matmul(queries, products) / denominator, pieces, q)


def scattered_linear_attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    starts: Tensor,
    ends: Tensor,
    parts: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; all sums are computed anew."""
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    pieces = _cut(order, starts)
    with without_autocast(q):
        d_out, q_rows, k_rows, values = (_padded(x, pieces) for x in (grad, q, k, v))
        queries, keys = q_rows.relu(), k_rows.relu()
        products = _over_windows(torch.matmul(keys.transpose(2, 3), values), pieces)
        key_sums = _over_windows(keys.sum(2, keepdim=True), pieces)
        denominator = (queries * key_sums).sum(-1, keepdim=True) + eps
        d_numerator = d_out / denominator
        out = torch.matmul(queries, products) / denominator
        d_denominator = -(d_numerator * out).sum(-1, keepdim=True)
        d_queries = torch.matmul(d_numerator, products.transpose(2, 3)) + d_denominator * key_sums
        d_products = _over_windows(torch.matmul(queries.transpose(2, 3), d_numerator), pieces)
        d_key_sums = _over_windows((d_denominator * queries).sum(2, keepdim=True), pieces)
        d_keys = torch.matmul(values, d_products.transpose(2, 3)) + d_key_sums
        d_values = torch.matmul(keys, d_products)
    rows = (d_queries * (q_rows > 0), d_keys * (k_rows > 0), d_values)
    d_q, d_k, d_v = (_unpadded(d, pieces, like) for d, like in zip(rows, (q, k, v), strict=True))
    return d_q, d_k, d_v


def _cut(order: Tensor, starts: Tensor) -> _Pieces:
    """Cuts windows into pieces; waits for the device, for the number of pieces."""
    place = torch.arange(len(order), device=order.device) - starts
    is_first = place % _PIECE == 0
    piece = is_first.cumsum(0) - 1
    window = ((place == 0).cumsum(0) - 1)[is_first]
    slot = torch.empty_like(piece)
    slot[order.long()] = piece * _PIECE + place % _PIECE
    return _Pieces(slot, window, int(window[-1]) + 1)


def _padded(x: Tensor, pieces: _Pieces) -> Tensor:
    """(N, heads, D) -> (pieces, heads, _PIECE, D) with zeros where a piece is not full, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.new_zeros(len(pieces.window) * _PIECE, *x.shape[1:]).index_copy(0, pieces.slot, wide)
    return rows.unflatten(0, (-1, _PIECE)).transpose(1, 2)


def _unpadded(x: Tensor, pieces: _Pieces, like: Tensor) -> Tensor:
    """(pieces, heads, _PIECE, D) -> (N, heads, D) in the dtype of `like`."""
    return x.transpose(1, 2).flatten(0, 1)[pieces.slot].to(like.dtype)


def _over_windows(x: Tensor, pieces: _Pieces) -> Tensor:
    """Replaces what belongs to a piece by its sum over the pieces of the same window."""
    return x.new_zeros(pieces.n_windows, *x.shape[1:]).index_add(0, pieces.window, x)[pieces.window]
