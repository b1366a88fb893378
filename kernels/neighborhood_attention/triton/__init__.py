"""Triton kernels of neighborhood attention."""

from vitrail.kernels.neighborhood_attention.triton.launch import (
    neighborhood_attention_backward,
    neighborhood_attention_forward,
)

__all__ = ["neighborhood_attention_backward", "neighborhood_attention_forward"]
