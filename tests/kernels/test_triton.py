"""What the operators' kernels share: the softmax over tiles, what finds its weights again, and sums of parts."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from _seeds import seeds
from torch import Tensor

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
    sum_of_parts,
    sums_of_pairs,
)
from vitrail.kernels.neighborhood_attention import neighborhood_attention
from vitrail.kernels.routing_attention import routing_attention
from vitrail.kernels.window_attention import window_attention

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", seeds(12))
def test_sums_of_parts_and_of_pairs(seed: int, dtype: torch.dtype) -> None:
    """Any number of parts, none too, of any shape; what lies behind them is not read."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    n_parts, shape = draw.choice([0, 1, 2, 63, 64, 65, 300]), [draw.randint(1, 9) for _ in range(draw.randint(1, 3))]
    dim = draw.choice([1, 3, 16, 32])
    rows = torch.randn(n_parts + 1, *shape, 2, dim, generator=generator).to(DEVICE)
    rows[n_parts:] = torch.nan
    parts = rows[:n_parts]
    wanted = parts.double().sum(0)
    allowed = max(torch.finfo(dtype).eps, 1e-6)
    total = sum_of_parts(parts, dtype)
    assert total.dtype == dtype
    torch.testing.assert_close(total.double(), wanted, rtol=allowed, atol=1e-5)
    first, second = sums_of_pairs(parts, dtype, torch.float32)
    assert (first.dtype, second.dtype) == (dtype, torch.float32)
    assert first.is_contiguous()
    assert second.is_contiguous()
    torch.testing.assert_close(first.double(), wanted[..., 0, :], rtol=allowed, atol=1e-5)
    torch.testing.assert_close(second.double(), wanted[..., 1, :], rtol=1e-6, atol=1e-5)
    assert torch.equal(first, sums_of_pairs(parts, dtype, dtype)[0])


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "window": partial(window_attention, window_size=4),
    "neighborhood": partial(neighborhood_attention, kernel_size=7),
    "routing": partial(routing_attention, routes=torch.tensor([2, 3], device=DEVICE).expand(1, 4, 2), n_regions=2),
}


@pytest.mark.parametrize("name", _OPERATORS)
def test_gradients_of_pads_have_their_dtypes(name: str) -> None:
    """Which need not be the maps', nor one."""
    q, k, v = (torch.randn(1, 5, 5, 2, 16, device=DEVICE, dtype=torch.float16) for _ in range(3))
    dtypes = torch.float32, torch.float16
    found = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        pads = [torch.randn(2, 16, device=DEVICE).to(dtype).requires_grad_() for dtype in dtypes]
        out = _OPERATORS[name](q, k, v, pad_k=pads[0], pad_v=pads[1], backend=backend)
        found.append(torch.autograd.grad(out.float().sum(), pads))
        assert tuple(one.dtype for one in found[-1]) == dtypes
    rounded = found[0][0].half().float()
    assert not torch.equal(found[0][0], rounded)  # autograd would widen a gradient that came in the maps' dtype
    for fused, eager in zip(*found, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(fused, eager, rtol=1e-2, atol=1e-2)
