"""Triton kernels that find sites and neighbours: each does at once what takes dozens of PyTorch calls on large tensors.

They hold no arithmetic of features, only whole numbers, and equal the PyTorch definitions in `sites.py` bit by bit,
save that a point within a rounding error of a voxel's border may fall on either side of it.

A table is found row by row: for a site and a (z, y) tap one binary search gives the place where the neighbours along x
would stand among the sorted keys, and from there on the taps along x only step forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch
from vitrail.kernels._common.triton import bisect

_ROWS = 128


@triton.jit
def _split(keys, depth, height, width):
    """(batch, z, y, x) of keys."""
    rows = keys // width
    planes = rows // height
    return planes // depth, planes % depth, rows % height, keys % width


@triton.jit(
    do_not_specialize=[
        "n_outputs", "n_inputs", "steps", "out_depth", "out_height", "out_width", "depth", "height", "width",
        "taps_y", "taps_x", "stride_z", "stride_y", "stride_x", "first_z", "first_y", "first_x",
    ]
)  # fmt: skip
def _table_kernel(
    out_keys_ptr, keys_ptr, forward_ptr, backward_ptr, n_outputs, n_inputs, steps,
    out_depth, out_height, out_width, depth, height, width, taps_y, taps_x,
    stride_z, stride_y, stride_x, first_z, first_y, first_x, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of the table for some outputs at all taps with one (z, y), and what they say about the inputs."""
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = outputs < n_outputs
    keys = tl.load(out_keys_ptr + outputs, mask=exists, other=0)
    batch, z, y, x = _split(keys, out_depth, out_height, out_width)
    z = z * stride_z + first_z + tl.program_id(1) // taps_y
    y = y * stride_y + first_y + tl.program_id(1) % taps_y
    x = x * stride_x + first_x
    inside = exists & (z >= 0) & (z < depth) & (y >= 0) & (y < height)
    wanted = ((batch * depth + z) * height + y) * width + x
    row = bisect(keys_ptr, n_inputs, wanted, steps, False)
    for tap_x in range(taps_x):
        met = tl.load(keys_ptr + row, mask=row < n_inputs, other=-1) == wanted
        met = met & (row < n_inputs)
        counts = met & inside & (x >= 0) & (x < width)
        tap = (tl.program_id(1) * taps_x + tap_x).to(tl.int64)
        tl.store(forward_ptr + tap * n_outputs + outputs, tl.where(counts, row, -1), mask=exists)
        tl.store(backward_ptr + tap * n_inputs + row, outputs, mask=counts)
        row += met.to(tl.int32)
        wanted += 1
        x += 1


