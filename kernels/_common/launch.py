"""What launches of Triton kernels share: how tensors over (B, H, W, heads, D) are handed over."""

from __future__ import annotations

from torch import Tensor


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels step through a head's channels one by one; other layouts are copied."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def map_strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides over (B, H, W, heads) of each tensor."""
    return tuple(t.stride()[:4] for t in tensors)
