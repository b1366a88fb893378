"""Attention without a softmax inside ragged windows of voxels."""

from vitrail.kernels.scattered_linear_attention.api import (
    scattered_linear_attention,
    scattered_linear_attention_packed,
)
from vitrail.kernels.scattered_linear_attention.windows import Windows, sort_windows

__all__ = ["Windows", "scattered_linear_attention", "scattered_linear_attention_packed", "sort_windows"]
