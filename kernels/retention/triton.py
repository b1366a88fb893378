"""Softmax retention on the Triton kernels of window attention.

It is window attention whose bias is the decay times the distance and whose padding is hidden; index map, tiling and
numerics are described there. Since hidden padding takes no part, a window that spans a whole axis may be longer than
the map: rows and columns are rounded up to a few lengths, so that kernels are not compiled anew for every image size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.kernels.retention.reference import manhattan_distance
from vitrail.kernels.window_attention.triton import window_attention_backward, window_attention_forward


def retention_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, window_size: Sequence[int], shift_size: Sequence[int], scale: float
) -> Tensor:
    """Fused forward with the softmax; arguments as in `retention_reference`."""
    window, shift = _rounded(q, window_size, shift_size)
    bias = _bias(decay, manhattan_distance(window, decay))
    return window_attention_forward(q, k, v, bias, None, None, window, shift, scale, False)


def retention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused backward with the softmax: gradients of q, k, v and decay."""
    window, shift = _rounded(q, window_size, shift_size)
    distance = manhattan_distance(window, decay)
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    d_bias, _, _ = window_attention_backward(
        grad, q, k, v, d_q, d_k, d_v, _bias(decay, distance), None, None, window, shift, scale, False
    )
    return d_q, d_k, d_v, (d_bias * distance).sum((1, 2)).to(decay.dtype)


def _bias(decay: Tensor, distance: Tensor) -> Tensor:
    return (decay[:, None, None] * distance).float()


def _rounded(
    q: Tensor, window_size: Sequence[int], shift_size: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Window and shift; a window of one whole row or column of the map is rounded up."""
    height, width = window_size
    if tuple(shift_size) == (0, 0) and height == 1 and width >= q.shape[2]:
        width = _round(width)
    elif tuple(shift_size) == (0, 0) and width == 1 and height >= q.shape[1]:
        height = _round(height)
    return (height, width), (shift_size[0], shift_size[1])


def _round(length: int) -> int:
    """The next multiple of 16, or of 64 beyond 64: what the kernels' tiles hold in any case."""
    step = 16 if length <= 64 else 64
    return -(-length // step) * step
