"""Channel attention in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.kernels._common.checks import without_autocast


def channel_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes `y[n, i] = sum_j softmax(scale * k^T v)[i, j] q[n, j]` for every image and group.

    See `vitrail.kernels.channel_attention.channel_attention` for the arguments.
    """
    return _attend(_groups_first(q), _groups_first(k), _groups_first(v), scale, q.shape)


def packed_reference(qkv: Tensor, scale: float) -> Tensor:
    """`channel_attention_reference` of (B, H, W, 3, groups, D); one copy, and one in the backward, serves all three."""
    batch, height, width, _, groups, dim = qkv.shape
    grouped = qkv.permute(3, 0, 4, 1, 2, 5).reshape(3, batch * groups, height * width, dim)
    q, k, v = grouped.unbind(0)
    return _attend(q, k, v, scale, (batch, height, width, groups, dim))


def channel_attention_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, contiguous, from the gradient of the result; the map is computed anew."""
    grad_rows, q_rows, k_rows, v_rows = (_groups_first(x) for x in (grad, q, k, v))
    weights = _weights(k_rows, v_rows, scale)
    d_weights = _sum_of_products(grad_rows, q_rows)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
    d_q = torch.bmm(grad_rows, weights.to(q.dtype))
    d_k = torch.bmm(v_rows.to(d_logits.dtype), d_logits.transpose(1, 2))
    d_v = torch.bmm(k_rows.to(d_logits.dtype), d_logits)
    return tuple(_groups_last(d, q.shape).to(q.dtype) for d in (d_q, d_k, d_v))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, shape: tuple[int, ...]) -> Tensor:
    """(B * groups, N, D) each -> contiguous (B, H, W, groups, D), which is `shape`."""
    weights = _weights(k, v, scale).to(q.dtype)
    return _groups_last(torch.bmm(q, weights.transpose(1, 2)), shape)


def _weights(k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax of `scale * k^T v` over the last axis, (B * groups, D, D), in float32 or float64."""
    return (_sum_of_products(k, v) * scale).softmax(-1)


def _sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """`x^T y` over the positions, (B * groups, D, D), in float32 or float64.

    A detection image has tens of thousands of positions: beyond float16's range and bfloat16's digits.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        return torch.bmm(x.transpose(1, 2).to(dtype), y.to(dtype))


def _groups_first(x: Tensor) -> Tensor:
    """(B, H, W, groups, D) -> (B * groups, H * W, D), contiguous, as batched matrix products want it."""
    batch, height, width, groups, dim = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(batch * groups, height * width, dim)


def _groups_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B * groups, H * W, D) -> contiguous (B, H, W, groups, D), which is `shape`."""
    batch, height, width, groups, dim = shape
    return x.reshape(batch, groups, height, width, dim).permute(0, 2, 3, 1, 4).contiguous()
