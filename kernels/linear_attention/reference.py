"""Linear attention in plain PyTorch: the definition that fused kernels are tested against, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.kernels._common.checks import without_autocast


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, floor: float) -> Tensor:
    """Computes `t relu(q) (relu(k)^T v) / max(floor, relu(q) sum(relu(k)))` for every image and head.

    See `vitrail.kernels.linear_attention.linear_attention` for the arguments.
    """
    with without_autocast(q):
        queries, keys, values = _tokens(q).relu(), _tokens(k).relu(), _tokens(v)
        products = torch.matmul(keys.transpose(2, 3), values) * _per_head(temperature, keys)
        weights_sum = (queries * keys.sum(2, keepdim=True)).sum(-1, keepdim=True)
        out = torch.matmul(queries, products) / weights_sum.clamp_min(floor)
    return _map(out, q)


def linear_attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (contiguous) and temperature; all sums are computed anew.

    Where the floor holds, the denominator is a constant.
    """
    with without_autocast(q):
        d_out, q_tokens, k_tokens, values = (_tokens(x) for x in (grad, q, k, v))
        queries, keys, t = q_tokens.relu(), k_tokens.relu(), _per_head(temperature, q_tokens)
        keys_sum = keys.sum(2, keepdim=True)
        products = torch.matmul(keys.transpose(2, 3), values)
        weights_sum = (queries * keys_sum).sum(-1, keepdim=True)
        denominator = weights_sum.clamp_min(floor)
        d_numerator = d_out / denominator
        d_queries = torch.matmul(d_numerator, products.transpose(2, 3))
        # The gradient against the result, without the temperature; the result itself is not needed.
        share = (d_queries * queries).sum(-1, keepdim=True)
        d_weights_sum = -t * share / denominator * (weights_sum >= floor)
        d_queries = t * d_queries + d_weights_sum * keys_sum
        d_products = torch.matmul(queries.transpose(2, 3), d_numerator) * t
        d_keys = torch.matmul(values, d_products.transpose(2, 3))
        d_keys = d_keys + (d_weights_sum * queries).sum(2, keepdim=True)
        d_values = torch.matmul(keys, d_products)
        d_temperature = share.sum((0, 2, 3)).to(temperature.dtype)
    return _map(d_queries * (q_tokens > 0), q), _map(d_keys * (k_tokens > 0), k), _map(d_values, v), d_temperature


def _tokens(x: Tensor) -> Tensor:
    """(B, H, W, heads, D) -> (B, heads, H * W, D), in at least float32."""
    return x.flatten(1, 2).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _map(x: Tensor, like: Tensor) -> Tensor:
    """(B, heads, H * W, D) -> contiguous (B, H, W, heads, D) in the shape and dtype of `like`."""
    return x.transpose(1, 2).reshape(like.shape).to(like.dtype).contiguous()


def _per_head(temperature: Tensor, tokens: Tensor) -> Tensor:
    return temperature.to(tokens.dtype)[:, None, None]
