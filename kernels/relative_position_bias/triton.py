"""Triton kernels of the relative position bias: index map, tiling, numerics and roofline.

Index map. A pair of a query and a key is one number, query * tokens + key; raster positions in the window and the row
of the table follow by divisions. The heads are the grid's second axis.

Tiling. Forward, a program writes some hundred pairs of a head. Backward, a program sums some offsets of a head: for
each it walks over all keys, whose query either lies inside the window or counts nothing.

Numerics. Forward copies. Backward sums in float32, in a fixed order: gradients are deterministic.

Roofline. None: at most some hundred kilobytes move, and a launch takes longer. What counts is that there is one in each
direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import contiguous, launch

_PAIRS = 1024  # of a program, forward
_OFFSETS, _KEYS = 16, 64  # of a program and of its step, backward


@triton.jit
def _spread_kernel(table, bias, n_heads, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    head = tl.program_id(1)
    query, key = pair // TOKENS, pair % TOKENS
    y = query // WIDTH - key // WIDTH + (HEIGHT - 1)
    x = query % WIDTH - key % WIDTH + (WIDTH - 1)
    exists = pair < TOKENS * TOKENS
    row = (y * (2 * WIDTH - 1) + x).to(tl.int64)
    value = tl.load(table + row * n_heads + head, mask=exists)
    tl.store(bias + head.to(tl.int64) * (TOKENS * TOKENS) + pair, value, mask=exists)


@triton.jit
def _collect_kernel(
    grad, d_table, n_heads, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr, KEYS: tl.constexpr
):
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    row = tl.program_id(0) * OFFSETS + tl.arange(0, OFFSETS)
    head = tl.program_id(1)
    y = (row // (2 * WIDTH - 1) - (HEIGHT - 1))[:, None]
    x = (row % (2 * WIDTH - 1) - (WIDTH - 1))[:, None]
    grad += head.to(tl.int64) * (TOKENS * TOKENS)
    total = tl.zeros((OFFSETS, KEYS), tl.float32)
    for start in range(0, TOKENS, KEYS):
        key = (start + tl.arange(0, KEYS))[None, :]
        query_y, query_x = key // WIDTH + y, key % WIDTH + x
        inside = (query_y >= 0) & (query_y < HEIGHT) & (query_x >= 0) & (query_x < WIDTH) & (key < TOKENS)
        pair = (query_y * WIDTH + query_x) * TOKENS + key
        total += tl.load(grad + pair, mask=inside, other=0.0).to(tl.float32)
    exists = row < (2 * HEIGHT - 1) * (2 * WIDTH - 1)
    tl.store(d_table + row.to(tl.int64) * n_heads + head, tl.sum(total, 1), mask=exists)


def relative_position_bias_forward(table: Tensor, window_size: Sequence[int]) -> Tensor:
    """Fused forward; arguments as in `relative_position_bias_reference`."""
    height, width = window_size
    tokens, heads = math.prod(window_size), table.shape[1]
    bias = torch.empty((heads, tokens, tokens), dtype=table.dtype, device=table.device)
    if heads:
        launch(
            _spread_kernel, (triton.cdiv(tokens**2, _PAIRS), heads), contiguous(table), bias, heads,
            HEIGHT=height, WIDTH=width, PAIRS=_PAIRS, num_warps=4, num_stages=1,
        )  # fmt: skip
    return bias


def relative_position_bias_backward(grad: Tensor, table: Tensor, window_size: Sequence[int]) -> Tensor:
    """Fused gradient of the table."""
    height, width = window_size
    offsets, heads = table.shape
    d_table = torch.empty(table.shape, dtype=table.dtype, device=table.device)
    if heads:
        launch(
            _collect_kernel, (triton.cdiv(offsets, _OFFSETS), heads), contiguous(grad), d_table, heads,
            HEIGHT=height, WIDTH=width, OFFSETS=_OFFSETS, KEYS=_KEYS, num_warps=4, num_stages=1,
        )  # fmt: skip
    return d_table
