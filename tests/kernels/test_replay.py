"""Replayed calls do what the recorded one did, on other tensors; what cannot be repeated is not.

Where there is no GPU a stand-in for compiled code works on the addresses that it is given.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _kernel_calls import CALLS
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common import launch as launching
from vitrail.kernels._common import overload as overloading
from vitrail.kernels._common import plan as planning
from vitrail.kernels._common import replay
from vitrail.kernels._common.dispatch import TRITON_INTERPRETED, settings
from vitrail.kernels._common.kinds import Latest, kind_of
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels._common.shortcut import _Shortcut
from vitrail.kernels.routing_attention_lepe import routing_attention_lepe
from vitrail.tools._common.kernel_cases import OPERATORS
from vitrail.tools._common.kernel_cases.common import normal

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
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are replayed as on a GPU, which `torch.cuda` seems to have."""
    from triton.runtime import driver

    driver_of_none = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(type(driver), "active", driver_of_none)
    monkeypatch.setattr(planning, "_current_device", lambda: None)
    monkeypatch.setattr(replay, "REPLAYS", True)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(_Code, "replays", 0)


@pytest.fixture
def add(replays: None) -> Callable[..., None]:
    """Launches the stand-in, as `launch` would on a GPU."""
    kernel = _Kernel()

    def launch(source: Tensor, target: Tensor, number: float) -> None:
        launching._launch_remembered(0, kernel, (2,), (source, target, target.numel(), number), {})

    return launch


