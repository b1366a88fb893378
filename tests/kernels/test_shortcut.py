"""Public functions whose later calls of a kind go straight to their operator, unnoticed but by the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import record_choices, settings
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels._common.shortcut import shortened

_ran: list[str] = []


class _Table(NamedTuple):
    factor: Tensor
    weight: Tensor


def _forward(x: Tensor, weight: Tensor, added: Tensor | None, factor: float, powers: Any) -> Tensor:
    out = factor * x * weight + sum(x**power for power in powers)
    return out if added is None else out + added


def _backward(grad: Tensor, x: Tensor, weight: Tensor, factor: float, powers: Any) -> tuple[Tensor, Tensor]:
    slope = factor * weight + sum(power * x ** (power - 1) for power in powers)
    return grad * slope, (factor * grad * x).sum_to_size(weight.shape)


_operator = register_operator(
    "test_shortcut",
    "Tensor x, Tensor weight, Tensor? added, float factor, int[] powers",
    ("d_x", "d_weight"),
    _forward,
    _backward,
    adds_last=True,
)


def _definition(
    x: Tensor, weight: Tensor, *, added: Tensor | None = None, factor: float = 1, powers: Any = (2,), backend: str = ""
) -> Tensor:
    """Does what public functions do: checks, casts, reshapes, and leaves the rest to an operator."""
    if x[:, :0].dim() != 2 or factor < 0:
        raise ValueError("wrong")
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    weight = weight.flatten(0, -2).select(0, 0).to(x.dtype)
    return _operator(x, weight, added, float(factor), tuple(powers))


@pytest.fixture
def public() -> Callable[..., Tensor]:
    return _shortened(_definition)


def _shortened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as a public one that counts in how many calls its own code runs."""
    _ran.clear()

    def counted(*arguments: Any, **options: Any) -> Tensor:
        _ran.append("body")
        return function(*arguments, **options)

    return shortened(counted)


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, requires_grad=True), torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)


def _compare(public: Callable[..., Tensor], options: dict[str, Any], bodies: int, calls: int = 4) -> None:
    """Calls with new tensors time and again; counts in how many the function's own code ran."""
    before = len(_ran)
    for _ in range(calls):
        inputs = _inputs()
        found, wanted = public(*inputs, **options), _definition(*inputs, **options)
        assert torch.equal(found, wanted)
        assert found.requires_grad == wanted.requires_grad
        if found.requires_grad:
            both = (torch.autograd.grad(one.square().sum(), inputs) for one in (found, wanted))
            assert all(map(torch.equal, *both))
    assert len(_ran) - before == bodies


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, int, float, bool, lambda one: one.tolist(), lambda one: not one.equal(one + 1)]
)
def test_functions_that_read_numbers_are_not_shortened(read: Callable[[Tensor], Any]) -> None:
    def scaled(x: Tensor, factor: Tensor) -> Tensor:
        return _operator(x, x[:1], None, float(read(factor)), (2,))

    public = _shortened(scaled)
    for number in (1.0, 2.0, 3.0):
        x, factor = torch.randn(3, 4), torch.tensor(number)
        assert torch.equal(public(x, factor), scaled(x, factor))
    assert len(_ran) == 3


def test_a_kind_is_looked_at_once(public: Callable[..., Tensor]) -> None:
    _compare(public, {}, 1)
    _compare(public, {}, 0)
    for options in ({"factor": 2}, {"factor": 2.0}, {"powers": [2, 3]}, {"factor": 2, "powers": (2, 3)}):
        _compare(public, options, 1)
        _compare(public, dict(reversed(options.items())), len(options) - 1)
    with torch.no_grad():
        _compare(public, {}, 0)
    _compare(public, {"added": torch.randn(3, 4)}, 1)


def test_options_of_one_value_are_told_apart_by_their_names() -> None:
    def scaled(x: Tensor, *, factor: float = 1.0, power: float = 1.0) -> Tensor:
        return _operator(x, x[:1], None, factor, (int(power),))

    public = _shortened(scaled)
    for options in ({"factor": 3.0}, {"power": 3.0}) * 3:
        x = torch.randn(3, 4)
        assert torch.equal(public(x, **options), scaled(x, **options))
    assert len(_ran) == 2


