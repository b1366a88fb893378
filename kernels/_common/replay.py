"""Replays what an implementation did for the same kind of call: allocations, launches, a few operators of PyTorch.

The Python code around the kernels of an operator decides how a call is cut into programs and calls that need no
result from the device: all that it does follows from its arguments' shapes, strides, dtypes, alignment and from its
other arguments. It takes several times as long as the launches themselves. So the second call of a kind is recorded,
and from the third on its steps are repeated on the tensors at hand, without that code:

- an allocation: a tensor of the same shape and dtype; those that launches alone read and write are parts of one;
- a view: made if more than launches read it, for which an address is enough, and if the tensor cannot be made as it is
  shown;
- another operator of PyTorch: called again;
- a launch: the same compiled code, grid and numbers, with the addresses of this call.

The recorder sees every operator of PyTorch (it is a dispatch mode) and every launch (`launch` tells it). Where it meets
something that it cannot repeat, such as a number read from a tensor, the call's kind is never replayed. Nothing is
replayed in Triton's interpreter or while Triton has launch hooks, nor are calls without a launch. `plan.py` tells how
the steps are repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrail.kernels._common.dispatch import TRITON_INTERPRETED
from vitrail.kernels._common.kinds import MOST_REMEMBERED, Latest, Memory
from vitrail.kernels._common.launch import has_launch_hooks, starter, stream_getter, tells_of_launches
from vitrail.kernels._common.plan import Allocation, Launch, Operation, Plan, Step, View, Writer

REPLAYS = not TRITON_INTERPRETED
_LARGE = 10 * 2**20  # bytes that PyTorch's allocator keeps apart, for other tensors of about this size to use again
_ALLOCATES = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
}


class Replayed:
    """An operator's implementation, whose calls are recorded and replayed where their kind is known.

    No mode may be active; see `direct_kind`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._plans = Memory(MOST_REMEMBERED)  # True: to be recorded; False: not to be replayed
        self._expected = Latest()

    def plan_of(self, kind: Hashable) -> Plan | None:
        """How calls of a kind are replayed, if that is known."""
        plan = self._plans.get(kind) if REPLAYS else None
        return plan if isinstance(plan, Plan) and not has_launch_hooks() else None

    def expect(self, plan: Plan, arguments: Sequence[Any]) -> None:
        """Makes `run_expected` know calls like one that a plan has repeated, which nothing but a graph has made."""
        repeat = plan.for_kind_of(arguments)
        if repeat is not None:
            self._expected.add(arguments, repeat)

    def run_expected(self, arguments: Sequence[Any]) -> Any:
        """The result of a call of one of the kinds that were lately expected, or None; see `Plan.for_kind_of`."""
        return self._expected(arguments) if REPLAYS and not has_launch_hooks() else None

    def run(self, kind: Hashable, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> Any:
        """The result of a call; its kind and its tensors are those that `kind_of` finds."""
        plan = self._plans.get(kind) if REPLAYS else False
        if isinstance(plan, Plan) and not has_launch_hooks():
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
        self.steps: list[Step] = []
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
            self.steps.extend(View(self.values[root], root, one, at) for one, at in zip(results, places, strict=True))
        elif func.overloadpacket in _ALLOCATES and result.is_contiguous() and result.device == self.values[0].device:
            self.steps.append(Allocation(result, places[0]))
        else:
            self.steps.append(Operation(func, args, kwargs, given, places, isinstance(result, (tuple, list))))
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
        numbers = [0 if isinstance(parameter, Tensor) else parameter for parameter in parameters]
        self.steps.append(Launch(starter(code), grid, numbers, addresses))

    def plan(self, result: Any) -> Plan | None:
        """The steps that the result takes, unless they cannot be repeated."""
        several = isinstance(result, tuple)
        places = [self.places.get(id(one), -1) for one in (result if several else (result,))]
        if not self.repeatable or -1 in places or not any(isinstance(step, Launch) for step in self.steps):
            return None
        read = {place for step in self.steps if isinstance(step, Operation) for place in step.given.values()}
        read.update(places)  # by more than launches
        writer = Writer(self.values[0].device, self.n_given)
        writer.add(f"stream = {writer.constant(stream_getter(), 'stream')}({writer.device.index})")
        for step in self._steps_for(read, places, writer):
            step.write(writer)
        return Plan(writer, places if several else places[0])

    def _steps_for(self, read: set[int], results: Sequence[int], writer: Writer) -> list[Step]:
        """The steps that are needed, but for those of which the writer has taken care."""
        views = [step for step in self.steps if isinstance(step, View) and step.place in read]
        shown = [view.root_place for view in views]
        alone = {view.root_place: view for view in views if view.shows_all and shown.count(view.root_place) == 1}
        done: list[Step] = [step for step in self.steps if isinstance(step, View) and step not in views]
        scratch: list[Allocation] = []
        for step in self.steps:
            if not isinstance(step, Allocation):
                continue
            if self._is_kept(step.place, results):
                writer.keep(step.place, self.values[step.place])
                done.append(step)
            elif step.place not in {*read, *shown}:
                if step.n_bytes < _LARGE:
                    scratch.append(step)
            elif step.place not in read and step.place in alone:
                writer.make_as(step, alone[step.place])
                done.append(alone[step.place])
        writer.add_scratch(scratch)
        return [step for step in self.steps if step not in (*done, *scratch)]

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
