"""Shortcuts: a public function's later calls of a kind go straight to the operator that an earlier one came to.

A public function checks its arguments, chooses the backend, casts under autocast, and calls an operator. What it does
depends on nothing but the kind of the call; see `kind_of`. So it is watched at the first call of a kind: which operator
does it call, with which of its tensors and which numbers, and is the operator's result its own? Later calls of the kind
then are a look-up, or a glance where it was met lately, and the operator's call; where tensors were cast or reshaped
before it, that is done again. Calls that something else watches are not shortened, nor are those that come to no
operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vitrail.kernels._common.direct import someone_watches
from vitrail.kernels._common.dispatch import settings
from vitrail.kernels._common.kinds import MOST_REMEMBERED, Latest, Memory, any_autocast, kind_of, recognizer
from vitrail.kernels._common.registration import Operator
from vitrail.kernels._common.replay import are_distinct
from vitrail.kernels._common.written import Answer

_PREPARES = {Tensor.to, Tensor.float, Tensor.flatten, Tensor.select, Tensor.__getitem__}  # make one tensor of another
_READ = {  # what a tensor holds, on which later calls may not depend
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.equal, Tensor.allclose, torch.equal, torch.allclose),
}
_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


def shortened(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """`function`, a public one, whose calls of a known kind go straight to its operator."""
    known = Memory(MOST_REMEMBERED)  # of `_Shortcut`, or None where a call of this kind has none
    latest = Memory(MOST_REMEMBERED)  # of `Latest` with shortcuts, by all that is no argument

    @functools.wraps(function)
    def call(*arguments: _Given.args, **options: _Given.kwargs) -> _Found:
        if someone_watches() or settings.recorder is not None:
            return function(*arguments, **options)
        given, others = (*arguments, *options.values()), (*options, settings.default_backend)
        is_usual = not any_autocast()
        if is_usual and others in latest:
            found = latest[others](given)
            if found is not None:
                return found[0].run(found[1])
        tensors: list[Tensor] = []
        kind = kind_of(given, tensors)
        if kind is None:
            return function(*arguments, **options)
        key = (kind, *others)
        shortcut = known.get(key)
        if shortcut is not None:
            recognize = shortcut.recognizer(given) if is_usual else None
            if recognize is not None:
                if others not in latest:
                    latest[others] = Latest()
                latest[others].add(given, recognize)
            return shortcut.run(tensors)
        if key in known or not are_distinct(tensors):
            return function(*arguments, **options)
        with _Recorder(tensors) as recorder:
            result = function(*arguments, **options)
        known[key] = recorder.shortcut(result)
        return result

    return call


class _Recorder(TorchFunctionMode):
    """Watches what a public function does with its tensors, until that cannot be repeated.

    Its values are the tensors, distinct ones, and what is made of them.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.values = list(tensors)
        self.steps: list[_Step] = []
        self.operator: Operator | None = None
        self.arguments: Sequence[Any] = ()
        self.result: Any = None
        self.repeatable = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _READ:
            self.repeatable = False
        elif self.repeatable and isinstance(result, Tensor) and self._place(result) is None:
            operator = _operator(func)
            source = self._place(args[0]) if func in _PREPARES else None
            if operator is not None and self.operator is None:
                self.operator, self.arguments, self.result = operator, args, result
            elif source is not None and not any(isinstance(one, Tensor) for one in tree_leaves((args[1:], kwargs))):
                self.steps.append(_Step(func, source, args[1:], kwargs or {}, len(self.values)))
                self.values.append(result)
            else:
                self.repeatable = False
                self.values.clear()
        return result

    def _place(self, tensor: Any) -> int | None:
        return next((place for place, value in enumerate(self.values) if value is tensor), None)

    def shortcut(self, result: Any) -> _Shortcut | None:
        """The way to the result, if it is an operator's and all of the way is known."""
        if not self.repeatable or self.operator is None or self.result is not result:
            return None
        places: dict[int, int] = {}
        for position, argument in enumerate(self.arguments):
            if isinstance(argument, Tensor):
                place = self._place(argument)
                if place is None:
                    return None
                places[position] = place
        kind = kind_of(self.arguments, [])
        if kind is None:
            return None
        return _Shortcut(self.operator, kind, self.arguments, places, self._steps_to(places.values()), len(self.steps))

    def _steps_to(self, places: Iterable[int]) -> list[_Step]:
        """The steps that are needed for the values at `places`: not those that were for checks alone."""
        needed, steps = set(places), []
        for step in reversed(self.steps):
            if step.place in needed:
                needed.add(step.source)
                steps.append(step)
        return steps[::-1]


def _operator(func: Any) -> Operator | None:
    """The operator that a function of PyTorch stands for, if it is one of ours."""
    return getattr(getattr(func, "default", None), "operator", None) if isinstance(func, OpOverloadPacket) else None


class _Step:
    """Makes a tensor of another."""

    def __init__(self, func: Any, source: int, args: Sequence[Any], kwargs: dict[str, Any], place: int) -> None:
        self.func, self.source, self.args, self.kwargs, self.place = func, source, args, kwargs, place

    def run(self, values: list[Any]) -> None:
        values[self.place] = self.func(values[self.source], *self.args, **self.kwargs)


class _Shortcut:
    """How a public function's tensors come to an operator, and what else that is given."""

    def __init__(
        self,
        operator: Operator,
        kind: Hashable,
        arguments: Sequence[Any],
        places: dict[int, int],
        steps: list[_Step],
        n_made: int,
    ) -> None:
        self.operator, self.kind = operator, kind
        self.arguments = [None if isinstance(one, Tensor) else one for one in arguments]
        self.places = list(places.items())
        self.steps, self.room = steps, [None] * n_made
        self._recognize: Answer | bool | None = False  # not written yet

    def recognizer(self, given: Sequence[Any]) -> Answer | None:
        """A function that recognises calls of the public function like one that has come to this shortcut."""
        if isinstance(self._recognize, bool):
            self._recognize = recognizer(given, self)
        return self._recognize

    def run(self, values: list[Any]) -> Tensor:
        """The operator's result for the public function's tensors, in their order."""
        if self.steps:
            values += self.room
            for step in self.steps:
                step.run(values)
        arguments, tensors = self.arguments.copy(), []
        for position, place in self.places:
            tensor = arguments[position] = values[place]
            tensors.append(tensor)
        return self.operator.run(self.kind, tensors, arguments)
