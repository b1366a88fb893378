"""Launches: remembered code is that of the arguments at hand, not of an earlier call's, and serves all sizes."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitrail.kernels._common import launch as module
from vitrail.kernels._common.kinds import Memory
from vitrail.kernels.window_attention import window_attention


class _Code:
    """Stands for compiled code, as Triton's is launched."""

    def __init__(self) -> None:
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, arguments))


class _Kernel:
    """Counts calls as Triton's kernels are called; what it returns stands for compiled code."""

    params = tuple(SimpleNamespace(do_not_specialize=name == "size") for name in ("x", "size", "strides", "BLOCK"))

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.code = _Code()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **constants: Any) -> _Code:
            self.compiled.append((grid, arguments, constants))
            return self.code

        return call


def _function(x, y, size, number, strides, BLOCK):  # type: ignore[no-untyped-def]
    """Parameters of a kernel."""


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_interpreter_gets_the_arguments_as_they_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRITON_INTERPRETED", True)
    kernel, x = _Kernel(), SimpleNamespace(device=torch.device(device))
    for _ in range(2):
        module.launch(kernel, (2, 5), x, 7, (1,), BLOCK=16, num_warps=4)
    assert kernel.compiled == [((2, 5), (x, 7, (1,)), {"BLOCK": 16, "num_warps": 4})] * 2
    assert kernel.code.launched == []


def test_remembered_code_gets_every_parameter_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", {})
    kernel, x = _Kernel(), torch.zeros(8)
    calls = [(x, 7, (32, 1)), (x, 500, (48, 1)), (x[1:], 7, (32, 1)), (x, 7, (33, 1)), (x, 9, (64, 1))]
    for arguments in calls:
        module._launch_remembered(0, kernel, (2, 5), arguments, {"BLOCK": 16, "num_warps": 4})
    assert [arguments for _, arguments, _ in kernel.compiled] == [calls[0], calls[2], calls[3]]
    assert kernel.code.launched == [((2, 5, 1, 1), (*calls[n], None)) for n in (1, 4)]
    module._launch_remembered(1, kernel, (3,), calls[0], {"BLOCK": 16, "num_warps": 4})  # another device
    module._launch_remembered(0, kernel, (3,), calls[0], {"BLOCK": 32, "num_warps": 4})
    assert len(kernel.compiled) == 5


def test_remembers_for_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", Memory(3))
    kernel, x = _Kernel(), torch.zeros(8)
    for block in range(10):
        module._launch_remembered(0, kernel, (1,), (x, 7, (1,)), {"BLOCK": block})
        assert 1 <= len(module._compiled) <= 3


def test_tells_apart_what_triton_does() -> None:
    """Two calls have one key if Triton has one code for both, and different ones if it compiles for each."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    _function.__annotations__ = {"BLOCK": "tl.constexpr"}
    kernel = JITFunction(_function, do_not_specialize=["size"])
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    usual = {"x": torch.zeros(8), "y": None, "size": 20, "number": 20, "strides": (32, 1), "BLOCK": 16}
    others = {
        "x": [torch.zeros(8)[1:], torch.zeros(8)[4:], torch.zeros(8, dtype=torch.bfloat16)],
        "y": [torch.zeros(8), torch.zeros(8, dtype=torch.int64)[2:]],
        "size": [1, 16, 0, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 1.0, 20.0, True, None],
        "number": [1, 16, 0, 21, 48, 2**31 - 1, 2**31, -(2**31), 2**31 + 1, 1.0, 20.0, 0.5, True, False, None],
        "strides": [
            (33, 1),
            (48, 1),
            (1, 32),
            (32, 2),
            (0, 0),
            (1, 1),
            (2**31, 1),
            (32, 1, 1),
            (),
            (32.0, 1.0),
            (7.0, 16.0),
        ],
        "BLOCK": [32],
    }
    calls = [usual, *({**usual, name: value} for name, values in others.items() for value in values)]
    keys, wanted = [], []
    for call in calls:
        *arguments, block = call.values()
        keys.append(module._key(kernel, tuple(arguments), {"BLOCK": block}))
        wanted.append(bind(*arguments, BLOCK=block)[1])
    for first, second in combinations(range(len(calls)), 2):
        assert (keys[first] == keys[second]) == (wanted[first] == wanted[second]), (calls[first], calls[second])


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
def test_sizes_share_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered code serves maps of other sizes, and does so rightly."""
    monkeypatch.setattr(module, "_compiled", {})
    for height in (7, 12, 5):
        q, k, v = torch.randn(3, 1, height, 9, 2, 16, device="cuda")
        fused = window_attention(q, k, v, window_size=4, backend="triton")
        eager = window_attention(q.double(), k.double(), v.double(), window_size=4, backend="eager")
        torch.testing.assert_close(fused.double(), eager, rtol=1e-5, atol=1e-5)
    assert len(module._compiled) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_inputs() -> None:
    q = torch.randn(1, 5, 7, 2, 16, device="cuda:1")
    fused = window_attention(q, q, q, window_size=4, backend="triton")
    eager = window_attention(q, q, q, window_size=4, backend="eager")
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
