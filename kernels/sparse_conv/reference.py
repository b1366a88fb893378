"""Sparse convolution in plain PyTorch: the definition that fused kernels are tested against, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.kernels._common.checks import without_autocast


def sparse_conv_reference(features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor) -> Tensor:
    """Computes `out[n] = sum_k weight[:, k] features[table[k, n]]`, absent neighbours being 0.

    See `vitrail.kernels.sparse_conv.sparse_conv` for the arguments; weight is (C_out, taps, C_in). `transposed` serves
    the backward alone.
    """
    dtype, padded = _wide(features), _with_empty_row(features)
    out = torch.zeros(table.shape[1], weight.shape[0], dtype=dtype, device=features.device)
    with without_autocast(features):
        for tap, rows in enumerate(table):
            # Tap by tap: all gathered at once would take `taps` times the memory of the features.
            out = out + torch.mm(padded[rows.long()].to(dtype), weight[:, tap].to(dtype).t())
    return out.to(features.dtype)


def sparse_conv_gradients(
    grad: Tensor, features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of features and weight; the former gathers from the outputs that each input reaches."""
    dtype, padded, padded_grad = _wide(features), _with_empty_row(features), _with_empty_row(grad)
    d_features = torch.zeros(features.shape, dtype=dtype, device=features.device)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for tap in range(len(table)):
        d_features += torch.mm(padded_grad[transposed[tap].long()].to(dtype), weight[:, tap].to(dtype))
        d_weight[:, tap] = torch.mm(grad.to(dtype).t(), padded[table[tap].long()].to(dtype)).to(weight.dtype)
    return d_features.to(features.dtype), d_weight


def depthwise_reference(features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor) -> Tensor:
    """Computes `out[n, c] = sum_k weight[k, c] features[table[k, n], c]`, absent neighbours being 0.

    See `vitrail.kernels.sparse_conv.depthwise_sparse_conv` for the arguments; weight is (taps, C).
    """
    dtype, padded = _wide(features), _with_empty_row(features)
    out = torch.zeros(table.shape[1], features.shape[1], dtype=dtype, device=features.device)
    for tap, rows in enumerate(table):
        out = out + padded[rows.long()].to(dtype) * weight[tap].to(dtype)
    return out.to(features.dtype)


def depthwise_gradients(
    grad: Tensor, features: Tensor, weight: Tensor, table: Tensor, transposed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of features and weight, like `sparse_conv_gradients`."""
    dtype, padded = _wide(features), _with_empty_row(features)
    d_features = depthwise_reference(grad, weight, transposed, table)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for tap, rows in enumerate(table):
        d_weight[tap] = (padded[rows.long()].to(dtype) * grad.to(dtype)).sum(0)
    return d_features, d_weight


def mix_reference(features: Tensor, weights: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
    """Computes `x + (conv_a(x_a), conv_b(x_b), conv_c(x_c), x_d)`, x cut into quarters of its channels.

    See `vitrail.kernels.sparse_conv.mixed_depthwise_conv`; weights are (taps, C / 4).
    """
    quarters = features.chunk(4, 1)
    # A depth-wise convolution's transposed table serves its backward alone.
    mixed = [depthwise_reference(x, w, t, t) for x, w, t in zip(quarters, weights, tables, strict=False)]
    return features + torch.cat((*mixed, quarters[3]), 1)


def mix_gradients(
    grad: Tensor, features: Tensor, weights: Sequence[Tensor], tables: Sequence[Tensor], transposed: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of features and weights, like `sparse_conv_gradients`."""
    parts = zip(grad.chunk(4, 1), features.chunk(4, 1), weights, tables, transposed, strict=False)
    found = [depthwise_gradients(*part) for part in parts]
    d_features = grad + torch.cat((*(d_x for d_x, _ in found), grad.chunk(4, 1)[3]), 1)
    return d_features, *(d_weight for _, d_weight in found)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _with_empty_row(x: Tensor) -> Tensor:
    """Appends a row of zeros, which is what row -1 then refers to."""
    return torch.cat((x, x.new_zeros(1, x.shape[1])))
