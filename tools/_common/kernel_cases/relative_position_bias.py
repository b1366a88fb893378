"""Swin's table of relative positions, ((2 h - 1) * (2 w - 1), heads), spread over the pairs of a window's tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple

from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from vitrail.kernels.relative_position_bias import relative_position_bias
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, parameter


class _Shape(NamedTuple):
    heads: int
    window: int

    def __str__(self) -> str:
        return f"h{self.heads} w{self.window}"


# Swin-T's first and last stage, and the last of Swin-B at 384 pixels.
_SHAPES = {
    "gpu": (_Shape(3, 7), _Shape(24, 7), _Shape(32, 12)),
    "cpu": (_Shape(2, 3), _Shape(1, 2)),
    "host": (_Shape(24, 7),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    tokens = shape.window**2
    ours = functools.partial(relative_position_bias, window_size=shape.window)
    with_index = functools.partial(_with_index, shape.window)
    return KernelCase(
        "relative_position_bias",
        str(shape),
        (parameter((2 * shape.window - 1) ** 2, shape.heads),),
        functools.partial(ours, backend="eager"),
        {
            "vitrail": Implementation(ours),
            "eager": Implementation(functools.partial(ours, backend="eager")),
            "index": Implementation(_index, with_index),
            "index compiled": compiled(_index, with_index),
        },
        output_shape=lambda table: (shape.heads, tokens, tokens),
    )


def _with_index(window: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """The table and, as Swin keeps it beside, the row of every pair of a query and a key, (h * w, h * w)."""
    return table, get_relative_position_index(window, window).to(table.device)


def _index(table: Tensor, rows: Tensor) -> Tensor:
    return table[rows.flatten()].view(*rows.shape, -1).permute(2, 0, 1).contiguous()
