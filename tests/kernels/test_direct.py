"""Calls past the dispatcher: which calls go that way, and that nobody can tell but by the clock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from vitrail.kernels._common import registration
from vitrail.kernels._common.direct import direct_kind

_NAME = "test_scaled_product"


def _forward(x: Tensor, y: Tensor | None, added: Tensor, factor: float) -> Tensor:
    return factor * x * (1 if y is None else y) + added


@torch.no_grad()  # like a kernel's launch
def _backward(grad: Tensor, x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    d_y = grad.new_empty(0) if y is None else factor * grad * x
    return factor * grad * (torch.ones_like(x) if y is None else y), d_y


@pytest.fixture(scope="module")
def operator() -> Callable[..., Tensor]:
    return registration.register_operator(
        _NAME, "Tensor x, Tensor? y, Tensor added, float factor", ("d_x", "d_y"), _forward, _backward, adds_last=True
    )


def _inputs(*needing: int) -> list[Any]:
    tensors = [torch.randn(3, 2) for _ in range(3)]
    return [t.requires_grad_(n in needing) for n, t in enumerate(tensors)] + [2.5]


def _both(operator: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return operator, getattr(torch.ops.vitrail, _NAME)


def _way_of(x: Tensor) -> str:
    """The way that an operator takes on `x`."""
    way: Any = _WAYS(x, 3)
    return str(way)


class _Ways(registration.Operator):
    """Tells of the ways in place of taking them."""

    def __init__(self) -> None:
        self.dispatched: Any = lambda *_: "dispatcher"
        self.replayed: Any = SimpleNamespace(run=lambda *_: "direct")
        self.differentiable: Any = lambda *_: "direct with gradients"


_WAYS = _Ways()


def test_plain_tensors_go_directly() -> None:
    x, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
    assert _way_of(x) == "direct"
    assert _way_of(leaf) == _way_of(torch.nn.Parameter(x)) == _way_of(2 * leaf) == "direct with gradients"
    with torch.no_grad():
        assert _way_of(leaf) == "direct"
    with torch.inference_mode():
        assert _way_of(torch.randn(3)) == "direct"
    with torch.autocast("cpu"), torch.autograd.graph.save_on_cpu():
        assert _way_of(leaf) == "direct with gradients"
    assert direct_kind((None, x), []) is not None


class _Subclass(torch.Tensor):
    """A tensor that may do anything with what it meets."""


@pytest.mark.parametrize(
    "watcher",
    [
        FlopCounterMode(display=False),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device("meta"),
        torch.overrides.BaseTorchFunctionMode(),
        torch.profiler.profile(),
        forward_ad.dual_level(),
    ],
    ids=lambda watcher: type(watcher).__name__,
)
def test_modes_and_the_profiler_see_calls(watcher: AbstractContextManager[Any]) -> None:
    x = torch.randn(3)
    with watcher:
        assert _way_of(x) == "dispatcher"
    assert _way_of(x) == "direct"


def test_transforms_and_tracers_see_calls() -> None:
    x, seen = torch.randn(3), []

    def call(x: Tensor) -> Tensor:
        seen.append(_way_of(x))
        return x.sum()

    torch.func.grad(call)(x)
    torch.func.vmap(call)(x)
    torch.func.functional_call(torch.nn.Identity(), {}, (x,))
    make_fx(call)(x)
    torch.jit.trace(call, (x,), check_trace=False)
    assert seen == ["dispatcher"] * 4
    assert torch.compile(_way_of, backend="eager", fullgraph=True)(x) == "dispatcher"


def test_tensors_that_are_more_than_they_seem_go_through_the_dispatcher() -> None:
    negated = torch.randn(3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert _way_of(negated) == _way_of(torch.randn(3).as_subclass(_Subclass)) == "dispatcher"


def test_without_the_functions_that_tell_who_watches_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.kernels._common.direct._KNOWS_WATCHERS", False)
    assert _way_of(torch.randn(3)) == "dispatcher"


@pytest.mark.parametrize("needing", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("has_y", [True, False])
def test_both_ways_agree(operator: Callable[..., Tensor], needing: tuple[int, ...], has_y: bool) -> None:
    x, y, added, factor = _inputs(*needing)
    grad, found = torch.randn(3, 2), []
    for run in _both(operator):
        tensors = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in (x, y, added)]
        if not has_y:
            tensors[1] = None
        out = run(*tensors, factor)
        assert out.requires_grad == any(t is not None and t.requires_grad for t in tensors)
        if out.requires_grad:
            assert out.grad_fn is not None
            out.backward(grad)
        found.append([out.detach(), *(None if t is None else t.grad for t in tensors)])
    for direct, dispatched in zip(*found, strict=True):
        assert (direct is None) == (dispatched is None)
        if direct is not None:
            assert torch.equal(direct, dispatched)


def test_hooks_on_saved_tensors_see_the_same(operator: Callable[..., Tensor]) -> None:
    counts = []
    for run in _both(operator):
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):  # noqa: B023
            run(*_inputs(0, 1, 2))
        counts.append(len(packed))
    assert counts == [2, 2]


def test_what_is_saved_may_not_change(operator: Callable[..., Tensor]) -> None:
    for run in _both(operator):
        x, y, *rest = _inputs(0)
        out = run(x, y, *rest)
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_compute_anew(operator: Callable[..., Tensor], use_reentrant: bool) -> None:
    x, y, added, factor = _inputs(0)
    (wanted,) = torch.autograd.grad(operator(x, y, added, factor).square().sum(), x)
    checkpoint(lambda x: operator(x, y, added, factor).square(), x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, wanted)


def test_backwards_to_be_differentiated_go_through_the_dispatcher(operator: Callable[..., Tensor]) -> None:
    """Whose result warns where it is differentiated, since the backward of a backward is not registered."""
    inputs = _inputs(0, 1)
    for run in _both(operator):
        (d_x,) = torch.autograd.grad(run(*inputs).square().sum(), inputs[0], create_graph=True)
        assert d_x.requires_grad
        assert "NotImplemented" in d_x.grad_fn.name()


def test_forward_mode_is_refused_alike(operator: Callable[..., Tensor]) -> None:
    for run in _both(operator):
        x, *rest = _inputs(1)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward mode AD|jvp"):
            run(forward_ad.make_dual(x, torch.ones_like(x)), *rest)


def test_observers_find_the_operator(operator: Callable[..., Tensor]) -> None:
    register_flop_formula(getattr(torch.ops.vitrail, _NAME))(lambda *shapes, **_: 7)
    with FlopCounterMode(display=False) as counter:
        operator(*_inputs(0))
    assert counter.get_total_flops() == 7
    with torch.profiler.profile() as profile:
        operator(*_inputs(0)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {f"vitrail::{_NAME}", f"vitrail::{_NAME}_backward"} <= names
    graph = make_fx(operator)(*_inputs())
    assert _NAME in graph.code


def test_compiles_without_breaks(operator: Callable[..., Tensor]) -> None:
    inputs = _inputs(0, 1, 2)
    out = torch.compile(operator, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.equal(out, operator(*inputs))
    found = torch.autograd.grad(out.sum(), inputs[:3])
    wanted = torch.autograd.grad(operator(*inputs).sum(), inputs[:3])
    assert all(map(torch.equal, found, wanted))
