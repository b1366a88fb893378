"""RMT's retention along rows, then along columns, from (B, H, W, heads, D) to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.kernels.retention import decomposed_retention, retention
from vitrail.tools._common.kernel_cases.common import Implementation, Input, KernelCase, compiled, normal


class _Shape(NamedTuple):
    batch: int
    size: int
    heads: int
    dim: int
    decomposed: bool = True

    def __str__(self) -> str:
        kind = "rows, columns" if self.decomposed else "whole map"
        return f"B{self.batch} {self.size}x{self.size}x{self.heads * self.dim} h{self.heads} {kind}"


# The stages of RMT-T at 224 pixels; it decomposes all but the last two.
_SHAPES = {
    "gpu": (
        _Shape(64, 56, 4, 16),
        _Shape(64, 28, 4, 32),
        _Shape(64, 14, 8, 32, False),
        _Shape(64, 7, 16, 32, False),
    ),
    "cpu": (_Shape(2, 6, 2, 16), _Shape(1, 5, 2, 16, False)),
    "host": (_Shape(8, 7, 16, 32, False),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    image = normal(shape.batch, shape.size, shape.size, shape.heads, shape.dim)
    eager = _ours(shape, "eager")
    authors = _authors_decomposed if shape.decomposed else _authors_whole
    return KernelCase(
        "retention",
        str(shape),
        (image, image, image, Input(_decay(shape.heads), per_image=False, exact=True)),
        eager,
        {
            "vitrail": Implementation(_ours(shape, "auto")),
            "eager": Implementation(eager),
            "authors'": Implementation(authors),
            "eager compiled": compiled(eager),
            "authors' compiled": compiled(authors),
        },
    )


def _decay(heads: int) -> Callable[[torch.Generator], Tensor]:
    """RMT's decays, from ln(1 - 2^-2) for the first head to nearly ln(1 - 2^-6) for the last."""

    def draw(generator: torch.Generator) -> Tensor:
        head = torch.arange(heads, device=generator.device)
        return torch.log1p(-torch.exp2(-2 - 4 * head / heads))

    return draw


def _ours(shape: _Shape, backend: str) -> Callable[..., Tensor]:
    function = decomposed_retention if shape.decomposed else retention

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return function(q, k, v, decay, backend=backend)

    return run


def _authors_decomposed(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """As RMT's authors do it: matrix products, a mask added to the logits, and a transposed map between the axes."""
    by_row = _attend(*(x.transpose(2, 3) for x in (q, k, v)), _line(q.shape[2], decay)).transpose(2, 3)
    by_column = _attend(*(x.permute(0, 2, 3, 1, 4) for x in (q, k, by_row)), _line(q.shape[1], decay))
    return by_column.permute(0, 3, 1, 2, 4).contiguous()


def _authors_whole(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Likewise over all positions at once, (B, heads, N, D)."""
    height, width = q.shape[1:3]
    index = torch.arange(height * width, device=q.device)
    row, column = index // width, index % width
    distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    out = _attend(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)), distance * decay[:, None, None])
    return out.transpose(1, 2).reshape(q.shape)


def _line(length: int, decay: Tensor) -> Tensor:
    """Decay of every pair on an axis, (heads, length, length)."""
    index = torch.arange(length, device=decay.device)
    return (index[:, None] - index).abs() * decay[:, None, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + mask.to(q.dtype)
    return logits.softmax(-1) @ v
