"""Two linear layers with GELU between them on rows of channels, (B, H, W, C)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.mlp import mlp
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, normal, parameter


class _Shape(NamedTuple):
    batch: int
    size: int
    channels: int
    ratio: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.size}x{self.size}x{self.channels} ratio {self.ratio}"


# The stages of DaViT-T at 224 pixels with 128 images, and the first three of BiFormer-S.
_SHAPES = {
    "gpu": (
        *(_Shape(128, 56 >> i, 96 << i, 4) for i in range(3)),
        *(_Shape(128, 56 >> i, 64 << i, 3) for i in range(3)),
    ),
    "cpu": (_Shape(2, 3, 5, 4), _Shape(1, 2, 16, 3)),
    "host": (_Shape(8, 7, 192, 4),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    dim, hidden = shape.channels, shape.ratio * shape.channels
    weights = [parameter(rows, columns, std=columns**-0.5) for rows, columns in ((hidden, dim), (dim, hidden))]
    return KernelCase(
        "mlp",
        str(shape),
        (
            normal(shape.batch, shape.size, shape.size, dim),
            weights[0],
            parameter(hidden, std=0.1),
            weights[1],
            parameter(dim, std=0.1),
        ),
        _eager,
        {
            "vitrail": Implementation(mlp),
            "PyTorch": Implementation(_library),
            "PyTorch compiled": compiled(_library),
        },
    )


def _eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return mlp(x, w1, b1, w2, b2, backend="eager")


def _library(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
