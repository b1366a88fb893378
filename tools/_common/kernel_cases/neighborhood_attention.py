"""NAT's attention of every token to its neighborhood, from (B, H, W, heads, D) to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.kernels.neighborhood_attention import neighborhood_attention
from vitrail.kernels.neighborhood_attention.op import HAS_NATTEN
from vitrail.kernels.neighborhood_attention.reference import axis_neighborhood
from vitrail.tools._common.kernel_cases.common import (
    Implementation,
    KernelCase,
    block_mask,
    compiled,
    flex,
    normal,
    parameter,
)


class NeighborhoodShape(NamedTuple):
    """Size of a layer, and the order in which flex_attention gets its tokens: by rows, or by tiles."""

    batch: int
    height: int
    width: int
    heads: int
    dim: int
    kernel: int = 7
    dilation: int = 1
    stride: int = 1
    rpb: bool = False
    tile: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = f"B{self.batch} {self.height}x{self.width}x{self.heads * self.dim} h{self.heads} k{self.kernel}"
        text += f" d{self.dilation}" * (self.dilation > 1) + f" s{self.stride}" * (self.stride > 1)
        return text + " rpb" * self.rpb


# The stages of NAT at 224 pixels and the first in detection; then dilation, stride and bias.
_SHAPES = {
    "gpu": (
        NeighborhoodShape(64, 56, 56, 2, 32),
        NeighborhoodShape(64, 28, 28, 4, 32),
        NeighborhoodShape(64, 14, 14, 8, 32),
        NeighborhoodShape(2, 200, 336, 2, 32, tile=(8, 16)),
        NeighborhoodShape(64, 56, 56, 2, 32, dilation=8),
        NeighborhoodShape(64, 56, 56, 2, 32, stride=4),
        NeighborhoodShape(64, 56, 56, 2, 32, rpb=True),
    ),
    "cpu": (
        NeighborhoodShape(2, 9, 8, 2, 16, kernel=3, rpb=True, tile=(3, 4)),
        NeighborhoodShape(1, 9, 10, 1, 16, kernel=3, dilation=2, stride=2),
        NeighborhoodShape(1, 6, 7, 1, 16, kernel=3, rpb=True),
    ),
    "host": (NeighborhoodShape(8, 7, 7, 16, 32, rpb=True),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: NeighborhoodShape) -> KernelCase:
    image = normal(shape.batch, shape.height, shape.width, shape.heads, shape.dim)
    span = 2 * shape.kernel - 1
    eager = _ours(shape, "eager")
    implementations = {"vitrail": Implementation(_ours(shape, "auto")), "eager": Implementation(eager)}
    if HAS_NATTEN:
        implementations["NATTEN"] = Implementation(_ours(shape, "natten"))
    implementations["flex_attention"] = _flex(shape)
    implementations["eager compiled"] = compiled(eager)
    inputs = (image, image, image, *[parameter(shape.heads, span, span)] * shape.rpb)
    return KernelCase("neighborhood_attention", str(shape), inputs, eager, implementations)


def _ours(shape: NeighborhoodShape, backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        out = neighborhood_attention(
            q,
            k,
            v,
            kernel_size=shape.kernel,
            stride=shape.stride,
            dilation=shape.dilation,
            rpb=rpb,
            backend=backend,
        )
        assert isinstance(out, Tensor)
        return out

    return run


def _flex(shape: NeighborhoodShape) -> Implementation:
    """flex_attention with the block mask made in advance, on tokens that lie in the order that suits it."""
    from torch.nn.attention.flex_attention import flex_attention

    reorders = shape.tile is not None or shape.dilation > 1

    def prepare(q: Tensor, k: Tensor, v: Tensor, *rpb: Tensor) -> tuple[Any, ...]:
        tokens = (x.flatten(1, 2) for x in (q, k, v))
        if reorders:
            order = _order(shape, q.device)
            tokens = (x[:, order].transpose(1, 2).contiguous().transpose(1, 2) for x in tokens)
        return *tokens, _places(shape, q.device), neighborhood_mask(shape, q.device), *rpb

    def run(q: Tensor, k: Tensor, v: Tensor, places: Tensor, mask: Any, rpb: Tensor | None = None) -> Tensor:
        def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + rpb[head, step(0, query, key), step(1, query, key)]

        def step(axis: int, query: Tensor, key: Tensor) -> Tensor:
            # Distances of pairs that the mask hides may lie outside the table.
            distance = (places[axis, key] - places[axis, query]) // shape.dilation
            return distance.clamp(1 - shape.kernel, shape.kernel - 1) + shape.kernel - 1

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, N, D)
        out = flex_attention(q, k, v, score_mod=None if rpb is None else bias, block_mask=mask).transpose(1, 2)
        return out if reorders else out.contiguous()

    def finish(out: Tensor) -> Tensor:
        if reorders:
            out = out[:, _order(shape, out.device).argsort()]
        return out.unflatten(1, (shape.height, shape.width))

    return flex(run, prepare, finish=finish, whole_job=not reorders)


def _order(shape: NeighborhoodShape, device: torch.device) -> Tensor:
    """Raster index of every token in flex_attention's order, (N,): groups of the dilation together, or tiles."""
    index = torch.arange(shape.height * shape.width, device=device)
    row, column = index // shape.width, index % shape.width
    height, width = shape.tile or (shape.height, shape.width)
    group = row % shape.dilation * shape.dilation + column % shape.dilation
    tile = row // height * shape.width + column // width
    return ((group * len(index) + tile) * len(index) + index).argsort()


def _places(shape: NeighborhoodShape, device: torch.device) -> Tensor:
    """Row and column of every token in flex_attention's order, (2, N), int32."""
    order = _order(shape, device)
    return torch.stack((order // shape.width, order % shape.width)).int()


def neighborhood_mask(shape: NeighborhoodShape, device: torch.device) -> Any:
    """The block mask of neighborhoods; a key is visible between the first and last row and column of its query."""
    place, order = _places(shape, device).long(), _order(shape, device)
    near = [
        axis_neighborhood(n, shape.kernel, shape.stride, shape.dilation, False, device).position
        for n in (shape.height, shape.width)
    ]
    rows, columns = (table[place[axis]] for axis, table in enumerate(near))  # (N, kernel) each
    first_row, last_row, first_column, last_column = (
        x.int() for x in (rows[:, 0], rows[:, -1], columns[:, 0], columns[:, -1])
    )
    row, column = place.int()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (row[key] >= first_row[query]) & (row[key] <= last_row[query])
        inside = inside & (column[key] >= first_column[query]) & (column[key] <= last_column[query])
        if shape.dilation == 1:
            return inside
        group = (row[key] - row[query]) % shape.dilation + (column[key] - column[query]) % shape.dilation
        return inside & (group == 0)

    keys = order.argsort()[rows[:, :, None] * shape.width + columns[:, None, :]].flatten(1)  # (N, kernel^2)
    queries = torch.arange(len(order), device=device)[:, None].expand_as(keys)
    return block_mask(len(order), visible, queries.flatten(), keys.flatten(), torch.zeros_like(keys).flatten())
