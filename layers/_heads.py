"""What every multi-head layer checks first."""

from __future__ import annotations


def head_width(layer: str, dim: int, num_heads: int) -> int:
    """Channels of one head.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{layer}: dim is {dim}, num_heads {num_heads}; dim must be a multiple of num_heads")
    return dim // num_heads
