"""Depth-wise convolution on (B, H, W, C) maps: position encodings and local enhancement."""

from __future__ import annotations

from typing import Optional

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels.depthwise_conv import depthwise_conv


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """One k x k filter per channel with zero padding, on (B, H, W, C); the map keeps its size.

    Args:
        dim: Channels C.
        kernel_size: Odd filter size in pixels.
        bias: Add a learned bias per channel.
        skip: Add the input to the result.
        gelu: Apply the exact GELU to the convolution, before anything is added.
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
        skip: bool = False,
        gelu: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; allowed: odd sizes")
        padding = kernel_size // 2
        super().__init__(dim, dim, kernel_size, padding=padding, groups=dim, bias=bias, device=device, dtype=dtype)
        self.skip = skip
        self.gelu = gelu

    def forward(
        self,
        x: Tensor,
        residual: Optional[Tensor] = None,  # noqa: UP045 -- TorchScript reads the annotations
        pad_value: Optional[Tensor] = None,  # noqa: UP045
        pads: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Convolves a map.

        Args:
            x: (B, H, W, C).
            residual: Added to the result, (B, H, W, C).
            pad_value: What the map holds beyond its end, (C,), in the number of rows and columns that `pads` says.
            pads: Rows at the bottom and columns at the right; zeros lie behind them.
        """
        if torch.jit.is_scripting():
            bias = self.bias
            return torch.ops.vitrail.depthwise_conv(
                x,
                self.weight.to(x.dtype),
                bias if bias is None else bias.to(x.dtype),
                pad_value,
                residual if residual is None else residual.to(x.dtype),
                pads,
                self.gelu,
                self.skip,
            )
        return depthwise_conv(
            x,
            self.weight,
            self.bias,
            residual=residual,
            skip=self.skip,
            gelu=self.gelu,
            pads=pads,
            pad_value=pad_value,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ", skip=True" * self.skip + ", gelu=True" * self.gelu
