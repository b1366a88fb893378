"""RMT's retention along rows, then along columns, from (B, H, W, heads, D) to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from vitrail.kernels.retention import decomposed_retention, retention
from vitrail.tools._common.kernel_cases.common import Implementation, Input, KernelCase, compiled, flex, normal


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
    eager, along = _ours(shape, "eager"), _along_axes if shape.decomposed else _over_map
    authors, sdpa = along(_softmax_attention), along(_sdpa)
    return KernelCase(
        "retention",
        str(shape),
        (image, image, image, Input(_decay(shape.heads), per_image=False, exact=True)),
        eager,
        {
            "vitrail": Implementation(_ours(shape, "auto")),
            "eager": Implementation(eager),
            "authors'": Implementation(authors),
            "SDPA": Implementation(sdpa),
            "eager compiled": compiled(eager),
            "authors' compiled": compiled(authors),
            "SDPA compiled": compiled(sdpa),
            "flex_attention": flex(along(_flex)),
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


_Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _along_axes(attention: _Attention) -> Callable[..., Tensor]:
    """Attention along rows, a transposed map, attention along columns."""

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        rows, columns = (_line(n, decay.device) for n in (q.shape[2], q.shape[1]))
        by_row = attention(*(x.transpose(2, 3).flatten(0, 1) for x in (q, k, v)), rows, decay)
        by_row = by_row.unflatten(0, q.shape[:2]).transpose(2, 3)
        by_column = attention(*(x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, by_row)), columns, decay)
        return by_column.unflatten(0, (q.shape[0], q.shape[2])).permute(0, 3, 1, 2, 4).contiguous()

    return run


def _over_map(attention: _Attention) -> Callable[..., Tensor]:
    """Attention over all positions at once."""

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        height, width = q.shape[1:3]
        index = torch.arange(height * width, device=q.device)
        row, column = index // width, index % width
        distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()
        out = attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)), distance, decay)
        return out.transpose(1, 2).reshape(q.shape)

    return run


def _line(length: int, device: torch.device) -> Tensor:
    """Distance of every pair on an axis, (length, length)."""
    index = torch.arange(length, device=device)
    return (index[:, None] - index).abs()


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, decay: Tensor) -> Tensor:
    """As RMT's authors do it: matrix products, and a mask that is added to the logits; all (..., heads, N, D)."""
    mask = distance * decay[:, None, None]
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + mask.to(q.dtype)).softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, decay: Tensor) -> Tensor:
    mask = (distance * decay[:, None, None]).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, decay: Tensor) -> Tensor:
    """The decay in the score function, without a mask in memory."""

    def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return value + distance[query, key] * decay[head]

    return flex_attention(q, k, v, score_mod=score)
