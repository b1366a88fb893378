"""Kinds of calls: what calls have in common whose tensors differ only in their contents and in where they lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST_REMEMBERED = 1024  # kinds of one operator's calls
_NO_TENSORS = frozenset((type(None), bool, int, float, str))
_Found = TypeVar("_Found")


class Memory(dict[Any, Any]):
    """A dictionary that forgets everything where one more would be more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.most and key not in self:
            self.clear()
        super().__setitem__(key, value)


def kind_of(arguments: Sequence[Any]) -> tuple[Hashable, ...]:
    """Equal for two calls if their tensors agree in shape, strides, dtype and device, and their other arguments too.

    Sequences of numbers are told apart from others of the same numbers as 1, 1.0 and True are.
    """
    found: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind in _NO_TENSORS:  # the quickest question first: this is a large part of a call
            found += (kind, argument)
        elif kind is tuple or kind is list:
            found.append((*argument, *map(type, argument)))
        elif isinstance(argument, Tensor):
            found += (argument.shape, argument.stride(), argument.dtype, argument.device)
        else:
            found += (kind, argument)
    return tuple(found)


def once_per_kind(check: Callable[..., _Found]) -> Callable[..., _Found]:
    """`check`, which is not run again for a kind of calls that it has let pass: its result is remembered.

    What it raises and returns may depend on nothing but the kind; it is called with positional arguments. While a
    graph is recorded sizes are more than numbers, and it runs each time.
    """
    passed = Memory(MOST_REMEMBERED)

    def checked(*arguments: Any) -> _Found:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return check(*arguments)
        kind = kind_of(arguments)
        try:
            return passed[kind]
        except KeyError:
            pass
        except TypeError:  # not hashable: a symbolic size
            return check(*arguments)
        found = passed[kind] = check(*arguments)
        return found

    return checked
