"""ScatterFormer's attention inside windows that hold any number of voxels, from (N, heads, D) to the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.kernels.scattered_linear_attention import (
    Windows,
    scattered_linear_attention,
    scattered_linear_attention_packed,
    sort_windows,
)
from vitrail.kernels.sparse_conv import site_coords
from vitrail.tools._common.kernel_cases.common import Implementation, Input, KernelCase, compiled, parameter
from vitrail.tools._common.kernel_cases.voxels import GRID, scan_keys

_WINDOW = 12  # voxels along y and x
_EPS = 1e-6


class _Shape(NamedTuple):
    n_voxels: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"N{self.n_voxels} {self.heads * self.dim} h{self.heads}"


_SHAPES = {
    "gpu": (_Shape(50_000, 4, 32), _Shape(100_000, 4, 32), _Shape(200_000, 4, 32)),
    "cpu": (_Shape(100, 2, 16),),
    "host": (_Shape(2_000, 4, 32),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    voxels = parameter(shape.n_voxels, shape.heads, shape.dim)
    return KernelCase(
        "scattered_linear_attention",
        str(shape),
        (voxels, voxels, voxels, _window_ids(shape)),
        _reference,
        {
            "vitrail": Implementation(_ours, _sort),
            "vitrail packed": Implementation(_ours_packed, _sort_packed),
            "eager": Implementation(_eager, _sort),
            "index_add": Implementation(_index_add, _number),
            "padded windows": Implementation(_padded, _number),
            "index_add compiled": compiled(_index_add, _number),
            "padded windows compiled": compiled(_padded, _number),
        },
    )


def _window_ids(shape: _Shape) -> Input:
    """The window of every voxel, (N,): columns of the grid of full height."""

    def draw(generator: torch.Generator) -> Tensor:
        scan, _, y, x = site_coords(scan_keys(shape.n_voxels, generator), GRID).unbind(1)
        return (scan * GRID[1] + y // _WINDOW) * GRID[2] + x // _WINDOW

    return Input(draw, per_image=False)


def _sort(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return q, k, v, *sort_windows(ids)


def _sort_packed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return torch.stack((q, k, v), 1), *sort_windows(ids)


def _reference(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return _eager(*_sort(q, k, v, ids))


def _ours(q: Tensor, k: Tensor, v: Tensor, *windows: Tensor) -> Tensor:
    return scattered_linear_attention(q, k, v, Windows(*windows), eps=_EPS)


def _ours_packed(qkv: Tensor, *windows: Tensor) -> Tensor:
    return scattered_linear_attention_packed(qkv, Windows(*windows), eps=_EPS)


def _eager(q: Tensor, k: Tensor, v: Tensor, *windows: Tensor) -> Tensor:
    return scattered_linear_attention(q, k, v, Windows(*windows), eps=_EPS, backend="eager")


def _number(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> tuple[Any, ...]:
    """Also numbers the windows from 0, (N,), and the places inside them, (N,); how many there are of both."""
    _, window, counts = ids.unique(return_inverse=True, return_counts=True)
    order = window.argsort(stable=True)
    place = torch.empty_like(window)
    place[order] = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[window[order]]
    return q, k, v, window, place, len(counts), int(counts.max())


def _index_add(
    q: Tensor, k: Tensor, v: Tensor, window: Tensor, place: Tensor, n_windows: int, most: int
) -> Tensor:  # fmt: skip
    """Adds every voxel's product of key and value to those of its window."""
    queries, keys, values = q.relu().float(), k.relu().float(), v.float()
    products = keys[..., None] * values[..., None, :]  # (N, heads, D, D)
    products = products.new_zeros(n_windows, *products.shape[1:]).index_add(0, window, products)
    key_sums = keys.new_zeros(n_windows, *keys.shape[1:]).index_add(0, window, keys)
    numerator = (queries[..., None, :] @ products[window])[..., 0, :]
    return (numerator / ((queries * key_sums[window]).sum(-1, keepdim=True) + _EPS)).to(q.dtype)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, window: Tensor, place: Tensor, n_windows: int, most: int
) -> Tensor:  # fmt: skip
    """Pads all windows to the fullest, for batched products."""
    slot = window * most + place

    def pad(x: Tensor) -> Tensor:
        rows = x.new_zeros(n_windows * most, *x.shape[1:], dtype=torch.float32).index_copy(0, slot, x.float())
        return rows.unflatten(0, (n_windows, most)).transpose(1, 2)  # (windows, heads, most, D)

    queries, keys, values = pad(q.relu()), pad(k.relu()), pad(v)
    denominator = (queries * keys.sum(2, keepdim=True)).sum(-1, keepdim=True) + _EPS
    out = queries @ (keys.transpose(2, 3) @ values) / denominator
    return out.transpose(1, 2).flatten(0, 1)[slot].to(q.dtype)
