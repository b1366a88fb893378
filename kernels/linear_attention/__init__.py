"""Attention without a softmax: keys and values are summed over the map once, linear in its size."""

from vitrail.kernels.linear_attention.api import linear_attention, linear_attention_packed

__all__ = ["linear_attention", "linear_attention_packed"]
