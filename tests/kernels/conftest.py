"""What the operators' tests share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills memory with NaN that the kernels are to write."""
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=["by_region", "dense"])
def routing_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every call of routing attention take one of the two forms of its kernels."""
    triton = pytest.importorskip("vitrail.kernels.routing_attention.triton")
    monkeypatch.setattr(triton, "_DENSE_ADVANTAGE", math.inf if request.param == "dense" else 0)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and larger programs of depth-wise convolution on the CPU: the interpreter's time goes by their number."""
    triton = pytest.importorskip("vitrail.kernels.depthwise_conv.triton")
    if not torch.cuda.is_available():
        for table in ("_TILES", "_GRADIENT_TILES"):
            monkeypatch.setattr(triton, table, {size: triton.Tile(3, 2, 16, 1, 1 + size // 5, 4) for size in (3, 5, 7)})
        monkeypatch.setattr(triton, "_PARTS", 1)
