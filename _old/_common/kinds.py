"""Kinds of calls: what calls have in common whose tensors differ only in their contents and in where they lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

MOST_REMEMBERED = 1024  # kinds of one operator's calls
_NO_TENSORS = frozenset((type(None), bool, int, float, str))
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


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
    if _any_autocast():
        found += ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return tuple(found)


def _describe(arguments: Iterable[Any], tensors: list[Tensor], found: list[Any]) -> bool:
    """Appends the arguments' part of `kind_of`; whether it could. Written for speed: it is a large part of a call."""
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
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
