"""Where voxels are and which of them are neighbours: sorted keys, looked up by binary search.

A site (batch, z, y, x) of a grid (D, H, W) has the key `((batch * D + z) * H + y) * W + x`. Sites are kept sorted by
key, which is the lexicographic order of their coordinates, and distinct; the row of a site is its rank.

Numbers such as strides enter as Python's, not as tensors made from lists: moving those to a device waits for it.

On CUDA devices the kernels of `triton_sites.py` do what is written here in PyTorch, unless VITRAIL_BACKEND is "eager".
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.kernels._common.dispatch import runs_kernels

Triple = tuple[int, int, int]


class NeighbourTable(NamedTuple):
    """Which input site every tap of a kernel meets, for every output site.

    Attributes:
        forward: Row of the input site, -1 where there is none, (taps, outputs), int32. Taps run over (z, y, x), x last.
        backward: Row of the output site that an input site reaches through a tap, or -1, (taps, inputs), int32.
    """

    forward: Tensor
    backward: Tensor


def site_keys(coords: Tensor, shape: Sequence[int]) -> Tensor:
    """Keys of sites: (..., 4) integers (batch, z, y, x) in a grid `shape` (D, H, W) -> (...), int64."""
    batch, z, y, x = coords.long().unbind(-1)
    return ((batch * shape[0] + z) * shape[1] + y) * shape[2] + x


def site_coords(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Sites of keys: (...) -> (..., 4), int64, contiguous; the inverse of `site_keys`."""
    if runs_kernels(keys):
        from vitrail.kernels.sparse_conv.triton_sites import coords_of

        return coords_of(keys.flatten(), shape).view(*keys.shape, 4)
    rest, x = keys // shape[2], keys % shape[2]
    rest, y = rest // shape[1], rest % shape[1]
    return torch.stack((rest // shape[0], rest % shape[0], y, x), -1)


def point_keys(
    points: Tensor, batch: Tensor, low: Sequence[float], voxel_size: Sequence[float], shape: Sequence[int]
) -> Tensor:
    """Keys of the sites where points lie, -1 for points outside of the grid or with a value that is not finite.

    Args:
        points: (P, F), floating point, (x, y, z) first.
        batch: Grid of each point, (P,), int64.
        low: Lower corner (x, y, z) of the grid.
        voxel_size: Edges of a site along (x, y, z).
        shape: Grid (D, H, W).

    Returns:
        (P,), int64.
    """
    if runs_kernels(points) and points.dtype == torch.float32:
        from vitrail.kernels.sparse_conv.triton_sites import keys_of_points

        return keys_of_points(points.contiguous(), batch, low, voxel_size, shape)
    axes = zip(points[:, :3].unbind(1), low, voxel_size, strict=True)
    x, y, z = (((axis - start) / size).floor() for axis, start, size in axes)
    inside = points.isfinite().all(1)
    for axis, size in zip((z, y, x), shape, strict=True):
        # Compared as floats: what does not fit into an integer is outside of the grid.
        inside = inside & (axis >= 0) & (axis < size)
    places = torch.stack([torch.where(inside, axis, 0).long() for axis in (z, y, x)], -1)
    return torch.where(inside, _keys_of(batch, places, shape), -1)


class KeyRuns(NamedTuple):
    """Sorted keys in runs of equal ones; negative entries belong to none.

    Attributes:
        keys: The distinct keys, (N,).
        first: Position of each run's first entry, (N,), int64.
        run: Run of every entry that is not negative, (P,), int64, ascending.
    """

    keys: Tensor
    first: Tensor
    run: Tensor


def find_runs(sorted_keys: Tensor) -> KeyRuns:
    """Runs in ascending keys (int64); waits for the device once."""
    if sorted_keys.numel() == 0:
        return KeyRuns(sorted_keys, sorted_keys, sorted_keys)
    is_key = sorted_keys >= 0
    is_new = is_key.clone()
    is_new[1:] &= sorted_keys[1:] != sorted_keys[:-1]
    rank = is_new.cumsum(0)
    n_runs, n_keys = torch.stack((rank[-1], is_key.sum())).tolist()
    first = torch.searchsorted(rank, torch.arange(1, n_runs + 1, device=rank.device))
    return KeyRuns(sorted_keys[first], first, rank[len(rank) - n_keys :] - 1)


def find_keys(keys: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Rows of the `wanted` keys among the sorted distinct `keys`, -1 where absent or not `valid`; int32."""
    if keys.numel() == 0:
        return torch.full(wanted.shape, -1, dtype=torch.int32, device=wanted.device)
    # searchsorted wants its queries contiguous.
    row = torch.searchsorted(keys, wanted.contiguous()).clamp_(max=len(keys) - 1)
    found = valid & (keys[row] == wanted)
    return torch.where(found, row, -1).int()


def submanifold_table(keys: Tensor, shape: Sequence[int], kernel_size: Sequence[int]) -> NeighbourTable:
    """Neighbours for a convolution whose outputs stand at its inputs' sites: tap k meets `p + k - kernel_size // 2`.

    Args:
        keys: Sorted distinct keys, (N,).
        shape: Grid (D, H, W).
        kernel_size: Taps along (z, y, x), odd.

    Raises:
        ValueError: A tap count is even.
    """
    if any(size % 2 == 0 for size in kernel_size):
        raise ValueError(f"submanifold_table: kernel_size is {tuple(kernel_size)}; allowed: odd sizes")
    first = [-(size // 2) for size in kernel_size]
    if runs_kernels(keys):
        return _fused_table(keys, shape, keys, shape, kernel_size, (1, 1, 1), first)
    coords = site_coords(keys, shape)
    offsets = _affine(_taps(kernel_size, keys.device), (1, 1, 1), first)
    table = _look_up(keys, shape, coords[:, 0], coords[:, 1:] + offsets[:, None])
    # If a site meets its neighbour at tap k, the neighbour meets it at the opposite tap.
    return NeighbourTable(table, table.flip(0))


def strided_sites(
    keys: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Triple]:
    """Sites that a strided convolution reaches: those with at least one input site under their kernel.

    Args:
        keys: Sorted distinct keys of the inputs, (N,).
        shape: Their grid (D, H, W).
        kernel_size: Taps along (z, y, x).
        stride: Steps along (z, y, x).
        padding: Empty sites before and after the grid along (z, y, x).

    Returns:
        Sorted distinct keys of the outputs and their grid. Waits for the device once, for the number of outputs.

    Raises:
        ValueError: The kernel is larger than the padded grid.
    """
    sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel_size, stride, padding, strict=True)]
    if min(sizes) < 1:
        raise ValueError(
            f"strided_sites: kernel_size is {tuple(kernel_size)} with padding {tuple(padding)}; "
            f"it must fit into the grid {tuple(shape)}"
        )
    out_shape = (sizes[0], sizes[1], sizes[2])
    # At most this many outputs along an axis have the same input under their kernel.
    reach = [math.ceil(k / s) for k, s in zip(kernel_size, stride, strict=True)]
    found = _reached_keys(keys, shape, out_shape, kernel_size, stride, padding, reach)
    return find_runs(found.sort().values).keys, out_shape


def _reached_keys(
    keys: Tensor,
    shape: Sequence[int],
    out_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    reach: Sequence[int],
) -> Tensor:
    """Keys of the outputs that each input reaches, -1 where there are fewer than `reach` allows, one after another."""
    if runs_kernels(keys):
        from vitrail.kernels.sparse_conv.triton_sites import reached_keys

        return reached_keys(keys, shape, out_shape, kernel_size, stride, padding, reach)
    coords = site_coords(keys, shape)
    padded = _affine(coords[:, 1:], (1, 1, 1), padding)
    last = torch.stack([axis // step for axis, step in zip(padded.unbind(-1), stride, strict=True)], -1)
    outputs = last - _taps(reach, keys.device)[:, None]  # (candidates, N, 3)
    taps = padded - _affine(outputs, stride, (0, 0, 0))
    valid = _inside(taps, kernel_size) & _inside(outputs, out_shape)
    return torch.where(valid, _keys_of(coords[:, 0], outputs, out_shape), -1).flatten()


def strided_table(
    keys: Tensor,
    shape: Sequence[int],
    out_keys: Tensor,
    out_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> NeighbourTable:
    """Neighbours for a strided convolution: output p meets `p * stride - padding + k` at tap k.

    See `strided_sites` for the arguments and for `out_keys` and `out_shape`.
    """
    first_tap = [-size for size in padding]
    if runs_kernels(keys):
        return _fused_table(out_keys, out_shape, keys, shape, kernel_size, stride, first_tap)
    coords = site_coords(out_keys, out_shape)
    first = _affine(coords[:, 1:], stride, first_tap)
    table = _look_up(keys, shape, coords[:, 0], first + _taps(kernel_size, keys.device)[:, None])
    return NeighbourTable(table, _transpose(table, len(keys)))


def _fused_table(*arguments: Any) -> NeighbourTable:
    from vitrail.kernels.sparse_conv.triton_sites import neighbour_table

    return NeighbourTable(*neighbour_table(*arguments))


def _transpose(table: Tensor, n_inputs: int) -> Tensor:
    """(taps, outputs) rows of inputs -> (taps, inputs) rows of outputs: at one tap no two outputs share an input."""
    taps, n_outputs = table.shape
    padded = torch.full((taps, n_inputs + 1), -1, dtype=torch.int32, device=table.device)
    outputs = torch.arange(n_outputs, dtype=torch.int32, device=table.device).expand(taps, -1)
    # Taps without an input write to the last column, which is dropped.
    padded.scatter_(1, torch.where(table < 0, n_inputs, table).long(), outputs)
    return padded[:, :n_inputs].contiguous()


def _taps(kernel_size: Sequence[int], device: torch.device) -> Tensor:
    """All (z, y, x) from 0 to below `kernel_size`, x fastest: (taps, 3)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in kernel_size))


def _affine(x: Tensor, factors: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """`x * factors + shifts` along the last axis, which is (z, y, x)."""
    axes = zip(x.unbind(-1), factors, shifts, strict=True)
    return torch.stack([axis * factor + shift for axis, factor, shift in axes], -1)


def _look_up(keys: Tensor, shape: Sequence[int], batch: Tensor, positions: Tensor) -> Tensor:
    """Rows of the sites at (batch, z, y, x), -1 where none is: (N,), (taps, N, 3) -> (taps, N)."""
    return find_keys(keys, _keys_of(batch, positions, shape), _inside(positions, shape))


def _keys_of(batch: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    z, y, x = positions.unbind(-1)
    return ((batch * shape[0] + z) * shape[1] + y) * shape[2] + x


def _inside(positions: Tensor, shape: Sequence[int]) -> Tensor:
    axes = zip(positions.unbind(-1), shape, strict=True)
    return functools.reduce(operator.and_, [(axis >= 0) & (axis < size) for axis, size in axes])
