"""Launches: remembered code is that of the arguments at hand, not of an earlier call's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitrail.kernels._common import launch as module
from vitrail.kernels.window_attention import window_attention


class _Kernel:
    """Counts calls as Triton's kernels are called; what it returns stands for compiled code."""

    params = ("x", "n", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **constants: Any) -> None:
            self.compiled.append((grid, arguments, constants))

        return call


def test_the_interpreter_gets_the_arguments_as_they_are() -> None:
    kernel, x = _Kernel(), torch.zeros(3)
    module.launch(kernel, (2, 5), x, 7, BLOCK=16, num_warps=4)
    assert kernel.compiled == [((2, 5), (x, 7), {"BLOCK": 16, "num_warps": 4})]


@pytest.mark.gpu
def test_code_depends_on_alignment_and_strides() -> None:
    """Maps that start at every offset, with rows of every length: wrongly shared code would fault or read elsewhere."""
    memory = torch.randn(4096, device="cuda")
    for start in (0, 4, 1, 0, 3):
        for width in (4, 5, 16, 1):
            for used in (width, max(1, width - 1)):
                q = memory[start : start + 6 * width * 32].view(1, 6, width, 2, 16)[:, :, :used]
                fused = window_attention(q, q, q, window_size=4, backend="triton")
                eager = window_attention(q.double(), q.double(), q.double(), window_size=4, backend="eager")
                torch.testing.assert_close(fused.double(), eager, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_memory_of_launches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 3)
    for height in range(1, 12):
        q = torch.randn(1, height, 5, 1, 16, device="cuda")
        window_attention(q, q, q, window_size=4, backend="triton")
        assert len(module._compiled) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_inputs() -> None:
    q = torch.randn(1, 5, 7, 2, 16, device="cuda:1")
    fused = window_attention(q, q, q, window_size=4, backend="triton")
    eager = window_attention(q, q, q, window_size=4, backend="eager")
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
