"""DaViT's attention between the channels of a group, from image-shaped (B, H, W, groups, D) to the same."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitrail.kernels.channel_attention import channel_attention, channel_attention_packed
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, normal, stack_qkv


class _Shape(NamedTuple):
    batch: int
    size: int
    groups: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.size}x{self.size}x{self.groups * self.dim} g{self.groups}"


# The stages of DaViT-T at 224 pixels.
_SHAPES = {
    "gpu": (_Shape(64, 56, 3, 32), _Shape(64, 28, 6, 32), _Shape(64, 14, 12, 32), _Shape(64, 7, 24, 32)),
    "cpu": (_Shape(2, 6, 2, 16),),
    "host": (_Shape(8, 7, 24, 32),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    image = normal(shape.batch, shape.size, shape.size, shape.groups, shape.dim)
    return KernelCase(
        "channel_attention",
        str(shape),
        (image, image, image),
        _eager,
        {
            "vitrail": Implementation(channel_attention),
            "vitrail packed": Implementation(channel_attention_packed, stack_qkv),
            "eager": Implementation(_eager),
            "timm": Implementation(_timm, stack_qkv),
            "eager compiled": compiled(_eager),
            "timm compiled": compiled(_timm, stack_qkv),
        },
    )


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return channel_attention(q, k, v, backend="eager")


def _timm(qkv: Tensor) -> Tensor:
    """The core of timm's DaViT channel block, on tokens; its scale multiplies k."""
    batch, height, width, _, groups, dim = qkv.shape
    q, k, v = qkv.reshape(batch, height * width, 3, groups, dim).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((k * dim**-0.5).transpose(-1, -2) @ v).softmax(-1)
    out = (weights @ q.transpose(-1, -2)).transpose(-1, -2)
    return out.transpose(1, 2).reshape(batch, height, width, groups, dim)
