"""Depth-wise convolution on (B, H, W, C) maps: position encodings and local enhancement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """One k x k filter per channel with zero padding, on (B, H, W, C); the map keeps its size.

    Args:
        dim: Channels C.
        kernel_size: Odd filter size in pixels.
        bias: Add a learned bias per channel.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `kernel_size` is even.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; allowed: odd sizes")
        padding = kernel_size // 2
        super().__init__(dim, dim, kernel_size, padding=padding, groups=dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # The permutations are views: the convolution sees a channels-last map and returns one.
        padding = self.kernel_size[0] // 2
        x = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=padding, groups=self.groups)
        return x.permute(0, 2, 3, 1)
