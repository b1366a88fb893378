"""Neighborhood attention in plain PyTorch.

Papers: Hassani, Walton, Li, Li, Shi, "Neighborhood Attention Transformer" (arXiv 2204.07143); Hassani, Shi, "Dilated
Neighborhood Attention Transformer" (arXiv 2209.15001); Hassani, Hwu, Shi, "Faster Neighborhood Attention"
(arXiv 2403.04690: causal axes); "Generalized Neighborhood Attention" (arXiv 2504.16922: stride, even kernels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.recording import at_least


class Neighborhood(NamedTuple):
    """The keys that each query of one axis sees, one row a query and one column a key of the kernel.

    Attributes:
        position: Of the keys on the axis; (length, kernel), int64. May lie behind the axis' end.
        distance: From query to key in units of the dilation, from -(kernel - 1) to kernel - 1; like `position`.
        visible: False where a causal axis hides the key; like `position`, bool.
    """

    position: Tensor
    distance: Tensor
    visible: Tensor


def axis_neighborhood(
    length: int, kernel: int, stride: int, dilation: int, causal: bool, device: torch.device
) -> Neighborhood:
    """Neighborhoods on one axis; an axis shorter than kernel x dilation counts as if it were that long.

    Tokens whose positions leave the same rest modulo the dilation form a group; all that follows happens inside it.
    Its windows hold `kernel` keys, are moved inwards at the borders, and are shared by `stride` queries in a row.
    """
    query = torch.arange(length, device=device)
    group, place = query % dilation, query // dilation
    whole = at_least(length, kernel * dilation)
    group_length = (whole - group + dilation - 1) // dilation
    leader = place // stride * stride + (stride - 1 if causal else stride // 2)
    leader = torch.minimum(leader, group_length - 1)
    if causal:
        start = (leader - kernel + 1).clamp(min=0)
    else:
        start = torch.minimum((leader - kernel // 2).clamp(min=0), group_length - kernel)
    key = start[:, None] + torch.arange(kernel, device=device)
    distance = key - place[:, None]
    visible = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return Neighborhood(key * dilation + group[:, None], distance, visible)


def _all_pairs(per_axis: Sequence[Tensor]) -> list[Tensor]:
    """Views of (length, kernel) tables, one an axis, that broadcast to (length 1, ..., kernel 1, ...)."""
    axes = len(per_axis)
    views = []
    for axis, table in enumerate(per_axis):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = table.shape
        views.append(table.reshape(shape))
    return views


def _logical_and(tables: Sequence[Tensor]) -> Tensor:
    found = tables[0]
    for table in tables[1:]:
        found = found & table
    return found


def _bias_of(rpb: Tensor, neighborhoods: Sequence[Neighborhood]) -> Tensor:
    """Spreads the table of relative positions, (heads, 2 k - 1, ...), over all pairs: (N, heads, K)."""
    rows = torch.zeros((), dtype=torch.int64, device=rpb.device)
    for near, size in zip(_all_pairs([n.distance for n in neighborhoods]), rpb.shape[1:], strict=True):
        rows = rows * size + near + size // 2
    n_queries = math.prod([n.distance.shape[0] for n in neighborhoods])
    return F.embedding(rows.reshape(n_queries, -1), rpb.flatten(1).t()).transpose(1, 2)


def _gather(x: Tensor, table: Tensor, outside: Tensor | None, pad: Tensor | None) -> Tensor:
    """(B, N, heads, D) -> the keys or values of every query, (B, N, heads, K, D)."""
    batch, n_tokens, heads, dim = x.shape
    rows = table + n_tokens * torch.arange(batch, device=x.device)[:, None, None]
    # A table look-up, for its backward: quicker on CPUs than that of indexing, and summed in a fixed order.
    gathered = F.embedding(rows, x.reshape(batch * n_tokens, heads * dim)).unflatten(3, (heads, dim))
    if outside is not None and pad is not None:
        gathered = torch.where(outside[..., None, None], pad.to(x.dtype), gathered)
    return gathered.transpose(2, 3)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention, (B, *lengths, heads, D), and the logits, (B, N, heads, keys)."""
    lengths = q.shape[1:-2]
    near = [
        axis_neighborhood(*axis, q.device)
        for axis in zip(lengths, kernel_size, stride, dilation, is_causal, strict=True)
    ]
    n_queries, n_keys = math.prod(lengths), math.prod(kernel_size)
    table = torch.zeros((), dtype=torch.int64, device=q.device)
    for position, length in zip(_all_pairs([n.position for n in near]), lengths, strict=True):
        table = table * length + position.clamp(max=length - 1)
    table = table.reshape(n_queries, n_keys)
    hidden = None
    if any(is_causal):
        hidden = ~_logical_and(_all_pairs([n.visible for n in near])).expand(*lengths, *kernel_size)
        hidden = hidden.reshape(n_queries, n_keys)
    outside = None
    reaches_out = any(length < k * d for length, k, d in zip(lengths, kernel_size, dilation, strict=True))
    if reaches_out or torch.jit.is_tracing():
        inside = [n.position < length for n, length in zip(near, lengths, strict=True)]
        outside = ~_logical_and(_all_pairs(inside)).expand(*lengths, *kernel_size).reshape(n_queries, n_keys)
    if outside is not None and pad_k is None:
        hidden = outside if hidden is None else hidden | outside

    queries, keys, values = (x.flatten(1, -3) for x in (q, k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (_gather(keys, table, outside, pad_k) @ queries[..., None])[..., 0].to(wide) * scale  # (B, N, heads, K)
    if rpb is not None:
        logits = logits + _bias_of(rpb, near)
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None], -math.inf)
    if extra_k is not None:
        logits = torch.cat(
            [logits, (queries.transpose(1, 2) @ extra_k.permute(0, 2, 3, 1)).transpose(1, 2) * scale], -1
        )
    weights = logits.softmax(-1).to(q.dtype)
    out = (weights[..., None, :n_keys] @ _gather(values, table, outside, pad_v))[..., 0, :]
    if extra_v is not None:
        out = out + (weights[..., n_keys:].transpose(1, 2) @ extra_v.transpose(1, 2)).transpose(1, 2)
    return out.reshape(q.shape), logits


def neighborhood_attention_with_lse(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`neighborhood_attention_reference`, and the logarithm of the sum of exp(logits), (B, *lengths, heads)."""
    out, logits = _attend(q, *rest)
    return out, logits.logsumexp(-1).reshape(q.shape[:-1])


def neighborhood_attention_reference(q: Tensor, *rest: Any) -> Tensor:
    """Softmax attention of every query over its neighborhood; see `neighborhood_attention`."""
    return _attend(q, *rest)[0]
