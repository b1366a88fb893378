"""Calls of the operators that launch every Triton kernel in every way in which it is compiled.

A calls' function takes the inputs' dtype and a width: channels of a head, of a map, or the size of a filter.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.kernels.channel_attention import channel_attention, channel_attention_packed
from vitrail.kernels.context_window_attention import context_window_attention
from vitrail.kernels.depthwise_conv import depthwise_conv
from vitrail.kernels.layer_norm import layer_norm
from vitrail.kernels.linear_attention import linear_attention, linear_attention_packed
from vitrail.kernels.mlp import mlp
from vitrail.kernels.neighborhood_attention import neighborhood_attention
from vitrail.kernels.relative_position_bias import relative_position_bias
from vitrail.kernels.routing_attention import region_routes, routing_attention
from vitrail.kernels.scattered_linear_attention import (
    scattered_linear_attention,
    scattered_linear_attention_packed,
    sort_windows,
)
from vitrail.kernels.sparse_conv import (
    depthwise_sparse_conv,
    mixed_depthwise_conv,
    sparse_conv,
    strided_sites,
    strided_table,
    submanifold_table,
)
from vitrail.kernels.strip_gate import strip_gate
from vitrail.kernels.varied_window_attention import varied_window_attention, varied_window_attention_packed
from vitrail.kernels.window_attention import window_attention, window_attention_packed

_HEADS = 2


class Calls(NamedTuple):
    """Calls of one operator: what runs them, for which widths, and the width of the selection that tests compile."""

    run: Callable[[torch.dtype, int], None]
    widths: tuple[int, ...]
    usual: int


def _input(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _packed(dtype: torch.dtype, head_dim: int, size: int = 28) -> Tensor:
    return _input(dtype, 2, size, size, 3, _HEADS, head_dim)


def _train(operator: Callable[..., Tensor], *inputs: Any, **options: Any) -> None:
    """Forward and backward; nothing that kernels would fill is read."""
    out = operator(*inputs, **options, backend="triton")
    out.backward(torch.zeros_like(out))


def _window_attention(dtype: torch.dtype, head_dim: int) -> None:
    pads = {name: _input(dtype, _HEADS, head_dim) for name in ("pad_k", "pad_v")}
    whole, cut = _packed(dtype, head_dim), _packed(dtype, head_dim, 25)
    _train(window_attention, *whole.unbind(3), window_size=7)
    for window in (7, 14):  # one tile, and a few
        bias = _input(dtype, _HEADS, window**2, window**2)
        _train(window_attention_packed, whole, window_size=window, shift_size=3, bias=bias)
        _train(window_attention_packed, cut, window_size=window, shift_size=3, bias=bias, roll_first=True, **pads)
        _train(window_attention_packed, cut, window_size=window, bias=bias)
    bias = _input(dtype, _HEADS, 17**2, 17**2)  # a window of many tiles
    _train(window_attention_packed, cut, window_size=17, shift_size=3, bias=bias, **pads)


def _neighborhood_attention(dtype: torch.dtype, head_dim: int) -> None:
    extra = {name: _input(dtype, 2, 20, _HEADS, head_dim) for name in ("extra_k", "extra_v")}
    pads = {name: _input(dtype, _HEADS, head_dim) for name in ("pad_k", "pad_v")}
    maps = _packed(dtype, head_dim).unbind(3)
    line = [_input(dtype, 2, 60, _HEADS, head_dim) for _ in range(3)]
    volume = [_input(dtype, 1, 6, 14, 14, _HEADS, head_dim) for _ in range(3)]
    rpb = _input(dtype, _HEADS, 13, 13)
    _train(neighborhood_attention, *maps, kernel_size=7, rpb=rpb)
    _train(neighborhood_attention, *maps, kernel_size=7, dilation=5, rpb=rpb, **pads)  # 35 places of 28 are real
    _train(neighborhood_attention, *maps, kernel_size=7, stride=2, is_causal=(True, False), **extra)
    for kernel in (3, 13):
        _train(neighborhood_attention, *maps, kernel_size=kernel, rpb=_input(dtype, _HEADS, *[2 * kernel - 1] * 2))
    _train(neighborhood_attention, *line, kernel_size=7, rpb=_input(dtype, _HEADS, 13))
    _train(neighborhood_attention, *volume, kernel_size=(3, 5, 5), rpb=_input(dtype, _HEADS, 5, 9, 9))
    line = [_input(torch.float32, 2, 60, _HEADS, head_dim) for _ in range(3)]
    _train(neighborhood_attention, *line, kernel_size=7, rpb=_input(torch.float32, _HEADS, 13))  # a kernel of its own


def _routing_attention(dtype: torch.dtype, head_dim: int) -> None:
    """And its gradients in the way of `routing_attention_lepe`, which runs on its kernels."""
    from vitrail.kernels.routing_attention.triton import routing_attention_gradients

    pads = [_input(dtype, _HEADS, head_dim) for _ in range(2)]
    for size, topk in ((56, 4), (25, 4), (14, 16), (7, 49)):
        q, k, v = _packed(dtype, head_dim, size).unbind(3)
        region_routes(q, k, n_regions=7, topk=topk, pad_q=pads[0], pad_k=pads[1], backend="triton")
        routes = torch.arange(topk).expand(2, 49, topk)
        _train(routing_attention, q, k, v, routes, n_regions=7, pad_k=pads[0], pad_v=pads[1])
        parts = torch.zeros(2, size, size, 3, _HEADS, head_dim, dtype=dtype).unbind(3)
        grad = torch.zeros(q.shape, dtype=dtype)
        routing_attention_gradients(grad, q, k, v, *parts, *pads, routes, (7, 7), 1.0, adds_to_v=True)


def _retention(dtype: torch.dtype, head_dim: int) -> None:
    """But for the kernels of window attention, which it runs on."""
    from vitrail.kernels.retention.triton import decay_bias, distances

    for decay in (torch.zeros(_HEADS), torch.zeros(_HEADS, dtype=torch.float64)):
        decay_bias(decay, (7, 7))
        distances((7, 7), decay)


def _linear_attention(dtype: torch.dtype, head_dim: int) -> None:
    qkv, temperature = _packed(dtype, head_dim), _input(dtype, _HEADS)
    _train(linear_attention, *qkv.unbind(3), temperature)
    _train(linear_attention_packed, qkv, temperature)
    _train(linear_attention_packed, qkv[:, :7, :7], temperature)  # one chunk


def _channel_attention(dtype: torch.dtype, head_dim: int) -> None:
    qkv = _packed(dtype, head_dim)
    _train(channel_attention, *qkv.unbind(3))
    _train(channel_attention_packed, qkv)


def _varied_window_attention(dtype: torch.dtype, head_dim: int) -> None:
    for window in (4, 7):
        rows = -(-28 // window)
        offsets, stretch = (_input(torch.float32, 2, rows, rows, _HEADS, 2) for _ in range(2))
        qkv, bias = _packed(dtype, head_dim), _input(dtype, _HEADS, window**2, window**2)
        _train(varied_window_attention_packed, qkv, offsets, stretch, window_size=window, bias=bias)
        _train(varied_window_attention, *qkv.unbind(3), offsets, stretch, window_size=window)


def _context_window_attention(dtype: torch.dtype, head_dim: int) -> None:
    for size, window in ((28, 7), (25, 7), (28, 14)):  # one tile, cut-off windows, and several tiles
        q, k, v = _packed(dtype, head_dim, size).unbind(3)
        starts = [min(first, size - window) for first in range(0, size, window)]
        _train(context_window_attention, q, k, v, window_size=window, row_starts=starts, column_starts=starts)


def _strip_gate(dtype: torch.dtype, channels: int) -> None:
    for size, layout in product((7, 56), (torch.contiguous_format, torch.channels_last)):
        x = torch.zeros(2, channels, size, size, dtype=dtype).to(memory_format=layout).requires_grad_()
        for strips in {dtype, torch.float32}:
            _train(strip_gate, x, *(_input(strips, 2, channels, size) for _ in range(2)), skip=True)


def _layer_norm(dtype: torch.dtype, channels: int) -> None:
    for parameters in {dtype, torch.float32}:
        weight, bias = (_input(parameters, channels) for _ in range(2))
        _train(layer_norm, _input(dtype, 40, channels), weight, bias)
    _train(layer_norm, _input(dtype, 40, channels), weight)
    _train(layer_norm, _input(dtype, 40, 2, channels)[:, 1])


def _mlp(dtype: torch.dtype, channels: int) -> None:
    if dtype == torch.float32:  # the reference's
        return
    x, out_channels = _input(dtype, 40, channels), min(2 * channels, 256)
    for hidden, biases in ((4 * channels, True), (3 * channels + 8, False)):
        b1, b2 = (_input(dtype, size) if biases else None for size in (hidden, channels))
        _train(mlp, x, _input(dtype, hidden, channels), b1, _input(dtype, channels, hidden), b2)
    w1, w2 = _input(dtype, hidden, channels), _input(dtype, out_channels, hidden)
    _train(mlp, x, w1, None, w2, None)
    _train(mlp, x, w1.detach(), None, w2.detach(), None)
    _train(mlp, x.detach(), w1, None, w2, None)


def _depthwise_conv(dtype: torch.dtype, kernel: int) -> None:
    from vitrail.kernels.depthwise_conv.triton import depthwise_conv_backward, depthwise_conv_forward

    for channels in (64, 20):  # whole blocks of channels, and one that is cut off
        bias, pad = (_input(dtype, channels) for _ in range(2))
        x, weight = _input(dtype, 2, 14, 14, channels), _input(dtype, channels, 1, kernel, kernel)
        _train(depthwise_conv, x, weight, bias, gelu=True, skip=True)
        _train(depthwise_conv, x, weight, bias, pads=(1, 2), pad_value=pad)
    packed = torch.zeros(2, 14, 14, 3, channels, dtype=dtype)  # as `routing_attention_lepe` holds maps and gradients
    value, d_value = packed[:, :, :, 2], torch.zeros_like(packed)[:, :, :, 2]
    grad = depthwise_conv_forward(value, weight, bias, None, x, (0, 0), False, False, out=x.detach())
    depthwise_conv_backward(grad, value, weight, bias, None, (0, 0), False, False, d_x=d_value)
    value.requires_grad_()
    _train(depthwise_conv, value, weight)
    _train(depthwise_conv, value, weight, residual=x)


def _scattered_linear_attention(dtype: torch.dtype, head_dim: int) -> None:
    from vitrail.kernels.scattered_linear_attention.triton_windows import find_windows

    ids = torch.arange(800) // 500  # a crowded window
    windows = sort_windows(ids)
    qkv = _input(dtype, 800, 3, _HEADS, head_dim)
    _train(scattered_linear_attention, *qkv.unbind(1), windows)
    _train(scattered_linear_attention_packed, qkv, windows)
    find_windows(ids, ids, 32, 64, 256, 100)


def _sparse_conv(dtype: torch.dtype, channels: int) -> None:
    from vitrail.kernels.sparse_conv.triton_sites import coords_of, keys_of_points, neighbour_table, reached_keys

    shape, three, two = (4, 8, 8), (3, 3, 3), (2, 2, 2)
    keys = torch.arange(0, 256, 2)
    table = submanifold_table(keys, shape, three)
    x = _input(dtype, len(keys), channels)
    for out_channels in (channels, 2 * channels):
        _train(sparse_conv, x, _input(dtype, out_channels, 27, channels), table)
    out_keys, out_shape = strided_sites(keys, shape, two, two, (0, 0, 0))
    strided = strided_table(keys, shape, out_keys, out_shape, two, two, (0, 0, 0))
    _train(sparse_conv, x, _input(dtype, channels, 8, channels), strided)
    _train(depthwise_sparse_conv, x, _input(dtype, 27, channels), table)
    weights = [_input(dtype, 27, channels // 4) for _ in range(3)]
    _train(mixed_depthwise_conv, x, weights, [table] * 3)

    neighbour_table(keys, shape, keys, shape, three, (1, 1, 1), (-1, -1, -1))
    reached_keys(keys, shape, out_shape, two, two, (0, 0, 0), (1, 1, 1))
    coords_of(keys, shape)
    keys_of_points(torch.zeros(50, 5), torch.zeros(50, dtype=torch.int64), (0.0, 0.0, 0.0), (0.1, 0.1, 0.2), shape)


def _relative_position_bias(dtype: torch.dtype, size: int) -> None:
    for heads in (1, 3, 16):
        _train(relative_position_bias, _input(dtype, (2 * size - 1) ** 2, heads), size)


_HEAD_DIMS = (16, 32, 64, 128)
CALLS = {
    "window_attention": Calls(_window_attention, _HEAD_DIMS, 32),
    "neighborhood_attention": Calls(_neighborhood_attention, _HEAD_DIMS, 32),
    "routing_attention": Calls(_routing_attention, _HEAD_DIMS, 32),
    "retention": Calls(_retention, (16,), 16),
    "linear_attention": Calls(_linear_attention, _HEAD_DIMS, 32),
    "channel_attention": Calls(_channel_attention, _HEAD_DIMS, 32),
    "varied_window_attention": Calls(_varied_window_attention, _HEAD_DIMS, 32),
    "context_window_attention": Calls(_context_window_attention, _HEAD_DIMS, 32),
    "strip_gate": Calls(_strip_gate, (16, 64, 100), 64),
    "layer_norm": Calls(_layer_norm, (20, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 8192), 96),
    "relative_position_bias": Calls(_relative_position_bias, (4, 7, 14), 7),
    "mlp": Calls(_mlp, (20, 64, 96, 128, 192, 256), 96),
    "depthwise_conv": Calls(_depthwise_conv, (3, 5, 7), 3),
    "scattered_linear_attention": Calls(_scattered_linear_attention, _HEAD_DIMS[:3], 32),
    "sparse_conv": Calls(_sparse_conv, (16, 32, 64, 128), 32),
}


def _map_of_size(operator: Callable[..., Tensor], **options: Any) -> Callable[[int], None]:
    def run(size: int) -> None:
        qkv = _input(torch.bfloat16, 1, 1 + size % 32, 1 + size % 31, 3, _HEADS, 32)
        _train(operator, *qkv.unbind(3), **options)

    return run


def _voxels(size: int) -> None:
    qkv = _input(torch.bfloat16, size, 3, _HEADS, 32)
    _train(scattered_linear_attention_packed, qkv, sort_windows(torch.arange(size) // 100))


def _sites(size: int) -> None:
    keys = torch.arange(size)
    table = submanifold_table(keys, (4, 16, 16), (3, 3, 3))
    _train(sparse_conv, _input(torch.bfloat16, size, 32), _input(torch.bfloat16, 32, 27, 32), table)


def _rows(size: int) -> None:
    _train(layer_norm, _input(torch.bfloat16, size, 96), *(_input(torch.bfloat16, 96) for _ in range(2)))


def _mlp_rows(size: int) -> None:
    shapes = (size, 96), (192, 96), (192,), (96, 192), (96,)
    _train(mlp, *(_input(torch.bfloat16, *shape) for shape in shapes))


# Calls whose inputs have some hundred tokens, voxels, sites or rows.
SIZED = {
    "window_attention": _map_of_size(window_attention, window_size=7),
    "neighborhood_attention": _map_of_size(neighborhood_attention, kernel_size=7),
    "scattered_linear_attention": _voxels,
    "sparse_conv": _sites,
    "layer_norm": _rows,
    "mlp": _mlp_rows,
}
