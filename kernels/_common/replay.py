"""Replays what an implementation did for the same kind of call: allocations, launches, a few operators of PyTorch.

The Python code around the kernels of an operator decides how a call is cut into programs and calls that need no
result from the device: all that it does follows from its arguments' shapes, strides, dtypes, alignment and from its
other arguments. It takes several times as long as the launches themselves. So the second call of a kind is recorded,
and from the third on its steps are repeated on the tensors at hand, without that code:

- an allocation: a tensor of the same shape and dtype;
- a view: made if more than launches read it, for which an address is enough;
- another operator of PyTorch: called again;
- a launch: the same compiled code, grid and numbers, with the addresses of this call.

The recorder sees every operator of PyTorch (it is a dispatch mode) and every launch (`launch` tells it). Where it meets
something that it cannot repeat, such as a number read from a tensor, the call's kind is never replayed. Nothing is
replayed in Triton's interpreter, nor are calls without a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrail.kernels._common.dispatch import TRITON_INTERPRETED
from vitrail.kernels._common.kinds import MOST_REMEMBERED, Memory, kind_of
from vitrail.kernels._common.launch import starter, tells_of_launches

REPLAYS = not TRITON_INTERPRETED
_ALLOCATES = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
}


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, an operator's implementation, whose calls are recorded and replayed.

    Its tensors must be plain ones, and no mode may be active; see `is_watched`.
    """
    plans = Memory(MOST_REMEMBERED)  # of `_Plan`, or True: to be recorded, or False: not to be replayed

    def call(*arguments: Any) -> Any:
        if not REPLAYS:
            return function(*arguments)
        key = _replayed_kind(arguments)
        plan = plans.get(key)
        if plan is None:
            plans[key] = True
        elif plan is True and _are_distinct(arguments):
            result, recorded = _record(function, arguments)
            plans[key] = recorded or False
            return result
        elif isinstance(plan, _Plan):
            return plan.run(arguments)
        return function(*arguments)

    return call


def _replayed_kind(arguments: Sequence[Any]) -> Hashable:
    """The kind of a call, with what else changes its steps: autocast, and which tensors start at multiples of 16 bytes.

    The former may change what operators of PyTorch compute, the latter how a kernel is compiled.
    """
    starts = [argument.data_ptr() & 15 for argument in arguments if isinstance(argument, Tensor)]
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return (kind_of(arguments), *starts, autocast)


def _are_distinct(arguments: Sequence[Any]) -> bool:
    """Whether no tensor is given twice: the recorder could not tell which of the two arguments a step takes."""
    tensors = [id(argument) for argument in arguments if isinstance(argument, Tensor)]
    return len(set(tensors)) == len(tensors)


def _record(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, _Plan | None]:
    """The result of a call, and how to repeat it, if that is possible."""
    recorder = _Recorder(arguments)
    with recorder, tells_of_launches(recorder.add_launch):
        result = function(*arguments)
    return result, recorder.plan(result)


