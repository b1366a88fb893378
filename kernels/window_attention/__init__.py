"""Softmax attention inside the (shifted) windows of a map, read and written in place."""

from vitrail.kernels.window_attention.api import window_attention, window_attention_packed

__all__ = ["window_attention", "window_attention_packed"]
