"""Varied-size window attention in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.gradients import empty_gradient
from vitrail.kernels._common.partition import to_windows
from vitrail.kernels._common.recording import is_padded, records_graph


def varied_window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    stretch: Tensor,
    bias: Tensor | None,
    window_size: tuple[int, int],
    pad_start: tuple[int, int],
    scale: float,
) -> Tensor:
    """Computes `softmax(scale * q k'^T + bias) v'` in every window, with k' and v' sampled from the map.

    See `vitrail.kernels.varied_window_attention.varied_window_attention` for the arguments.
    """
    taps = _locate(q, offsets, stretch, window_size, pad_start)
    index, weights = _combine(taps, q)
    sampled = _sample(index, weights, _token_rows(k, v))
    keys, values = _to_heads(sampled, q, window_size)
    queries = _cut(q, offsets, window_size, pad_start)
    mask = None if bias is None else bias.to(q.dtype)[None]
    out = F.scaled_dot_product_attention(queries, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask, scale=scale)
    return _join(out, q, offsets, window_size, pad_start)


def varied_window_attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    stretch: Tensor,
    bias: Tensor | None,
    window_size: tuple[int, int],
    pad_start: tuple[int, int],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, offsets, stretch and bias from the gradient of the result, which is computed anew.

    The gradient of an absent bias is an empty tensor. Gradients of k and v add up in no fixed order on a GPU.
    """
    taps = _locate(q, offsets, stretch, window_size, pad_start)
    index, weights = _combine(taps, q)
    rows = _token_rows(k, v)
    keys, values = _to_heads(F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum"), q, window_size)
    queries, d_out = (_cut(x, offsets, window_size, pad_start).to(keys.dtype) for x in (q, grad))
    logits = torch.matmul(queries, keys.transpose(-2, -1)) * scale
    attention = (logits if bias is None else logits + bias.to(logits.dtype)).softmax(-1)
    d_attention = torch.matmul(d_out, values.transpose(-2, -1))
    d_logits = attention * (d_attention - (attention * d_attention).sum(-1, keepdim=True))
    d_q = _join(torch.matmul(d_logits, keys) * scale, q, offsets, window_size, pad_start)
    d_keys = torch.matmul(d_logits.transpose(-2, -1), queries) * scale
    d_values = torch.matmul(attention.transpose(-2, -1), d_out)
    d_sampled = torch.cat((d_keys, d_values), -1).view(-1, rows.shape[1])
    d_k, d_v = _row_gradients(d_sampled, index, weights, rows).view(*k.shape[:4], rows.shape[1]).chunk(2, -1)
    d_offsets, d_stretch = _window_gradients(d_sampled, index, rows, taps)
    return (
        d_q.to(q.dtype),
        d_k.to(k.dtype).contiguous(),
        d_v.to(v.dtype).contiguous(),
        d_offsets.to(offsets.dtype),
        d_stretch.to(stretch.dtype),
        empty_gradient(grad) if bias is None else d_logits.sum(0).to(bias.dtype),
    )


class _Axis(NamedTuple):
    """Where the samples of every window lie along one axis; n is the window's length.

    Attributes:
        neighbour: Index of the two neighbours of each sample inside the map, (B, rows, columns, heads, n, 2), int64.
        inside: 1 where that neighbour exists, else 0, like `neighbour`.
        weight: Share of each neighbour, 0 where it does not exist, like `neighbour`.
        place: Position in the window against its centre, (n,).
    """

    neighbour: Tensor
    inside: Tensor
    weight: Tensor
    place: Tensor


def _locate(
    q: Tensor, offsets: Tensor, stretch: Tensor, window_size: tuple[int, int], pad_start: tuple[int, int]
) -> tuple[_Axis, _Axis]:
    """The vertical and the horizontal places of all samples, in at least float32."""
    dtype = torch.promote_types(torch.promote_types(offsets.dtype, q.dtype), torch.float32)
    offsets, stretch = offsets.to(dtype), stretch.to(dtype)
    y, x = (
        _locate_axis(
            offsets[..., axis], stretch[..., axis], axis, window_size[axis], pad_start[axis], q.shape[1 + axis]
        )
        for axis in (0, 1)
    )
    return y, x


def _locate_axis(offsets: Tensor, stretch: Tensor, axis: int, length: int, pad: int, size: int) -> _Axis:
    """The places along one axis, from offsets and stretch (B, rows, columns, heads) and the map's size along it."""
    counts = torch.arange(offsets.shape[1 + axis], device=offsets.device, dtype=offsets.dtype)
    centres = (counts * length - pad + (length - 1) / 2).view(-1, *(1,) * (2 - axis))  # (rows, 1, 1) or (columns, 1)
    place = torch.arange(length, device=offsets.device, dtype=offsets.dtype) - (length - 1) / 2
    at = (centres + offsets)[..., None] + stretch[..., None] * place
    # Beyond these bounds all is zero, gradients too; without them huge predictions would overflow the index.
    at = at.clamp(-2, size + 1)
    low = at.detach().floor()
    share = at - low
    index = low.long()[..., None] + torch.arange(2, device=offsets.device)
    inside = ((index >= 0) & (index < size)).to(offsets.dtype)
    weight = torch.stack((1 - share, share), -1) * inside
    return _Axis(index.clamp(0, size - 1), inside, weight, place)


def _combine(taps: tuple[_Axis, _Axis], q: Tensor) -> tuple[Tensor, Tensor]:
    """The four neighbours of every sample: rows of `_token_rows` and weights, (B * nW * heads * T, 4) each."""
    y, x = taps
    batch, height, width, heads, _ = q.shape
    image = torch.arange(batch, device=q.device).view(-1, *(1,) * 7)
    head = torch.arange(heads, device=q.device).view(-1, *(1,) * 4)
    pixel = (image * height + y.neighbour[..., :, None, :, None]) * width + x.neighbour[..., None, :, None, :]
    weights = y.weight[..., :, None, :, None] * x.weight[..., None, :, None, :]
    rows_dtype = torch.promote_types(q.dtype, torch.float32)
    return (pixel * heads + head).reshape(-1, 4), weights.to(rows_dtype).reshape(-1, 4)


def _sample(index: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Weighted sums of rows, (N, taps) and (M, C) -> (N, C)."""
    if records_graph():  # other runtimes know no bags; this form takes more memory
        return (F.embedding(index, rows) * weights[..., None]).sum(1)
    return F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")


def _token_rows(k: Tensor, v: Tensor) -> Tensor:
    """Key and value of every head of every position, (B * H * W * heads, 2 D), in at least float32."""
    rows = torch.cat((k, v), -1).reshape(-1, 2 * k.shape[4])
    return rows.to(torch.promote_types(k.dtype, torch.float32))


def _to_heads(sampled: Tensor, q: Tensor, window_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Samples (B * nW * heads * T, 2 D) -> keys and values, (B * nW, heads, T, D) each."""
    heads, dim = q.shape[3:]
    tokens = window_size[0] * window_size[1]
    keys, values = sampled.view(-1, heads, tokens, 2 * dim).chunk(2, -1)
    return keys, values


def _cut(x: Tensor, offsets: Tensor, window_size: tuple[int, int], pad_start: tuple[int, int]) -> Tensor:
    """Pads (B, H, W, heads, D) with zeros on all sides to whole windows and cuts them: (B * nW, heads, T, D)."""
    (top, left), (rows, columns) = pad_start, offsets.shape[1:3]
    bottom = rows * window_size[0] - top - x.shape[1]
    right = columns * window_size[1] - left - x.shape[2]
    padded = F.pad(x, (0, 0, 0, 0, left, right, top, bottom)) if is_padded((top, left, bottom, right)) else x
    return to_windows(padded, window_size, (0, 0)).transpose(1, 2)


def _join(
    windows: Tensor, q: Tensor, offsets: Tensor, window_size: tuple[int, int], pad_start: tuple[int, int]
) -> Tensor:
    """(B * nW, heads, T, D) -> contiguous (B, H, W, heads, D): undoes `_cut`."""
    (batch, height, width, heads, dim), (rows, columns), (top, left) = q.shape, offsets.shape[1:3], pad_start
    x = windows.reshape(batch, rows, columns, heads, *window_size, dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(batch, rows * window_size[0], columns * window_size[1], heads, dim)
    return x[:, top : top + height, left : left + width].contiguous()


def _row_gradients(d_sampled: Tensor, index: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Gradient of `_token_rows`: every sample gives to its four neighbours."""
    d_rows = torch.zeros_like(rows)
    for tap in range(4):
        d_rows.index_add_(0, index[:, tap], d_sampled * weights[:, tap, None])
    return d_rows


def _window_gradients(
    d_sampled: Tensor, index: Tensor, rows: Tensor, taps: tuple[_Axis, _Axis]
) -> tuple[Tensor, Tensor]:
    """Gradients of offsets and stretch, (B, rows, columns, heads, 2) each."""
    y, x = taps
    d_weights = torch.stack([(rows[index[:, tap]] * d_sampled).sum(-1) for tap in range(4)], -1)
    d_weights = d_weights.view(*y.neighbour.shape[:5], x.neighbour.shape[4], 2, 2).to(y.weight.dtype)
    d_y = _slope((d_weights * x.weight[..., None, :, None, :]).sum((-3, -1)), y)
    d_x = _slope((d_weights * y.weight[..., :, None, :, None]).sum((-4, -2)), x)
    d_offsets = torch.stack((d_y.sum(-1), d_x.sum(-1)), -1)
    return d_offsets, torch.stack(((d_y * y.place).sum(-1), (d_x * x.place).sum(-1)), -1)


def _slope(d_weight: Tensor, axis: _Axis) -> Tensor:
    """Gradient of a sample's coordinate from those of its neighbours' shares, (..., n, 2) -> (..., n)."""
    gradients = d_weight * axis.inside
    return gradients[..., 1] - gradients[..., 0]
