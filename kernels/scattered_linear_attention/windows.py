"""Which voxels share a window: an order in which windows are contiguous, made once and used by many layers.

The order is also cut into the parts that the fused kernels work on, one program a part: a part of a crowded window, a
whole window, or some small ones. Their number depends on the data, and is left on the device; `most_parts` bounds it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.kernels._common.dispatch import runs_kernels

_LEAST_CHUNK = 256  # positions of a crowded window's part: smaller parts would move more sums than rows
_MOST_CHUNKS = 1024
_SMALL = 32  # positions of a small window: so few need no sums
_BUNDLE = 64  # positions over which the small windows of a part begin


class Windows(NamedTuple):
    """Partition of N voxels into windows, int32.

    Attributes:
        order: Voxels sorted by window; `order[p]` is the voxel at position p, (N,).
        starts: First position of the window that position p belongs to, (N,).
        ends: One past the last position of that window, (N,).
        parts: The number of parts, then for each its first position, one past its last, and start and end of the window
            of the first: (1 + `most_parts(N)`, 4); 0 behind the last.
    """

    order: Tensor
    starts: Tensor
    ends: Tensor
    parts: Tensor


def chunk_size(n_voxels: int) -> int:
    """Positions, an even number, of a part of a crowded window; the last part has from half to one and a half of it."""
    return 32 * math.ceil(max(_LEAST_CHUNK, n_voxels / _MOST_CHUNKS) / 32)


def most_parts(n_voxels: int) -> int:
    """How many parts there can be: those of crowded windows, whole ones, and bundles of small ones between them."""
    return n_voxels // chunk_size(n_voxels) + 2 * (n_voxels // (_SMALL + 1)) + n_voxels // _BUNDLE + 2


def sort_windows(window_ids: Tensor) -> Windows:
    """Partitions voxels by their window: (N,) integers, equal inside a window. Does not wait for the device.

    Voxels of a window keep their order, so that sums over them always run in the same one.

    Raises:
        TypeError: `window_ids` are not integers.
        ValueError: `window_ids` have more than one dimension.
    """
    if window_ids.is_floating_point() or window_ids.is_complex():
        raise TypeError(f"sort_windows: window_ids is {window_ids.dtype}; allowed: integer dtypes")
    if window_ids.dim() != 1:
        raise ValueError(f"sort_windows: window_ids has shape {tuple(window_ids.shape)}; expected 1 dimension, (N,)")
    ids, order = window_ids.sort(stable=True)
    if len(ids) > 0 and runs_kernels(ids):
        from vitrail.kernels.scattered_linear_attention.triton_windows import find_windows

        return Windows(*find_windows(ids, order, _SMALL, _BUNDLE, chunk_size(len(ids)), most_parts(len(ids))))
    starts = torch.searchsorted(ids, ids, out_int32=True)
    ends = torch.searchsorted(ids, ids, out_int32=True, right=True)
    return Windows(order.int(), starts, ends, _parts(starts, ends))


def _parts(starts: Tensor, ends: Tensor) -> Tensor:
    """`Windows.parts`."""
    n = len(starts)
    parts = torch.zeros(1 + most_parts(n), 4, dtype=torch.int32, device=starts.device)
    if n == 0:
        return parts
    chunk = chunk_size(n)
    positions = torch.arange(n, dtype=torch.int32, device=starts.device)
    size, offset = ends - starts, positions - starts
    begins_chunk = (offset % chunk == 0) & ((offset == 0) | (size - offset >= chunk // 2))
    before = torch.cat((starts[:1], starts[:-1]))  # where the window of the position before begins
    is_apart = (positions == 0) | (positions - before > _SMALL) | (before // _BUNDLE != positions // _BUNDLE)
    begins_bundle = (offset == 0) & is_apart
    begins = torch.where(size > _SMALL, begins_chunk, begins_bundle)
    following = torch.cat((torch.where(begins, positions, n)[1:], ends.new_full((1,), n)))
    part_ends = following.flip(0).cummin(0).values.flip(0)
    rank = begins.cumsum(0)
    # Where no part begins, a row behind all others is written, which is dropped.
    parts = torch.cat((parts, parts[:1]))
    row = torch.where(begins, rank, len(parts) - 1)
    parts[row] = torch.stack((positions, part_ends, starts, ends), 1)
    parts[0, 0] = rank[-1]
    return parts[:-1]