class _Recorder(TorchDispatchMode):
    """Writes down the steps of one call. Its values are the call's arguments and, behind them, the steps' results."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.n_arguments = len(arguments)
        self.values: list[Any] = list(arguments)
        self.held: list[Tensor] = []  # with the values, so that no identity or address is used twice
        self.places = {id(value): place for place, value in enumerate(arguments) if isinstance(value, Tensor)}
        self.roots: dict[int, int] = {}  # of views: the place of the tensor whose memory they show
        self.steps: list[_Allocation | _View | _Operation | _Launch] = []
        self.repeatable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        given = {position: self.places.get(id(arg), -1) for position, arg in enumerate(args) if _is_tensor(arg)}
        others = tree_leaves(([arg for arg in args if not _is_tensor(arg)], kwargs))
        unknown = -1 in given.values() or any(map(_is_tensor, others)) or not all(map(_is_tensor, results))
        if unknown or _depends_on_contents(func, given, self.values, results):
            self.repeatable = False
            return result
        if func is torch.ops.aten.detach.default:  # a mode makes `torch.empty` end with one
            self.places[id(result)] = given[0]
            self.held.append(result)
            return result
        places = [self._place(one) for one in results]
        if all(place in given.values() for place in places) and not func._schema.is_mutable:
            return result  # such as the `contiguous` of what is contiguous
        # Below autograd `reshape` and `contiguous` are seen as they were called, and may have made a copy.
        is_view = all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns) and all(
            _share_memory(one, self.values[given[0]]) for one in results
        )
        if is_view:
            root = self.roots.get(given[0], given[0])  # whose address tells theirs
            if any(one.dtype != self.values[root].dtype for one in results):
                self.repeatable = False
            self.roots.update((place, root) for place in places)
            self.steps.extend(_View(self.values[root], root, one, at) for one, at in zip(results, places, strict=True))
        elif func.overloadpacket in _ALLOCATES and result.is_contiguous():
            self.steps.append(_Allocation(result, places[0]))
        else:
            self.steps.append(_Operation(func, args, kwargs, given, places, isinstance(result, (tuple, list))))
        return result

    def _place(self, tensor: Tensor) -> int:
        """Where a value stands; an operator that works in place returns one that is there already."""
        if id(tensor) not in self.places:
            self.places[id(tensor)] = len(self.values)
            self.values.append(tensor)
        return self.places[id(tensor)]

    def add_launch(self, code: Any, grid: tuple[int, ...], parameters: tuple[Any, ...]) -> None:
        addresses = []
        for position, argument in enumerate(parameters):
            if not isinstance(argument, Tensor) or argument.numel() == 0:
                continue
            place = self.places.get(id(argument))
            if place is None:
                self.repeatable = False
                return
            root = self.roots.get(place, place)
            addresses.append((position, root, argument.data_ptr() - self.values[root].data_ptr()))
        start = starter(code, grid, parameters[0].device)
        numbers = [0 if isinstance(parameter, Tensor) else parameter for parameter in parameters]
        self.steps.append(_Launch(start, numbers, addresses))

    def plan(self, result: Any) -> _Plan | None:
        """The steps that the result takes, unless they cannot be repeated."""
        several = isinstance(result, tuple)
        places = [self.places.get(id(one), -1) for one in (result if several else (result,))]
        if not self.repeatable or -1 in places or not any(isinstance(step, _Launch) for step in self.steps):
            return None
        read = {place for step in self.steps if isinstance(step, _Operation) for place in step.given.values()}
        steps = [step for step in self.steps if not isinstance(step, _View) or step.place in read.union(places)]
        device = next(value.device for value in self.values if isinstance(value, Tensor))
        return _Plan(steps, len(self.values) - self.n_arguments, places if several else places[0], device)


def _depends_on_contents(func: Any, given: dict[int, int], values: list[Any], results: Sequence[Any]) -> bool:
    """Whether the host may learn a tensor's numbers: by the shapes of results, or by a copy off the device."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    devices = {values[place].device for place in given.values()}
    return not tags.isdisjoint(func.tags) or any(devices - {one.device} for one in results)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@functools.cache
def _scalar(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((), dtype=dtype, device=device)


class _Allocation:
    """Makes a contiguous tensor; `torch.empty_like` takes a third of the time of `torch.empty`."""

    def __init__(self, made: Tensor, place: int) -> None:
        self.like = _scalar(made.dtype, made.device).expand(made.shape)
        self.place = place

    def run(self, values: list[Any]) -> None:
        values[self.place] = torch.empty_like(self.like, memory_format=torch.contiguous_format)


class _View:
    """Shows a part of another tensor's memory; however many views lie between the two, it is one."""

    def __init__(self, root: Tensor, root_place: int, view: Tensor, place: int) -> None:
        self.root_place, self.place = root_place, place
        self.shape, self.strides = view.shape, view.stride()
        self.offset = view.storage_offset() - root.storage_offset()

    def run(self, values: list[Any]) -> None:
        root = values[self.root_place]
        values[self.place] = root.as_strided(self.shape, self.strides, root.storage_offset() + self.offset)


class _Operation:
    """Calls an operator of PyTorch."""

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        given: dict[int, int],
        places: Sequence[int],
        several: bool,
    ) -> None:
        self.func, self.kwargs, self.places, self.several = func, kwargs, places, several
        self.args = [None if position in given else arg for position, arg in enumerate(args)]
        self.given = given

    def run(self, values: list[Any]) -> None:
        args = self.args.copy()
        for position, place in self.given.items():
            args[position] = values[place]
        result = self.func(*args, **self.kwargs)
        if self.several:
            for place, one in zip(self.places, result, strict=True):
                values[place] = one
        else:
            values[self.places[0]] = result


class _Launch:
    """Launches compiled code."""

    def __init__(self, start: Callable[..., None], numbers: list[Any], addresses: list[tuple[int, int, int]]) -> None:
        self.start, self.numbers, self.addresses = start, numbers, addresses

    def run(self, values: list[Any]) -> None:
        arguments = self.numbers.copy()
        for position, place, offset in self.addresses:
            arguments[position] = values[place].data_ptr() + offset
        self.start(arguments)


class _Plan:
    """The steps of a call."""

    def __init__(self, steps: list[Any], n_results: int, result: int | list[int], device: torch.device) -> None:
        self.steps = [step.run for step in steps]
        self.room = [None] * n_results
        self.result = result
        self.device = device

    def run(self, arguments: Sequence[Any]) -> Any:
        """Repeats the call with other tensors of the same kind."""
        if self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self._run(arguments)
        return self._run(arguments)

    def _run(self, arguments: Sequence[Any]) -> Any:
        values = [*arguments, *self.room]
        for run in self.steps:
            run(values)
        if isinstance(self.result, int):
            return values[self.result]
        return tuple([values[place] for place in self.result])
