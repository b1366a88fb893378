"""Softmax attention of windows whose keys and values are sampled from moved and stretched windows."""

from vitrail.kernels.varied_window_attention.api import varied_window_attention, varied_window_attention_packed

__all__ = ["varied_window_attention", "varied_window_attention_packed"]
