"""Replayed calls do what the recorded one did, on other tensors; what cannot be repeated is not.

Where there is no GPU a stand-in for compiled code works on the addresses that it is given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.kernels._common import launch as launching
from vitrail.kernels._common import replay
from vitrail.tools._common.kernel_cases import OPERATORS

pytest.importorskip("triton")


class _Code:
    """Stands for compiled code that adds `number` to some floats."""

    function = packed_metadata = 0
    replays = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return _add

    def run(self, *everything: Any) -> None:
        (columns, rows, layers, stream, *_), (source, target, n, number) = everything[:9], everything[9:]
        assert (columns, rows, layers, stream) == (2, 1, 1, "stream of None")
        array = ctypes.c_float * n
        values, out = array.from_address(source), array.from_address(target)
        out[:] = [value + number for value in values]
        _Code.replays += 1


class _Kernel:
    """Compiles the stand-in and runs it, as Triton's kernels do."""

    params = tuple(SimpleNamespace(do_not_specialize=False) for _ in range(4))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Code]:
        def call(*arguments: Any) -> _Code:
            _add(*arguments)
            return _Code()

        return call


def _add(source: Tensor, target: Tensor, n: int, number: float) -> None:
    with torch._C._DisableTorchDispatch():  # kernels do not pass through PyTorch
        torch.add(source, number, out=target)


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Launches the stand-in, as `launch` would on a GPU, which `torch.cuda` seems to have."""
    from triton.runtime import driver

    kernel = _Kernel()
    driver_of_none = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(type(driver), "active", driver_of_none)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(replay, "REPLAYS", True)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(_Code, "replays", 0)

    def launch(source: Tensor, target: Tensor, number: float) -> None:
        launching._launch_remembered(0, kernel, (2,), (source, target, target.numel(), number), {})

    return launch


def _compare(function: Callable[..., Any], *makers: Callable[[], Any], replays: int) -> None:
    """Calls an implementation with new arguments time and again; counts the launches that were replayed."""
    fast = replay.replayed(function)
    for _ in range(4):
        arguments = [make() for make in makers]
        wanted, found = function(*arguments), fast(*arguments)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert _Code.replays == replays


def test_launches_read_views_of_other_tensors(add: Callable[..., None]) -> None:
    def function(packed: Tensor, number: float) -> tuple[Tensor, Tensor]:
        first, second = packed.unbind(0)
        out = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
        above, below = out.unbind(0)
        between = torch.empty_like(second)
        add(first, above, number)
        add(second[1:].contiguous(), between[1:], 2.0)
        between[0].fill_(7)
        add(between, below, 1.0)
        return out, out[1, 1:].sum(0)

    _compare(function, lambda: torch.randn(2, 3, 5), lambda: 0.5, replays=6)


def test_operators_in_place_and_of_constants_are_repeated(add: Callable[..., None]) -> None:
    def function(x: Tensor, absent: None) -> Tensor:
        out = torch.empty_like(x)
        add(x, out, 1.0)
        out.view(-1).mul_(torch.arange(6.0, device=x.device))
        return out.to(torch.float64)

    _compare(function, lambda: torch.randn(2, 3), lambda: None, replays=2)


def test_operators_that_copy_only_some_layouts_are_repeated_below_autograd(add: Callable[..., None]) -> None:
    """As the dispatcher calls an implementation: `contiguous` and its like are then not told apart beforehand."""

    def function(x: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.empty_like(plain)
            add(x.flatten(1).t().contiguous(), out, 1.0)
            other = torch.empty_like(out)
            add(plain.contiguous().reshape(-1), other.view(-1), 1.0)
            return out, other + x.t().reshape(-1).view(plain.shape)

    _compare(function, lambda: torch.randn(3, 2), lambda: torch.randn(2, 3), replays=4)


def test_other_kinds_have_other_steps(add: Callable[..., None]) -> None:
    def function(x: Tensor, numbers: list[float], twice: bool) -> Tensor:
        out = torch.empty_like(x)
        add(x, out, numbers[-1])
        if twice:
            add(out, out, float(x.shape[0]))
        return out

    fast = replay.replayed(function)
    for size in (3, 4, 3, 4, 3, 4):
        for numbers in ([1.0], [2.0], [2.0, 3.0]):
            for twice in (True, False):
                x = torch.randn(size)
                torch.testing.assert_close(fast(x, numbers, twice), function(x, numbers, twice), rtol=0, atol=0)
    assert _Code.replays == 18


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: torch.cat([x, x]).sum(),
        lambda x: x.relu().nonzero().shape[0],
        lambda x: x.to("meta").shape[0],
    ],
    ids=["item", "list", "nonzero", "device"],
)
def test_what_cannot_be_repeated_runs_as_it_is(add: Callable[..., None], reads: Callable[[Tensor], Any]) -> None:
    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        add(x, out, 1.0)
        return out * reads(x)

    _compare(function, lambda: torch.randn(3), replays=0)


def test_results_from_elsewhere_are_not_replayed(add: Callable[..., None]) -> None:
    kept = torch.randn(3)

    def function(x: Tensor) -> Tensor:
        add(x, kept, 1.0)
        return kept.clone()

    _compare(function, lambda: torch.randn(3), replays=0)


def test_calls_without_a_launch_are_not_replayed(add: Callable[..., None]) -> None:
    ran = []

    def function(x: Tensor) -> Tensor:
        ran.append(x)
        return x.sin()

    fast = replay.replayed(function)
    for _ in range(4):
        fast(torch.randn(3))
    assert len(ran) == 4


def test_one_tensor_in_two_places_is_not_recorded(add: Callable[..., None]) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        add(x, out, 1.0)
        add(y, out, 2.0)
        return out + x

    fast = replay.replayed(function)
    for same in (True, True, True, False, False, True, False):
        x = torch.randn(3)
        y = x if same else torch.randn(3)
        torch.testing.assert_close(fast(x, y), function(x, y), rtol=0, atol=0)


def test_autocast_and_alignment_are_kinds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(20)
    kinds = [replay._replayed_kind((memory[start : start + 8],)) for start in (0, 1, 4)]
    assert kinds[0] == kinds[2] != kinds[1]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert replay._replayed_kind((memory[:8],)) != kinds[0]


def test_launch_hooks_are_called(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    seen: list[Any] = []

    class Hooked(_Code):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *parameters: seen.append((grid, parameters))

    monkeypatch.setattr(launching, "_is_hook", lambda hook: hook is knobs.runtime.launch_enter_hook)
    launching.starter(Hooked(), (3, 2), torch.device("cpu"))((1, 2))
    assert seen == [((3, 2, 1), (1, 2))]


def test_empty_chains_are_no_hooks() -> None:
    chain = SimpleNamespace(calls=[])
    assert not any(map(launching._is_hook, (chain, None)))
    chain.calls.append(print)
    assert all(map(launching._is_hook, (chain, print)))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["direct", "compiled"])
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "routing_layer"])
def test_every_operator_replays_what_it_did(operator: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on other numbers, forward and backward, to the last bit; the third is replayed.

    In compiled code operators are called by the dispatcher, below autograd.
    """
    torch._dynamo.reset()
    device, plans = torch.device("cuda"), []
    run_plan = replay._Plan.run
    monkeypatch.setattr(replay._Plan, "run", lambda plan, given: plans.append(plan) or run_plan(plan, given))
    for case in OPERATORS[operator]("host"):
        for name, implementation in case.implementations.items():
            if not name.startswith("vitrail"):
                continue
            plans.clear()
            run = implementation.run
            if compiled:
                run = torch.compile(run, backend="aot_eager", dynamic=False)
            inputs = [one.make(device, torch.bfloat16, seed) for seed, one in enumerate(case.inputs)]
            for _ in range(3):
                given = [_other(one) if torch.is_tensor(one) else one for one in implementation.prepare(*inputs)]
                monkeypatch.setattr(replay, "REPLAYS", False)
                wanted = _step(run, given)
                monkeypatch.setattr(replay, "REPLAYS", True)
                found = _step(run, given)
                assert all(map(torch.equal, found, wanted)), name
            # The backward of `mlp` launches no kernel of ours.
            assert len(set(plans)) >= (1 if operator == "mlp" else 2), name


def _other(given: Tensor) -> Tensor:
    """Other numbers of the same kind, at another place; tables and the like stay."""
    if not given.is_floating_point():
        return given.clone()
    return (given.detach() * torch.rand_like(given.detach())).requires_grad_()


def _step(run: Callable[..., Tensor], given: list[Any]) -> list[Tensor]:
    out = run(*given)
    leaves = [one for one in given if torch.is_tensor(one) and one.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach()))]
