"""Submanifold convolution of voxels, from (N, C) to the same, with the table of neighbours given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.kernels.sparse_conv import NeighbourTable, depthwise_sparse_conv, sparse_conv, submanifold_table
from vitrail.tools._common.kernel_cases.common import Implementation, Input, KernelCase, compiled, parameter
from vitrail.tools._common.kernel_cases.voxels import GRID, scan_keys


class _Shape(NamedTuple):
    n_voxels: int
    channels: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    depthwise: bool = False

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        return f"N{self.n_voxels} {self.channels} k{kernel}" + " depth-wise" * self.depthwise


# The convolutions of ScatterFormer: the stem's, and one of the depth-wise ones between windows.
_SHAPES = {
    "gpu": (
        _Shape(50_000, 128),
        _Shape(100_000, 128),
        _Shape(200_000, 128),
        _Shape(100_000, 32, (1, 1, 13), True),
    ),
    "cpu": (_Shape(100, 8), _Shape(100, 4, (1, 1, 5), True)),
    "host": (_Shape(2_000, 128),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    taps = math.prod(shape.kernel)
    fan_in = taps if shape.depthwise else taps * shape.channels
    size = (taps, shape.channels) if shape.depthwise else (shape.channels, taps, shape.channels)
    weight = parameter(*size, std=fan_in**-0.5)
    eager, gathered = _ours(shape, "eager"), _gather_depthwise if shape.depthwise else _gather
    implementations = {
        "vitrail": Implementation(_ours(shape, "auto")),
        "eager": Implementation(eager),
        "gather": Implementation(gathered),
        "eager compiled": compiled(eager),
        "gather compiled": compiled(gathered),
    }
    if not shape.depthwise:
        implementations["index_add"] = Implementation(_index_add, _pairs)
        implementations["index_add compiled"] = compiled(_index_add, _pairs)
    features = parameter(shape.n_voxels, shape.channels)
    inputs = (features, weight, _table(shape))
    return KernelCase("sparse_conv", str(shape), inputs, eager, implementations, needed=_present)


def _present(features: Tensor, weight: Tensor, table: Tensor) -> float:
    """How many of the neighbours are there."""
    return (table >= 0).float().mean().item()


def _table(shape: _Shape) -> Input:
    """Row of the neighbour under every tap, (taps, N), int32, -1 where there is none."""

    def draw(generator: torch.Generator) -> Tensor:
        return submanifold_table(scan_keys(shape.n_voxels, generator), GRID, shape.kernel).forward

    return Input(draw, per_image=False)


def _ours(shape: _Shape, backend: str) -> Callable[..., Tensor]:
    function = depthwise_sparse_conv if shape.depthwise else sparse_conv

    def run(features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        return function(features, weight, NeighbourTable(table, table.flip(0)), backend=backend)

    return run


def _rows(features: Tensor, table: Tensor) -> Tensor:
    """All neighbours of all voxels, (taps, N, C), zeros where there is none."""
    return torch.cat((features, features.new_zeros(1, features.shape[1])))[table.long()]


def _gather(features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Gathers all taps at once, for one large matrix product in the features' dtype."""
    columns = _rows(features, table).transpose(0, 1).flatten(1)  # (N, taps * C)
    return columns @ weight.flatten(1).t()


def _gather_depthwise(features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return (_rows(features, table) * weight[:, None]).sum(0)


def _pairs(features: Tensor, weight: Tensor, table: Tensor) -> tuple[Any, ...]:
    """For each tap the voxels that have a neighbour there, and these neighbours."""
    outputs = [(rows >= 0).nonzero()[:, 0] for rows in table]
    return features, weight, outputs, [rows[found].long() for rows, found in zip(table, outputs, strict=True)]


def _index_add(features: Tensor, weight: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """Gathers, multiplies and adds tap by tap, without the neighbours that are absent; sums in float32."""
    out = features.new_zeros(features.shape, dtype=torch.float32)
    for tap, (to, rows) in enumerate(zip(outputs, inputs, strict=True)):
        out = out.index_add(0, to, (features[rows] @ weight[:, tap].t()).float())
    return out.to(features.dtype)
