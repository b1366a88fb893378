"""Attention of every window of one map over a window of another map, whose places are given."""

from vitrail.kernels.context_window_attention.api import context_window_attention

__all__ = ["context_window_attention"]
