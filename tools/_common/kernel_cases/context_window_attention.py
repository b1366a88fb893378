"""VWFormer's windows that attend to coarser windows of a larger part of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.context_window_attention import context_window_attention
from vitrail.layers.varying_window import context_grid
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, normal

_N_WINDOWS = 8  # along each side of the map


class _Shape(NamedTuple):
    batch: int
    size: int
    heads: int
    dim: int
    ratio: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.size}x{self.size}x{self.heads * self.dim} h{self.heads} ratio {self.ratio}"


# The decoder's map at stride 8 of a 512 pixel image: one head for ADE20K, 16 in the other forms.
_SHAPES = {
    "gpu": tuple(_Shape(16, 64, heads, 512 // heads, ratio) for heads in (1, 16) for ratio in (2, 4, 8)),
    "cpu": (_Shape(2, 16, 2, 16, 2),),
    "host": (_Shape(2, 64, 1, 512, 8),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    window = shape.size // _N_WINDOWS
    grid = context_grid(window, shape.ratio, _N_WINDOWS)
    context_size = sum(length for _, length in grid.pieces) // shape.ratio
    context = normal(shape.batch, context_size, context_size, shape.heads, shape.dim)
    queries = normal(shape.batch, shape.size, shape.size, shape.heads, shape.dim)
    eager, unfolded = _ours(window, grid.token_starts, "eager"), _unfolded(window, shape)
    return KernelCase(
        "context_window_attention",
        str(shape),
        (queries, context, context),
        eager,
        {
            "vitrail": Implementation(_ours(window, grid.token_starts, "auto")),
            "eager": Implementation(eager),
            "unfold": Implementation(unfolded),
            "eager compiled": compiled(eager),
            "unfold compiled": compiled(unfolded),
        },
    )


def _ours(window: int, starts: list[int], backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return context_window_attention(
            q, k, v, window_size=window, row_starts=starts, column_starts=starts, backend=backend
        )  # fmt: skip

    return run


def _unfolded(window: int, shape: _Shape) -> Callable[..., Tensor]:
    """As VWFormer's authors do it: contexts unfolded (here by views), for windows that are multiples of the ratio."""
    step, tokens = window // shape.ratio, window**2

    def unfold(x: Tensor, step: int) -> Tensor:
        """(B, H, W, heads, D) -> (B * windows, heads, T, D)."""
        x = x.unfold(1, window, step).unfold(2, window, step)  # (B, rows, columns, heads, D, w, w)
        return x.flatten(5).transpose(4, 5).reshape(-1, shape.heads, tokens, shape.dim)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(unfold(q, window), unfold(k, step), unfold(v, step))
        out = out.reshape(len(q), _N_WINDOWS, _N_WINDOWS, shape.heads, window, window, shape.dim)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(q.shape)

    return run
