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
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrail.kernels._common.dispatch import TRITON_INTERPRETED
from vitrail.kernels._common.kinds import MOST_REMEMBERED, Memory
from vitrail.kernels._common.launch import starter, tells_of_launches

REPLAYS = not TRITON_INTERPRETED
_ALLOCATES = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
}
_empty_strided_cuda: Callable[..., Tensor] | None = getattr(guards, "_empty_strided_cuda", None)


class Replayed:
    """An operator's implementation, whose calls are recorded and replayed where their kind is known.

    No mode may be active; see `direct_kind`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._plans = Memory(MOST_REMEMBERED)  # True: to be recorded; False: not to be replayed

    def plan_of(self, kind: Hashable) -> Plan | None:
        """How calls of a kind are replayed, if that is known."""
        plan = self._plans.get(kind) if REPLAYS else None
        return plan if isinstance(plan, Plan) else None

    def run(self, kind: Hashable, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> Any:
        """The result of a call; its kind and its tensors are those that `kind_of` finds."""
        plan = self._plans.get(kind) if REPLAYS else False
        if isinstance(plan, Plan):
            return plan.run(tensors)
        if plan is None:
            self._plans[kind] = True
        elif plan is True and are_distinct(tensors):
            result, recorded = _record(self.function, arguments, tensors)
            self._plans[kind] = recorded or False
            return result
        return self.function(*arguments)


def are_distinct(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor is given twice: the recorder could not tell which of the two a step takes."""
    return len(set(map(id, tensors))) == len(tensors)


def _record(
    function: Callable[..., Any], arguments: Sequence[Any], tensors: Sequence[Tensor]
) -> tuple[Any, Plan | None]:
    """The result of a call, and how to repeat it, if that is possible."""
    recorder = _Recorder(tensors)
    with recorder, tells_of_launches(recorder.add_launch):
        result = function(*arguments)
    return result, recorder.plan(result)


class _Recorder(TorchDispatchMode):
    """Writes down the steps of one call. Its values are the call's tensors and, behind them, the steps' results."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.n_given = len(tensors)
        self.values = list(tensors)
        self.held: list[Tensor] = []  # with the values, so that no identity or address is used twice
        self.places = {id(tensor): place for place, tensor in enumerate(tensors)}
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
        shown = None if func._schema.is_mutable else self._shown(given.values(), results)
        if shown is not None:
            root = self.roots.get(shown, shown)  # whose address tells theirs
            if any(one.dtype != self.values[root].dtype for one in results):
                self.repeatable = False
            self.roots.update((place, root) for place in places)
            self.steps.extend(_View(self.values[root], root, one, at) for one, at in zip(results, places, strict=True))
        elif func.overloadpacket in _ALLOCATES and result.is_contiguous():
            self.steps.append(_Allocation(result, places[0]))
        else:
            self.steps.append(_Operation(func, args, kwargs, given, places, isinstance(result, (tuple, list))))
        return result

    def _shown(self, places: Iterable[int], results: Sequence[Tensor]) -> int | None:
        """The place of the tensor that the results are views of, if they are.

        A schema does not tell: below autograd (`torch.inference_mode`, compiled graphs) the recorder meets operators
        such as `aten.contiguous` and `aten.to`, which by their schemas return a view, but may copy.
        """
        memories = {one.untyped_storage().data_ptr() for one in results}
        return next((place for place in places if memories == {self.values[place].untyped_storage().data_ptr()}), None)

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

    def plan(self, result: Any) -> Plan | None:
        """The steps that the result takes, unless they cannot be repeated."""
        several = isinstance(result, tuple)
        places = [self.places.get(id(one), -1) for one in (result if several else (result,))]
        if not self.repeatable or -1 in places or not any(isinstance(step, _Launch) for step in self.steps):
            return None
        read = {place for step in self.steps if isinstance(step, _Operation) for place in step.given.values()}
        steps = [step for step in self.steps if not isinstance(step, _View) or step.place in read.union(places)]
        room: list[Tensor | None] = [None] * (len(self.values) - self.n_given)
        for step in self.steps:
            if isinstance(step, _Allocation) and self._is_kept(step.place, places):
                room[step.place - self.n_given] = self.values[step.place]
                steps.remove(step)
        return Plan(steps, room, places if several else places[0], self.values[0].device)

    def _is_kept(self, place: int, results: Sequence[int]) -> bool:
        """Whether a value need not be made anew: it holds nothing, and is the gradient of nothing if it is a result."""
        return self.values[place].numel() == 0 and (place not in results or self.values[place].dim() == 1)


def _depends_on_contents(func: Any, given: dict[int, int], values: list[Any], results: Sequence[Any]) -> bool:
    """Whether the host may learn a tensor's numbers: by the shapes of results, or by a copy off the device."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    devices = {values[place].device for place in given.values()}
    return not tags.isdisjoint(func.tags) or any(devices - {one.device} for one in results)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class _Allocation:
    """Makes a contiguous tensor on the current device, on GPUs as compiled graphs do: past all of PyTorch's layers."""

    def __init__(self, made: Tensor, place: int) -> None:
        self.place = place
        if made.is_cuda and _empty_strided_cuda is not None:
            self.make = functools.partial(_empty_strided_cuda, tuple(made.shape), made.stride(), made.dtype)
        else:
            self.make = functools.partial(torch.empty, made.shape, dtype=made.dtype, device=made.device)

    def run(self, values: list[Any]) -> None:
        values[self.place] = self.make()


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


class Plan:
    """The steps of a call."""

    def __init__(
        self, steps: list[Any], room: Sequence[Tensor | None], result: int | list[int], device: torch.device
    ) -> None:
        self.steps = [step.run for step in steps]
        self.room = room
        self.result = result
        self.device = device

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Repeats the call with other tensors of the same kind."""
        if self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self._run(tensors)
        return self._run(tensors)

    def _run(self, tensors: Sequence[Tensor]) -> Any:
        values = [*tensors, *self.room]
        for run in self.steps:
            run(values)
        if isinstance(self.result, int):
            return values[self.result]
        return tuple([values[place] for place in self.result])
