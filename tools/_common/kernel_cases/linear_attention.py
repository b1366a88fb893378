"""L2ViT's attention without a softmax, over the whole map, from (B, H, W, heads, D) to the same."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitrail.kernels.linear_attention import linear_attention, linear_attention_packed
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, normal, parameter, stack_qkv

_FLOOR = 100.0


class _Shape(NamedTuple):
    batch: int
    size: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.size}x{self.size}x{self.heads * self.dim} h{self.heads}"


# The stages of L2ViT-T at 224 pixels.
_SHAPES = {
    "gpu": (_Shape(64, 56, 3, 32), _Shape(64, 28, 6, 32), _Shape(64, 14, 12, 32), _Shape(64, 7, 24, 32)),
    "cpu": (_Shape(2, 6, 2, 16),),
    "host": (_Shape(8, 7, 24, 32),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    image = normal(shape.batch, shape.size, shape.size, shape.heads, shape.dim)
    return KernelCase(
        "linear_attention",
        str(shape),
        (image, image, image, parameter(shape.heads, mean=1.0, std=0.1)),
        _eager,
        {
            "vitrail": Implementation(linear_attention),
            "vitrail packed": Implementation(linear_attention_packed, stack_qkv),
            "eager": Implementation(_eager),
            "eager compiled": compiled(_eager),
            "products in half": Implementation(_in_half),
            "products in half compiled": compiled(_in_half),
        },
    )


def _eager(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return linear_attention(q, k, v, temperature, backend="eager")


def _in_half(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """The same with the large products in the inputs' dtype: less exact, and what tensor cores are quick at."""
    queries, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q.relu(), k.relu(), v))
    products = keys.transpose(2, 3) @ values
    weights_sum = (queries @ keys.sum(2, keepdim=True).transpose(2, 3)).float()
    out = (queries @ products).float() / weights_sum.clamp_min(_FLOOR) * temperature[:, None, None]
    return out.to(q.dtype).transpose(1, 2).reshape(q.shape)