@triton.jit(
    do_not_specialize=[
        "n_inputs", "depth", "height", "width", "out_depth", "out_height", "out_width", "taps_z", "taps_y", "taps_x",
        "stride_z", "stride_y", "stride_x", "pad_z", "pad_y", "pad_x", "reach_y", "reach_x",
    ]
)  # fmt: skip
def _reach_kernel(
    keys_ptr, found_ptr, n_inputs, depth, height, width, out_depth, out_height, out_width, taps_z, taps_y, taps_x,
    stride_z, stride_y, stride_x, pad_z, pad_y, pad_x, reach_y, reach_x, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys of the outputs that some inputs reach, the `program_id(1)`-th of each, -1 where there are fewer."""
    inputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = inputs < n_inputs
    batch, z, y, x = _split(tl.load(keys_ptr + inputs, mask=exists, other=0), depth, height, width)
    which = tl.program_id(1)
    out_z = (z + pad_z) // stride_z - which // (reach_x * reach_y)
    out_y = (y + pad_y) // stride_y - which // reach_x % reach_y
    out_x = (x + pad_x) // stride_x - which % reach_x
    counts = (out_z >= 0) & (out_z < out_depth) & (z + pad_z - out_z * stride_z < taps_z)
    counts = counts & (out_y >= 0) & (out_y < out_height) & (y + pad_y - out_y * stride_y < taps_y)
    counts = counts & (out_x >= 0) & (out_x < out_width) & (x + pad_x - out_x * stride_x < taps_x)
    keys = ((batch * out_depth + out_z) * out_height + out_y) * out_width + out_x
    tl.store(found_ptr + which.to(tl.int64) * n_inputs + inputs, tl.where(counts, keys, -1), mask=exists)


@triton.jit(do_not_specialize=["n_keys", "depth", "height", "width"])
def _coords_kernel(keys_ptr, coords_ptr, n_keys, depth, height, width, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_keys
    batch, z, y, x = _split(tl.load(keys_ptr + rows, mask=exists, other=0), depth, height, width)
    places = coords_ptr + rows.to(tl.int64) * 4
    tl.store(places, batch, mask=exists)
    tl.store(places + 1, z, mask=exists)
    tl.store(places + 2, y, mask=exists)
    tl.store(places + 3, x, mask=exists)


@triton.jit(
    do_not_specialize=[
        "n_points", "columns", "low_x", "low_y", "low_z", "size_x", "size_y", "size_z", "depth", "height", "width"
    ]
)  # fmt: skip
def _point_keys_kernel(
    points_ptr, batch_ptr, keys_ptr, n_points, columns, low_x, low_y, low_z, size_x, size_y, size_z,
    depth, height, width, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys of points' voxels, -1 for points outside of the grid or with a value that is not finite."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_points
    places = points_ptr + rows.to(tl.int64) * columns
    counts = exists
    for column in range(columns):
        counts = counts & (tl.abs(tl.load(places + column, mask=exists, other=0.0)) < float("inf"))
    x = tl.floor(tl.math.div_rn(tl.load(places, mask=exists, other=0.0) - low_x, size_x))
    y = tl.floor(tl.math.div_rn(tl.load(places + 1, mask=exists, other=0.0) - low_y, size_y))
    z = tl.floor(tl.math.div_rn(tl.load(places + 2, mask=exists, other=0.0) - low_z, size_z))
    # Compared as floats: what does not fit into an integer is outside of the grid.
    counts = counts & (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z >= 0) & (z < depth)
    x, y, z = tl.where(counts, x, 0.0), tl.where(counts, y, 0.0), tl.where(counts, z, 0.0)
    batch = tl.load(batch_ptr + rows, mask=exists, other=0)
    keys = ((batch * depth + z.to(tl.int64)) * height + y.to(tl.int64)) * width + x.to(tl.int64)
    tl.store(keys_ptr + rows, tl.where(counts, keys, -1), mask=exists)


def neighbour_table(
    out_keys: Tensor, out_shape: Sequence[int], keys: Tensor, shape: Sequence[int],
    kernel_size: Sequence[int], stride: Sequence[int], first: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both parts of a `NeighbourTable`: output p meets the input at `p * stride + first + k` at tap k."""
    taps, n_outputs, n_inputs = math.prod(kernel_size), len(out_keys), len(keys)
    forward = torch.empty((taps, n_outputs), dtype=torch.int32, device=keys.device)
    backward = torch.full((taps, n_inputs), -1, dtype=torch.int32, device=keys.device)
    if n_outputs > 0:
        launch(
            _table_kernel, (triton.cdiv(n_outputs, _ROWS), kernel_size[0] * kernel_size[1]),
            out_keys, keys, forward, backward, n_outputs, n_inputs, n_inputs.bit_length(), *out_shape, *shape,
            *kernel_size[1:], *stride, *first, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return forward, backward


def reached_keys(
    keys: Tensor, shape: Sequence[int], out_shape: Sequence[int],
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], reach: Sequence[int],
) -> Tensor:  # fmt: skip
    """Keys of the outputs that each input reaches, at most `reach` along (z, y, x), else -1: (candidates * N,)."""
    candidates = math.prod(reach)
    found = torch.empty(candidates * len(keys), dtype=torch.int64, device=keys.device)
    if len(keys) > 0:
        launch(
            _reach_kernel, (triton.cdiv(len(keys), _ROWS), candidates),
            keys, found, len(keys), *shape, *out_shape, *kernel_size, *stride, *padding, *reach[1:],
            ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return found


def coords_of(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """(N,) keys -> (N, 4), int64."""
    coords = torch.empty((len(keys), 4), dtype=torch.int64, device=keys.device)
    if len(keys) > 0:
        grid = (triton.cdiv(len(keys), _ROWS),)
        launch(_coords_kernel, grid, keys, coords, len(keys), *shape, ROWS=_ROWS, num_warps=4)
    return coords


def keys_of_points(
    points: Tensor, batch: Tensor, low: Sequence[float], voxel_size: Sequence[float], shape: Sequence[int]
) -> Tensor:
    """Keys of the voxels of contiguous float32 points (P, F), -1 where there is none: (P,), int64."""
    keys = torch.empty(len(points), dtype=torch.int64, device=points.device)
    if len(points) > 0:
        launch(
            _point_keys_kernel, (triton.cdiv(len(points), _ROWS),),
            points, batch, keys, *points.shape, *low, *voxel_size, *shape, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return keys