class _Interpreted:
    """Stands for the compiled code of a launch: the interpreter on the addresses that it is given."""

    function = packed_metadata = 0

    def __init__(self, start: Callable[..., None], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.start, self.arguments, self.constants = start, arguments, constants

    def run(self, *everything: Any) -> None:
        grid, stream, parameters = everything[:3], everything[3], everything[9:]
        assert stream == "stream of None"
        given = map(_at, parameters, self.arguments)
        self.start(*given, grid=grid, warmup=False, **self.constants)


def _at(parameter: Any, recorded: Any) -> Any:
    """What lies at an address, if that is what was recorded in place of a tensor."""
    if not isinstance(recorded, Tensor):
        return parameter
    if recorded.numel() == 0:
        return recorded
    n_values = 1 + sum((size - 1) * stride for size, stride in zip(recorded.shape, recorded.stride(), strict=True))
    memory = (ctypes.c_byte * (n_values * recorded.element_size())).from_address(parameter)
    return torch.frombuffer(memory, dtype=recorded.dtype)


@pytest.fixture
def interpreted(replays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of the operators' kernels, which the interpreter runs, are recorded and replayed, too."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recorded(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        start = functools.partial(run, kernel)
        with torch._C._DisableTorchDispatch():  # kernels do not pass through PyTorch
            start(*arguments, grid=grid, warmup=warmup, **constants)
        listener = getattr(launching._thread, "listener", None)
        if listener is not None:
            listener(_Interpreted(start, arguments, constants), grid, arguments)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    monkeypatch.setattr(settings, "default_backend", "triton")


def _replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    implementation = replay.Replayed(function)

    def call(*arguments: Any) -> Any:
        tensors: list[Tensor] = []
        return implementation.run(kind_of(arguments, tensors), tensors, arguments)

    call.plans = implementation._plans  # type: ignore[attr-defined]
    return call


def _compare(function: Callable[..., Any], *makers: Callable[[], Any], replays: int) -> None:
    """Calls an implementation with new arguments time and again; counts the launches that were replayed."""
    fast = _replayed(function)
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


@pytest.mark.parametrize("context", [nullcontext, torch.inference_mode, torch._C._AutoDispatchBelowAutograd])
def test_operators_that_copy_only_some_layouts_are_repeated(add: Callable[..., None], context: Any) -> None:
    """As the dispatcher calls an implementation: `contiguous` and its like are then not told apart beforehand."""

    def function(x: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(plain)
        add(x.flatten(1).t().contiguous(), out, 1.0)
        other = torch.empty_like(out)
        add(plain.contiguous().reshape(-1), other.view(-1), 1.0)
        return out, other + x.t().reshape(-1).view(plain.shape) + x.to(torch.float64).sum().to(x.dtype)

    with context():
        _compare(function, lambda: torch.randn(3, 2), lambda: torch.randn(2, 3), replays=4)


def test_what_holds_nothing_is_made_once(add: Callable[..., None]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        out, workspace, nothing = torch.empty_like(x), x.new_empty(0, 3, 2), x.new_empty(0)
        add(x, out, 1.0)
        add(workspace, workspace, 1.0)
        return out, nothing, x.new_empty(2, 0)

    fast = _replayed(function)
    _, _, (out, nothing, other), (out2, nothing2, other2) = (fast(torch.ones(5)) for _ in range(4))
    assert nothing is nothing2
    assert other is not other2  # may become part of a graph
    assert torch.equal(out2, torch.full((5,), 2.0))
    assert out is not out2


def test_other_kinds_have_other_steps(add: Callable[..., None]) -> None:
    def function(x: Tensor, numbers: list[float], twice: bool) -> Tensor:
        out = torch.empty_like(x)
        add(x, out, numbers[-1])
        if twice:
            add(out, out, float(x.shape[0]))
        return out

    fast = _replayed(function)
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

    fast = _replayed(function)
    for _ in range(4):
        fast(torch.randn(3))
    assert len(ran) == 4


def test_one_tensor_in_two_places_is_not_recorded(add: Callable[..., None]) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        add(x, out, 1.0)
        add(y, out, 2.0)
        return out + x

    fast = _replayed(function)
    for same in (True, True, True, False, False, True, False):
        x = torch.randn(3)
        y = x if same else torch.randn(3)
        torch.testing.assert_close(fast(x, y), function(x, y), rtol=0, atol=0)


def test_scratch_of_launches_is_one_tensor(add: Callable[..., None]) -> None:
    """Its parts do not overlap and begin as tensors do; results and what operators of PyTorch read stay their own."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scratch = [torch.empty(n, dtype=x.dtype, device=x.device) for n in (200, 130, 200, 1)]
        out, shown, read = (torch.empty_like(x) for _ in range(3))
        for part, number in zip(scratch, (1.0, 2.0, 3.0, 4.0), strict=True):
            add(x[: part.numel()], part, number)
        add(scratch[0], out, 0.25)
        add(scratch[2][1:], shown[1:], 0.5)
        add(scratch[2][:1], shown[:1], 0.5)
        add(scratch[1][:3], read[:3], 0.0)
        add(scratch[3], read[3:4], 0.0)
        return out, shown[1:], read[:4].sum()

    fast = _replayed(function)
    for _ in range(4):
        x = torch.randn(200)
        found, wanted = fast(x), function(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert _Code.replays == 18
    assert len({one.untyped_storage().data_ptr() for one in found}) == 3
    assert found[0].untyped_storage().nbytes() == found[0].nbytes
    assert found[0].untyped_storage().data_ptr() != fast(x)[0].untyped_storage().data_ptr()
    (known,) = fast.plans.values()
    (size,) = re.findall(r"memory = .*?\(\((\d+), \)", known.code)
    starts = [0, *map(int, re.findall(r"(?<=[ (])scratch \+ (\d+)(?=,)", known.code))]
    assert set(starts) == {0, 1024, 2048, 2048 + 4, 3072}  # one launch reads from the second number on
    assert int(size) == 3584


def test_large_scratch_has_tensors_of_its_own(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_LARGE", 100)

    def function(x: Tensor) -> Tensor:
        large, small, out = torch.empty_like(x), torch.empty_like(x[:24]), torch.empty_like(x)
        add(x, large, 1.0)
        add(x[:24], small, 2.0)
        add(large, out, 3.0)
        add(small, out[:24], 4.0)
        return out

    fast = _replayed(function)
    for _ in range(4):
        x = torch.randn(25)
        torch.testing.assert_close(fast(x), function(x), rtol=0, atol=0)
    (known,) = fast.plans.values()
    assert re.findall(r"memory = .*?\(\((\d+), \)", known.code) == ["512"]
    assert known.code.count("= empty") == 3


def test_what_is_shown_whole_is_made_as_it_is_shown(add: Callable[..., None]) -> None:
    """Not what is read in two ways, or in part, or transposed."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        whole, read, twice, in_part, turned = (torch.empty_like(x) for _ in range(5))
        for number, made in enumerate((whole, read, twice, in_part, turned)):
            add(x, made, float(number))
        shown = whole.view(6).view(3, 2), read.view(6), twice.view(6), twice.view(3, 2), in_part[1], turned.T, x.view(6)
        return *shown, read.sum()

    fast = _replayed(function)
    for _ in range(4):
        x = torch.randn(2, 3)
        found, wanted = fast(x), function(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert [one.stride() for one in found] == [one.stride() for one in wanted]
    (known,) = fast.plans.values()
    assert known.code.count("as_strided") == 6
    assert not found[0]._is_view()


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("hook", [print, SimpleNamespace(calls=[print]), SimpleNamespace(calls=[]), None])
def test_nothing_is_replayed_while_launches_have_hooks(
    overload: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, name: str, hook: Any
) -> None:
    """Functions and chains of them count, chains that are empty do not."""
    from triton import knobs

    has_some = hook is not None and (hook is print or bool(hook.calls))
    x = torch.randn(2, 3)
    for lately in (False, True):
        with torch.set_grad_enabled(not lately):
            overload(x, None, 0.5, [1, 2])
            replays = _Code.replays
            _DISPATCHED.clear()
            with monkeypatch.context() as hooked:
                hooked.setattr(knobs.runtime, name, hook)
                assert torch.equal(overload(x, None, 0.5, [1, 2]), x + 3.5)
            assert bool(_DISPATCHED) == has_some
            assert _Code.replays == replays + (not has_some)


class _Recorded(list[Any]):
    """Stands for a launcher in C."""

    def __call__(self, *given: Any) -> None:
        self.append(given)


def _launcher(kind: str, **others: Any) -> Any:
    """Triton's launcher around the stand-in, or another thing of its form."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    launcher = object.__new__(driver.CudaLauncher if kind == "triton" else type(kind, (), {}))
    settings = {
        "launch": _Recorded(), "num_ctas": 1, "launch_cooperative_grid": "cooperative", "launch_pdl": "dependent",
        "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0, "profile_scratch_align": 1,
        "gsan_enabled": False, "arg_annotations": ["kinds"], "kernel_signature": b"types",
    }  # fmt: skip
    for name, value in {**settings, **others}.items():
        setattr(launcher, name, value)
    return launcher


def test_the_launcher_in_c_gets_what_triton_gives_it(add: Callable[..., None]) -> None:
    """Of the installed version: this fails where its launcher has changed under a known number."""
    import triton

    launcher = _launcher("triton")
    code = SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")
    launcher(2, 3, 1, "stream", code.function, code.packed_metadata, None, None, None, 5, 0.5, None)
    known = launching.starter(code)
    parameters = ((5, 0.5, None),) if known.packs_parameters else (5, 0.5, None)
    known.start(2, 3, 1, "stream", *known.before, *parameters)
    if triton.__version__.startswith(("3.6.", "3.8.")):
        assert known.start is launcher.launch
    wanted, found = launcher.launch
    assert found == wanted


@pytest.mark.parametrize(
    "launcher",
    [
        lambda: _launcher("triton", global_scratch_size=64),
        lambda: _launcher("triton", profile_scratch_size=64),
        lambda: _launcher("triton", gsan_enabled=True),
        lambda: _launcher("triton", launch=lambda *given: None),
        lambda: _launcher("HIPLauncher"),
    ],
    ids=["workspace", "profile", "instrumented", "descriptors", "other"],
)
def test_launchers_that_do_more_are_not_passed_by(launcher: Callable[[], Any]) -> None:
    run = launcher()
    code = SimpleNamespace(run=run, function="function", packed_metadata="metadata")
    assert launching.starter(code) == (run, ("function", "metadata", None, None, None), False)


def test_unknown_versions_launchers_are_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.99.0")
    run = _launcher("triton")
    del run.launch, run.global_scratch_size, run.launch_pdl
    code = SimpleNamespace(run=run, function="function", packed_metadata="metadata")
    assert launching.starter(code).start is run


@pytest.fixture
def overload(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """An operator as graphs call it, which is known well enough to be replayed; counts in `_DISPATCHED`."""

    def forward(x: Tensor, y: Tensor | None, number: float, sizes: Any) -> Tensor:
        out = torch.empty_like(x)
        _LAUNCH[0](x, out, number + sum(sizes))
        return out

    def backward(grad: Tensor, x: Tensor, y: Tensor | None, number: float, sizes: Any) -> tuple[Tensor, Tensor]:
        d_x = torch.empty_like(x)
        _LAUNCH[0](grad, d_x, 0.0)
        return d_x, grad.new_empty(0)

    if not hasattr(torch.ops.vitrail, _OVERLOAD):
        register_operator(
            _OVERLOAD, "Tensor x, Tensor? y, float number, int[] sizes", ("d_x", "d_y"), forward, backward
        )
    _LAUNCH[:] = [add]
    found = getattr(torch.ops.vitrail, _OVERLOAD).default
    monkeypatch.setattr(found.replayed, "_plans", {})
    monkeypatch.setattr(found.replayed, "_expected", Latest())
    for _ in range(3):
        found(torch.randn(2, 3), None, 0.5, [1, 2])
    dispatch = OpOverload.__call__
    monkeypatch.setattr(
        OpOverload, "__call__", lambda self, *given, **more: _DISPATCHED.append(self) or dispatch(self, *given, **more)
    )
    _DISPATCHED.clear()
    yield found
    _LAUNCH.clear()


_OVERLOAD = "test_replaying_overload"
_DISPATCHED: list[Any] = []
_LAUNCH: list[Callable[..., None]] = []


def test_graphs_calls_are_replayed_past_the_dispatcher(overload: Callable[..., Tensor]) -> None:
    for sizes in ([1, 2], (1, 2)):
        x = torch.randn(2, 3)
        assert torch.equal(overload(x, None, 0.5, sizes), x + 3.5)
    with torch.no_grad():
        overload(torch.nn.Parameter(torch.randn(2, 3)), None, 0.5, [1, 2])
    assert not _DISPATCHED
    overload(torch.randn(3, 2), None, 0.5, [1, 2])
    assert _DISPATCHED


def test_graphs_calls_of_a_lately_repeated_kind_are_known_at_a_glance(
    overload: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kind is looked up once; what differs, or is on another device than the current, is not taken for one."""
    looked_up: list[Any] = []

    def find(arguments: Any, tensors: list[Tensor]) -> Any:
        looked_up.append(arguments)
        return kind_of(arguments, tensors)

    monkeypatch.setattr(overloading, "kind_of", find)
    with torch.no_grad():
        for numbers in (0.5, 1.5, 0.5, 1.5, 0.5):
            for _ in range(3):
                x = torch.randn(2, 3)
                assert torch.equal(overload(x, None, numbers, [1, 2]), x + (numbers + 3))
    assert len(looked_up) == 4  # one, and until the other is known
    replays = _Code.replays
    with torch.no_grad():
        for x in (torch.randn(3, 2), torch.randn(3, 2).T, torch.randn(8)[1:7].view(2, 3)):
            assert torch.equal(overload(x, None, 0.5, [1, 2]), x + 3.5)
        assert overload(torch.randn(2, 3, dtype=torch.float64), None, 0.5, [1, 2]).dtype == torch.float64
        assert torch.equal(overload(torch.ones(2, 3), torch.ones(1), 0.5, [1, 2]), torch.full((2, 3), 4.5))
        assert _Code.replays == replays
        with torch.autocast("cpu", torch.bfloat16):
            overload(torch.ones(2, 3), None, 0.5, [1, 2])
        with monkeypatch.context() as other:
            other.setattr(replay, "REPLAYS", False)
            overload(torch.ones(2, 3), None, 0.5, [1, 2])
        with pytest.raises(RuntimeError):
            overload(torch.ones(2, 3), None, 0.5)
    assert len(looked_up) == 4 + 8
    assert _Code.replays == replays


def test_graphs_calls_on_another_device_are_not_known_at_a_glance(
    overload: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[int | None] = [None]
    monkeypatch.setattr(planning, "_current_device", lambda: current[0])
    arguments = torch.randn(2, 3), None, 0.5, [1, 2]
    (known,) = overload.replayed._plans.values()
    repeat = known.for_kind_of(arguments)
    assert torch.equal(repeat(arguments), arguments[0] + 3.5)
    current[0] = 1
    assert repeat(arguments) is None


def test_only_the_latest_kinds_of_a_shape_are_looked_for(overload: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        for _ in range(5):
            for x, number in itertools.product((torch.randn(2, 3), torch.randn(3, 2)), range(9)):
                assert torch.equal(overload(x, None, float(number), [1, 2]), x + (number + 3))
    assert len(overload.replayed._expected) == 4 + 4


def test_kinds_of_many_shapes_are_known_at_a_glance(
    overload: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model's stages have them, one after the other, step by step."""
    maps = [torch.randn(size, 3) for size in range(1, 20)]
    with torch.no_grad():
        for _ in range(4):
            for x in maps:
                overload(x, None, 0.5, [1, 2])
        monkeypatch.setattr(overloading, "kind_of", lambda *_: pytest.fail("looked up"))
        for x in maps:
            assert torch.equal(overload(x, None, 0.5, [1, 2]), x + 3.5)


@pytest.mark.parametrize(
    "context",
    [FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True), torch.profiler.profile()],
    ids=lambda context: type(context).__name__,
)
def test_graphs_calls_that_are_watched_are_dispatched(overload: Callable[..., Tensor], context: Any) -> None:
    with context:
        overload(torch.randn(2, 3), None, 0.5, [1, 2])
    assert _DISPATCHED


def test_graphs_calls_that_are_differentiated_are_dispatched(overload: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    overload(x, None, 0.5, [1, 2]).sum().backward()
    assert _DISPATCHED
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_graphs_calls_are_checked_by_the_dispatcher(overload: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3)
    assert torch.equal(overload(x, y=None, number=0.5, sizes=[1, 2]), x + 3.5)
    for wrong in ((x, None, 0.5), (x, None, "0.5", [1, 2]), (x, None, 0.5, [1.0, 2]), (None, None, 0.5, [1, 2])):
        with pytest.raises((RuntimeError, TypeError)):
            overload(*wrong)


def test_compiled_graphs_call_past_the_dispatcher(overload: Callable[..., Tensor]) -> None:
    """Forward and backward; from the third step on all is known."""
    run = torch.compile(lambda x: overload(x * 2, None, 0.5, [1, 2]) * 3, backend="aot_eager", fullgraph=True)
    for step in range(4):
        x = torch.randn(2, 3, requires_grad=True)
        _DISPATCHED.clear()
        out = run(x)
        torch.testing.assert_close(out, 3 * (2 * x + 3.5))
        out.sum().backward()
        assert torch.equal(x.grad, torch.full((2, 3), 6.0))
        assert step < 3 or not [one for one in _DISPATCHED if one.namespace == "vitrail"]


@pytest.mark.skipif(not TRITON_INTERPRETED, reason="on a GPU kernels run")
@pytest.mark.parametrize("operator", [*CALLS, "routing_attention_lepe"])
def test_every_operator_can_be_repeated(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that they do around their launches, in every way in which these are compiled; nothing is launched here."""
    from triton.runtime.interpreter import InterpretedFunction

    seen = []

    def run(replayed: replay.Replayed, kind: Any, tensors: list[Tensor], arguments: list[Any]) -> Any:
        recorder = replay._Recorder(tensors)
        with recorder:
            result = replayed.function(*arguments)
        seen.append((replayed.function.__name__, recorder.repeatable))
        return result

    monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **options: None)
    monkeypatch.setattr(replay.Replayed, "run", run)
    monkeypatch.setattr(settings, "default_backend", "triton")
    if operator in CALLS:
        CALLS[operator].run(torch.bfloat16, CALLS[operator].usual)
    else:
        for case in _lepe_cases():
            inputs = [one.make(torch.device("cpu"), torch.bfloat16, seed) for seed, one in enumerate(case.inputs)]
            _step(case.implementations["vitrail"].run, inputs)
    assert operator == "retention" or {name for name, _ in seen} >= {"_forward", "_backward"}
    assert [name for name, repeatable in seen if not repeatable] == []


_MEASURED = [name for name in OPERATORS if name != "routing_layer"]


@pytest.mark.skipif(not TRITON_INTERPRETED, reason="on a GPU kernels are compiled")
@pytest.mark.parametrize("operator", [*_MEASURED, "routing_attention_lepe"])
def test_every_operator_replays_in_the_interpreter(
    operator: str, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_replays(operator, "cpu", torch.float16, False, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["direct", "compiled"])
@pytest.mark.parametrize("operator", _MEASURED)
def test_every_operator_replays_what_it_did(operator: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled code the first steps are called by the dispatcher, below autograd."""
    torch._dynamo.reset()
    _check_replays(operator, "host", torch.bfloat16, compiled, monkeypatch)


def _check_replays(
    operator: str, suite: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps on other numbers, forward and backward, to the last bit; from the third on they are replayed."""
    device, plans, shortcuts = torch.device("cuda" if suite == "host" else "cpu"), [], []
    run_shortcut = _Shortcut.run
    monkeypatch.setattr(_Shortcut, "run", lambda one, given: shortcuts.append(one) or run_shortcut(one, given))
    run_plan = replay.Plan.run
    monkeypatch.setattr(replay.Plan, "run", lambda plan, given: plans.append(plan) or run_plan(plan, given))
    for case in OPERATORS[operator](suite) if operator in OPERATORS else _lepe_cases():
        for name, implementation in case.implementations.items():
            if not name.startswith("vitrail"):
                continue
            plans.clear()
            shortcuts.clear()
            run = implementation.run
            if compiled:
                run = torch.compile(run, backend="aot_eager", dynamic=False)
            inputs = [one.make(device, dtype, seed) for seed, one in enumerate(case.inputs)]
            for _ in range(4 if compiled else 3):
                given = [_other(one) if torch.is_tensor(one) else one for one in implementation.prepare(*inputs)]
                monkeypatch.setattr(replay, "REPLAYS", False)
                wanted = _step(run, given)
                monkeypatch.setattr(replay, "REPLAYS", True)
                found = _step(run, given)
                assert all(map(torch.equal, found, wanted)), name
            # The backward of `mlp` launches no kernel of ours.
            assert len(set(plans)) >= (1 if operator == "mlp" else 2), name
            assert bool(shortcuts) != compiled, name


def _lepe_cases() -> Iterator[Any]:
    """Of the operator that the benchmark measures as a part of BiFormer's layer; regions leave room on the second."""
    routes = torch.tensor([2, 3]).expand(1, 4, 2)

    def run(qkv: Tensor, pads: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return routing_attention_lepe(qkv, routes, weight, bias, n_regions=2, pads=pads)

    for size in (8, 7):
        inputs = normal(1, size, size, 3, 2, 16), normal(3, 2, 16), normal(32, 1, 3, 3), normal(32)
        prepared = SimpleNamespace(run=run, prepare=lambda *given: given)
        yield SimpleNamespace(inputs=inputs, implementations={"vitrail": prepared})


def _other(given: Tensor) -> Tensor:
    """Other numbers of the same kind, at another place; tables and the like stay."""
    if not given.is_floating_point():
        return given.clone()
    return (given.detach() * torch.rand_like(given.detach())).requires_grad_()


def _step(run: Callable[..., Tensor], given: list[Any]) -> list[Tensor]:
    out = run(*given)
    leaves = [one for one in given if torch.is_tensor(one) and one.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach()))]
