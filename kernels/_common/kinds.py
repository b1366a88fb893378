"""Kinds of calls: what calls have in common whose tensors differ only in their contents and in where they lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vitrail.kernels._common.written import Answer, Names, compiled, text_of

MOST_REMEMBERED = 1024  # kinds of one operator's calls
_MOST_LATEST = 4  # of one shape; with more it is quicker to look up a call's kind
_PLAIN_TENSORS = frozenset((Tensor, Parameter))
_NO_TENSORS = frozenset((type(None), bool, int, float, str))
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


class Memory(dict[Any, Any]):
    """A dictionary that forgets everything where one more would be more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.most and key not in self:
            self.clear()
        super().__setitem__(key, value)


def kind_of(arguments: Iterable[Any], tensors: list[Tensor]) -> tuple[Hashable, ...] | None:
    """Equal for two calls if they agree in all but what their tensors hold and, nearly, where these lie.

    Tensors agree in shape, strides, dtype, device and in where they start between multiples of 16 bytes, on which a
    kernel's code depends; numbers are told apart as 1, 1.0 and True are. What autocast is set to counts, too.

    Args:
        arguments: Tensors, numbers, texts, None, and sequences of these.
        tensors: Receives the tensors, in their order.

    Returns:
        None if the arguments hold more than these, such as a subclass of a tensor or a symbolic size.
    """
    found: list[Any] = []
    if not _describe(arguments, tensors, found):
        return None
    if any_autocast():
        found += ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return tuple(found)


def lines_of_kind(arguments: Sequence[Any], constant: Callable[[Any], str]) -> list[str] | None:
    """The first lines of a function of `arguments` that returns None where `kind_of` would not be the same for others.

    The lines that follow have the tensors in t0, t1 and so on, and their addresses in p0, p1 and so on. Where autocast
    is on such a function must not be called. Looking at arguments takes two thirds of the time of finding their kind.

    Args:
        arguments: Of a call that has a kind.
        constant: See `Names`.

    Returns:
        None if the arguments hold numbers that are not equal to themselves.
    """
    return _Conditions(constant).lines(arguments)


class _Conditions:
    """What is asked of arguments, in the order in which it is asked."""

    def __init__(self, constant: Callable[[Any], str]) -> None:
        self._constant = constant
        self._unpacking: list[str] = []  # lines that give names to all that the arguments hold
        self._shapes: list[str] = []  # come first: a call of another kind is mostly seen as such by them
        self._others: list[str] = []
        self._addresses: list[str] = []
        self._aligned: list[str] = []

    def lines(self, arguments: Sequence[Any]) -> list[str] | None:
        if not self._unpack("arguments", arguments, f"len(arguments) != {len(arguments)}"):
            return None
        return [
            *self._unpacking,
            f"if not ({' and '.join(self._shapes + self._others)}): return None",
            *self._addresses,
            f"if not ({' and '.join(self._aligned) or True}): return None",
        ]

    def _unpack(self, name: str, values: Sequence[Any], differs: str) -> bool:
        """Gives names to the values of a sequence, unless it differs, and asks of each; whether that can be asked."""
        place = len(self._unpacking)
        self._unpacking += (f"if {differs}: return None", "")  # before the lines of the sequences in it
        names = []
        for position, value in enumerate(values):
            if type(value) in _PLAIN_TENSORS:
                names.append(f"t{len(self._aligned)}")
                self._add_tensor(value)
            else:
                names.append(f"{name}_{position}")
                if not self._add(names[-1], value):
                    return False
        self._unpacking[place + 1] = f"[{', '.join(names)}] = {name}"
        return True

    def _add_tensor(self, tensor: Tensor) -> None:
        name, address, constant = f"t{len(self._aligned)}", f"p{len(self._aligned)}", self._constant
        self._shapes.append(f"type({name}) is {constant(type(tensor))} and {name}.shape == {constant(tensor.shape)}")
        self._others.append(
            f"{name}.stride() == {constant(tensor.stride())} and {name}.dtype is {constant(tensor.dtype)}"
            f" and {name}.device == {constant(tensor.device)} and not {name}.is_neg()"
        )
        self._addresses.append(f"{address} = {name}.data_ptr()")
        self._aligned.append(f"{address} & 15 == {tensor.data_ptr() & 15}")

    def _add(self, name: str, value: Any) -> bool:
        """Asks of what is no tensor."""
        constant, kind = self._constant, type(value)
        same_type = f"type({name}) is {constant(kind)}"
        if isinstance(value, (tuple, list)):
            kinds = tuple(map(type, value))
            if not _NO_TENSORS.issuperset(kinds):
                return self._unpack(name, value, f"not {same_type} or len({name}) != {len(value)}")
            same_type += f" and (*map(type, {name}),) == {constant(kinds)}"
            name, value = f"(*{name},)", tuple(value)
        self._others.append(same_type)
        if value is not None:
            self._others.append(f"{name} == {constant(value)}")
        return bool(value == value)


def recognizer(arguments: Sequence[Any], value: Any) -> Answer | None:
    """A function that answers arguments of the kind of others by a value and their tensors; see `lines_of_kind`."""
    names, tensors = Names(), list[Tensor]()
    lines = lines_of_kind(arguments, names.constant)
    if lines is None or kind_of(arguments, tensors) is None:
        return None
    given = ", ".join(f"t{place}" for place in range(len(tensors)))
    lines.append(f"return {names.constant(value)}, [{given}]")
    return compiled(text_of("recognize", "arguments", lines), names.objects)


class Latest:
    """Functions that answer calls of one kind each: for every shape of a first tensor the few that were called lately.

    Models go through the shapes of their stages in turn, and through few kinds at each.
    """

    def __init__(self) -> None:
        self._answers = Memory(MOST_REMEMBERED)  # lists, the latest first

    def add(self, arguments: Sequence[Any], answer: Answer) -> None:
        """Puts a function that answers such arguments first, where it may be already."""
        shape = _first_shape(arguments)
        others = [one for one in self._answers.get(shape, ()) if one is not answer]
        self._answers[shape] = [answer, *others[: _MOST_LATEST - 1]]

    def __len__(self) -> int:
        return sum(map(len, self._answers.values()))

    def __call__(self, arguments: Sequence[Any]) -> Any:
        """The answer to a call's arguments, if one of the functions has any."""
        for place, answer in enumerate(self._answers.get(_first_shape(arguments), ())):
            found = answer(arguments)
            if found is not None:
                if place > 0:
                    self.add(arguments, answer)
                return found
        return None


def _first_shape(arguments: Sequence[Any]) -> Hashable:
    """Shape of the first argument, if that is a tensor whose sizes are certainly numbers."""
    return arguments[0].shape if arguments and type(arguments[0]) in _PLAIN_TENSORS else None


def _describe(arguments: Iterable[Any], tensors: list[Tensor], found: list[Any]) -> bool:
    """Appends the arguments' part of `kind_of`; whether it could. Written for speed: it is a large part of a call."""
    for argument in arguments:
        kind = type(argument)
        if kind in _PLAIN_TENSORS:
            if argument.is_neg():  # a view that only notes that its numbers are negated
                return False
            tensors.append(argument)
            found.append((argument.shape, argument.stride(), argument.dtype, argument.device, argument.data_ptr() & 15))
        elif kind in _NO_TENSORS:
            found += (kind, argument)
        elif isinstance(argument, (tuple, list)):
            kinds = tuple(map(type, argument))
            if _NO_TENSORS.issuperset(kinds):
                found += (tuple(argument), kinds)
            else:
                found.append(len(argument))
                if not _describe(argument, tensors, found):
                    return False
        else:
            return False
    return True
