"""Depth-wise convolution of (B, H, W, C) maps with what surrounds it: bias, residual, GELU, learned padding."""

from vitrail.kernels.depthwise_conv.api import depthwise_conv

__all__ = ["depthwise_conv"]
