"""Triton kernels that find windows and parts in sorted window numbers: whole numbers only, equal to `windows.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch
from vitrail.kernels._common.triton import bisect

_ROWS = 128


@triton.jit(do_not_specialize=["n_voxels", "steps", "small", "bundle", "chunk_size"])
def _windows_kernel(
    ids_ptr, sorted_ptr, order_ptr, starts_ptr, ends_ptr, begins_ptr, n_voxels, steps, small, bundle, chunk_size,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Order, starts and ends of windows, and whether a part begins at a position."""
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = positions < n_voxels
    ids = tl.load(ids_ptr + positions, mask=exists, other=0)
    starts = bisect(ids_ptr, n_voxels, ids, steps, False)
    ends = bisect(ids_ptr, n_voxels, ids, steps, True)
    size, offset = ends - starts, positions - starts
    begins_chunk = (offset % chunk_size == 0) & ((offset == 0) | (size - offset >= chunk_size // 2))
    ids_before = tl.load(ids_ptr + positions - 1, mask=exists & (positions > 0), other=0)
    before = bisect(ids_ptr, n_voxels, ids_before, steps, False)
    others = (positions == 0) | (positions - before > small) | (before // bundle != positions // bundle)
    begins = tl.where(size > small, begins_chunk, (offset == 0) & others)
    tl.store(order_ptr + positions, tl.load(sorted_ptr + positions, mask=exists, other=0).to(tl.int32), mask=exists)
    tl.store(starts_ptr + positions, starts, mask=exists)
    tl.store(ends_ptr + positions, ends, mask=exists)
    tl.store(begins_ptr + positions, begins.to(tl.int32), mask=exists)


@triton.jit(do_not_specialize=["n_voxels"])
def _parts_kernel(starts_ptr, ends_ptr, begins_ptr, rank_ptr, parts_ptr, n_voxels, ROWS: tl.constexpr):
    """Rows of the parts that begin at some positions, and the end of the parts before them."""
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = positions < n_voxels
    begins = tl.load(begins_ptr + positions, mask=exists, other=0) != 0
    rank = tl.load(rank_ptr + positions, mask=exists, other=0)
    row = parts_ptr + rank * 4
    tl.store(row, positions, mask=begins)
    tl.store(row + 2, tl.load(starts_ptr + positions, mask=begins, other=0), mask=begins)
    tl.store(row + 3, tl.load(ends_ptr + positions, mask=begins, other=0), mask=begins)
    tl.store(row - 3, positions, mask=begins & (rank > 1))
    is_last = positions == n_voxels - 1
    tl.store(row + 1, positions + 1, mask=is_last)
    tl.store(parts_ptr + tl.zeros_like(positions), rank, mask=is_last)


def find_windows(
    ids: Tensor, order: Tensor, small: int, bundle: int, chunk_size: int, most_parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Windows` of sorted numbers (N,), N at least 1, and of the order that sorts them, int64."""
    n_voxels = len(ids)
    found = torch.empty((4, n_voxels), dtype=torch.int32, device=ids.device)
    parts = torch.zeros((1 + most_parts, 4), dtype=torch.int32, device=ids.device)
    grid = (triton.cdiv(n_voxels, _ROWS),)
    launch(
        _windows_kernel, grid, ids, order, *found, n_voxels, n_voxels.bit_length(), small, bundle, chunk_size,
        ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    rank = found[3].cumsum(0, dtype=torch.int32)
    launch(_parts_kernel, grid, *found[1:], rank, parts, n_voxels, ROWS=_ROWS, num_warps=4)
    return found[0], found[1], found[2], parts
