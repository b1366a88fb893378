"""Depth-wise convolution with what follows it in the models, from (B, H, W, C) to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.depthwise_conv import depthwise_conv
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, normal, parameter


class _Shape(NamedTuple):
    batch: int
    size: int
    channels: int
    kernel: int

    def __str__(self) -> str:
        follows = " + input" * self.skip + " + residual" * self.residual + " GELU" * self.gelu
        return f"B{self.batch} {self.size}x{self.size}x{self.channels} k{self.kernel}{follows}"

    @property
    def skip(self) -> bool:
        """Adds the input, as positional encodings do."""
        return self.kernel == 3

    @property
    def residual(self) -> bool:
        """Adds another map, as BiFormer's position term does."""
        return self.kernel == 5

    @property
    def gelu(self) -> bool:
        """Ends with GELU, as L2ViT's local concentration does."""
        return self.kernel == 7


# Every filter on the maps of DaViT-T and L2ViT-T at 224 pixels; then BiFormer-S's first stage with its two filters.
_SHAPES = {
    "gpu": (
        *(_Shape(64, 56 >> i, 96 << i, kernel) for kernel in (3, 5, 7) for i in range(4)),
        *(_Shape(64, 56, 64, kernel) for kernel in (3, 5)),
    ),
    "cpu": (_Shape(2, 6, 4, 3), _Shape(1, 7, 4, 5), _Shape(1, 8, 4, 7)),
    "host": (_Shape(8, 7, 512, 3), _Shape(8, 7, 512, 5), _Shape(8, 7, 768, 7)),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    image = normal(shape.batch, shape.size, shape.size, shape.channels)
    weight = parameter(shape.channels, 1, shape.kernel, shape.kernel, std=1 / shape.kernel)
    eager, library = _ours(shape, "eager"), _library(shape)
    return KernelCase(
        "depthwise_conv",
        str(shape),
        (image, weight, parameter(shape.channels), *[image] * shape.residual),
        eager,
        {
            "vitrail": Implementation(_ours(shape, "auto")),
            "cuDNN channels-last": Implementation(library),
            "cuDNN channels-last compiled": compiled(library),
        },
    )


def _ours(shape: _Shape, backend: str) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return depthwise_conv(
            x, weight, bias, residual=residual, skip=shape.skip, gelu=shape.gelu, backend=backend
        )  # fmt: skip

    return run


def _library(shape: _Shape) -> Callable[..., Tensor]:
    """PyTorch's convolution, which on GPUs is cuDNN's or PyTorch's own kernel, of a channels-last view."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=shape.kernel // 2, groups=shape.channels)
        y = y.permute(0, 2, 3, 1)
        if shape.gelu:
            y = F.gelu(y)
        if shape.skip:
            y = x + y
        return y if residual is None else y + residual

    return run
