"""Layer normalisation of rows of channels, (B, H, W, C)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.layer_norm import layer_norm
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, normal, parameter


class _Shape(NamedTuple):
    batch: int
    size: int
    channels: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.size}x{self.size}x{self.channels}"


# The stages of DaViT-T at 224 pixels, trained with 128 images: from 401,408 rows of 96 to 6,272 of 768.
_SHAPES = {
    "gpu": tuple(_Shape(128, 56 >> i, 96 << i) for i in range(4)),
    "cpu": (_Shape(2, 3, 5), _Shape(1, 2, 16)),
    "host": (_Shape(8, 7, 768),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    image = normal(shape.batch, shape.size, shape.size, shape.channels, mean=1.0, std=2.0)
    return KernelCase(
        "layer_norm",
        str(shape),
        (image, parameter(shape.channels), parameter(shape.channels)),
        _eager,
        {
            "vitrail": Implementation(layer_norm),
            "PyTorch": Implementation(_library),
            "PyTorch compiled": compiled(_library),
        },
    )


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, backend="eager")


def _library(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)
