"""Softmax retention on the Triton kernels of window attention.

It is window attention whose bias is the decay times the distance and whose padding is hidden; index map, tiling and
numerics are described there. Since hidden padding takes no part, a window that spans a whole axis may be longer than
the map: rows and columns are rounded up to a few lengths, so that kernels are not compiled anew for every image size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch
from vitrail.kernels.window_attention.triton import window_attention_backward, window_attention_forward

_BLOCK = 1024  # pairs of tokens of a program


@triton.jit(do_not_specialize=["n_tokens", "width"])
def _distance_kernel(out_ptr, decay_ptr, n_tokens, width, HAS_DECAY: tl.constexpr, BLOCK: tl.constexpr):
    """Distance of every query and key of a window, (T, T), or its product with every head's decay, (heads, T, T)."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    query, key = pair // n_tokens, pair % n_tokens
    found = tl.abs(query // width - key // width) + tl.abs(query % width - key % width)
    if HAS_DECAY:
        decay = tl.load(decay_ptr + head)
        found = found.to(decay.dtype) * decay
    n_pairs = n_tokens * n_tokens
    offsets = head.to(tl.int64) * n_pairs + pair
    tl.store(out_ptr + offsets, found.to(out_ptr.dtype.element_ty), mask=pair < n_pairs)


def retention_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, window_size: Sequence[int], shift_size: Sequence[int], scale: float
) -> Tensor:
    """Fused forward with the softmax; arguments as in `retention_reference`."""
    window, shift = _rounded(q, window_size, shift_size)
    return window_attention_forward(q, k, v, decay_bias(decay, window), None, None, window, shift, scale, False)


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
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    d_bias, _, _ = window_attention_backward(
        grad, q, k, v, d_q, d_k, d_v, decay_bias(decay, window), None, None, window, shift, scale, False
    )
    return d_q, d_k, d_v, (d_bias * distances(window, decay)).sum((1, 2)).to(decay.dtype)


def decay_bias(decay: Tensor, window: tuple[int, int]) -> Tensor:
    """The decay of each head times the distance, (heads, T, T), float32."""
    n_tokens = window[0] * window[1]
    bias = torch.empty((len(decay), n_tokens, n_tokens), dtype=torch.float32, device=decay.device)
    _fill(bias, decay.contiguous(), window)
    return bias


def distances(window: tuple[int, int], like: Tensor) -> Tensor:
    """`manhattan_distance` of the reference, in one launch."""
    n_tokens = window[0] * window[1]
    distance = torch.empty((n_tokens, n_tokens), dtype=like.dtype, device=like.device)
    _fill(distance, None, window)
    return distance


def _fill(out: Tensor, decay: Tensor | None, window: tuple[int, int]) -> None:
    n_tokens, heads = out.shape[-1], 1 if decay is None else len(decay)
    launch(
        _distance_kernel, (triton.cdiv(n_tokens**2, _BLOCK), heads), out, decay, n_tokens, window[1],
        HAS_DECAY=decay is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


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
