"""What the operators' kernels share: the softmax over tiles, and what finds its weights again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from vitrail.kernels._common.triton import (
    empty_statistics,
    finite,
    load_statistics,
    online_softmax,
    softmax_statistics,
    statistics_of,
    store_statistics,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, KEYS, TILE = 64, 128, 16


@triton.jit
def _sums_kernel(
    logits_ptr, stats_ptr, out_ptr, factor,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Sums of the rows' weights, which another pass finds from the statistics that a first one leaves."""
    rows = tl.arange(0, ROWS)
    at = rows[:, None] * KEYS + tl.arange(0, TILE)[None, :]
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, KEYS, TILE):
        _weights, _decay, maximum, total = online_softmax(tl.load(logits_ptr + start + at), maximum, total, factor)
    shift, inverse = softmax_statistics(finite(maximum), total, dtype)
    stats = statistics_of(stats_ptr, tl.program_id(0), ROWS, dtype) + rows
    store_statistics(stats, ROWS, shift, inverse, total, rows < ROWS, dtype)
    shift, inverse, _correction = load_statistics(stats, ROWS, rows < ROWS, dtype)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, KEYS, TILE):
        weights = tl.exp2(tl.load(logits_ptr + start + at) * factor - shift[:, None])
        sums += tl.sum(weights * inverse[:, None], 1)
    tl.store(out_ptr + rows, sums)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float16, 1e-4)], ids=str)
def test_weights_that_are_found_again_sum_to_one(dtype: torch.dtype, allowed: float) -> None:
    """At logits of some 100, whose log-sum-exp in float32 is off by 4e-6."""
    logits = 100 + torch.randn(ROWS, KEYS, device=DEVICE)
    found = torch.full((ROWS,), torch.nan, device=DEVICE)
    stats = empty_statistics(1, ROWS, torch.empty(0, dtype=dtype, device=DEVICE))
    _sums_kernel[(1,)](logits, stats, found, 1.5, ROWS, KEYS, TILE, getattr(tl, str(dtype).split(".")[1]))
    assert (found - 1).abs().max() < allowed
