"""Which voxels share a window: an order in which windows are contiguous, made once and used by many layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Partition of N voxels into windows; every tensor is (N,), int32.

    Attributes:
        order: Voxels sorted by window; `order[p]` is the voxel at position p.
        starts: First position of the window that position p belongs to.
        ends: One past the last position of that window.
    """

    order: Tensor
    starts: Tensor
    ends: Tensor


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
    starts = torch.searchsorted(ids, ids, out_int32=True)
    ends = torch.searchsorted(ids, ids, out_int32=True, right=True)
    return Windows(order.int(), starts, ends)
