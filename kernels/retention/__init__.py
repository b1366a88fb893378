"""Attention whose weights decay with the Manhattan distance, over a map or its windows, at once or axis by axis."""

from vitrail.kernels.retention.api import decomposed_retention, retention

__all__ = ["decomposed_retention", "retention"]