def test_a_recognised_call_of_another_kind_takes_its_own_way(public: Callable[..., Tensor]) -> None:
    """Calls are recognised by what was met lately: each kind among several, in turns, and one that begins elsewhere."""
    memory = torch.randn(13)
    for _ in range(3):
        for x in (torch.randn(3, 4), torch.randn(4, 3).T, memory[:12].view(3, 4), memory[1:].view(3, 4)):
            for dtype in (torch.float32, torch.float64):
                weight = torch.randn(1, 4, dtype=dtype)
                assert torch.equal(public(x, weight), _definition(x, weight))
    assert len(_ran) == 3 * 2


def test_autocast_makes_kinds_of_its_own(public: Callable[..., Tensor]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            _compare(public, {}, 1)
    _compare(public, {}, 1)


def test_errors_come_each_time(public: Callable[..., Tensor]) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"):
            public(*_inputs(), factor=-1)
        with pytest.raises(TypeError):
            public(*_inputs(), unknown=1)
    _compare(public, {}, 1)


def test_checks_are_not_repeated(public: Callable[..., Tensor]) -> None:
    x, weight = _inputs()
    public(x, weight)
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.kernels._common.direct._len_torch_dispatch_stack", lambda: 0)
        with Names():
            public(x, weight)
    assert len(_ran) == 1
    assert "slice" not in names
    assert "select" in names


@pytest.mark.parametrize("watch", [record_choices, lambda: FlopCounterMode(display=False), torch.profiler.profile])
def test_watched_calls_take_the_whole_way(public: Callable[..., Tensor], watch: Callable[[], Any]) -> None:
    _compare(public, {}, 1)
    with watch():
        _compare(public, {}, 4)
    _compare(public, {}, 0)


def test_another_default_backend_is_another_kind(
    public: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend, bodies in (("auto", 1), ("eager", 1), ("auto", 0)):
        monkeypatch.setattr(settings, "default_backend", backend)
        _compare(public, {}, bodies)


def test_compiled_and_traced_code_holds_the_whole_function(public: Callable[..., Tensor]) -> None:
    x, weight = _inputs()
    wanted = public(x, weight)
    assert torch.equal(torch.compile(public, backend="aot_eager", fullgraph=True)(x, weight), wanted)
    other = torch.randn(3, 4)
    graph = make_fx(lambda x, weight: public(x, weight))(other, weight)
    assert "test_shortcut" in graph.code
    assert torch.equal(graph(x, weight), wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * y,
        lambda x, y: _operator(x, y, None, 1.0, (2,)) + 1,
        lambda x, y: _operator(_operator(x, y, None, 1.0, (2,)), y, None, 1.0, (2,)),
        lambda x, y: _operator(x * 2, y, None, 1.0, (2,)),
        lambda x, y: _operator(x, torch.ones(4), None, 1.0, (2,)),
    ],
    ids=["no operator", "something after it", "two operators", "arithmetic before it", "a constant"],
)
def test_what_cannot_be_repeated_runs_as_it_is(function: Callable[..., Tensor]) -> None:
    public = _shortened(function)
    for n in range(4):
        x, y = torch.randn(3, 4), torch.randn(4)
        assert torch.equal(public(x, y), function(x, y))
        assert len(_ran) == n + 1


def test_one_tensor_in_two_places_is_no_example() -> None:
    public = _shortened(lambda x, y, z: _operator(z, y, x, 1.0, (2,)))
    for same in (True, True, False, False, True, False):
        x, y, z = torch.randn(4), torch.randn(4), torch.randn(4)
        given = (x, x, z) if same else (x, y, z)
        assert torch.equal(public(*given), _operator(given[2], given[1], given[0], 1.0, (2,)))


def test_tensors_may_come_in_sequences() -> None:
    public = _shortened(lambda x, table, others: _operator(x, table.weight, others[1], 1.0, (2,)))
    for _ in range(3):
        x, table = torch.randn(3, 4), _Table(torch.randn(4), torch.randn(4))
        others = [torch.randn(4), torch.randn(4), torch.randn(4)]
        assert torch.equal(public(x, table, others), _operator(x, table.weight, others[1], 1.0, (2,)))
    assert len(_ran) == 1


def test_subclasses_take_the_whole_way(public: Callable[..., Tensor]) -> None:
    class Other(Tensor):
        pass

    x, weight = _inputs()
    for _ in range(2):
        assert type(public(x.as_subclass(Other), weight)) is Other
    assert len(_ran) == 2


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.kernels._common.shortcut.MOST_REMEMBERED", 2)
    public = _shortened(_definition)
    for factor in (*range(7), 0):  # what is not looked up any more was called long ago
        _compare(public, {"factor": factor}, 1, calls=2)
