"""ELA's gates of rows and columns, on (B, C, H, W)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.kernels.strip_gate import strip_gate
from vitrail.tools._common.kernel_cases.common import Implementation, Input, KernelCase, compiled, normal


class _Shape(NamedTuple):
    batch: int
    channels: int
    size: int
    channels_last: bool = False

    def __str__(self) -> str:
        text = f"B{self.batch} {self.channels}x{self.size}x{self.size}"
        return text + " channels-last" * self.channels_last


# The first and the last stage of ResNet-50 at 224 pixels.
_SHAPES = {
    "gpu": (_Shape(64, 256, 56), _Shape(64, 256, 56, True), _Shape(64, 2048, 7)),
    "cpu": (_Shape(2, 5, 7), _Shape(2, 5, 7, True)),
    "host": (_Shape(8, 2048, 7),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    strip = normal(shape.batch, shape.channels, shape.size)
    implementations = {
        "vitrail": Implementation(strip_gate),
        "eager": Implementation(_eager),
        "eager compiled": compiled(_eager),
    }
    return KernelCase("strip_gate", str(shape), (_map(shape), strip, strip), _eager, implementations)


def _map(shape: _Shape) -> Input:
    def draw(generator: torch.Generator) -> Tensor:
        size = (shape.batch, shape.channels, shape.size, shape.size)
        layout = torch.channels_last if shape.channels_last else torch.contiguous_format
        return torch.randn(size, generator=generator, device=generator.device).contiguous(memory_format=layout)

    return Input(draw)


def _eager(x: Tensor, logits_h: Tensor, logits_w: Tensor) -> Tensor:
    return strip_gate(x, logits_h, logits_w, backend="eager")
