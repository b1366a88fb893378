"""Python functions that are written as text where what they do becomes known, for what every call of an operator runs.

Compiling one takes a few tenths of a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Answer = Callable[[Sequence[Any]], Any]  # of calls of one kind, from their arguments; None for others


class Names:
    """What the text of a function calls the objects that it needs."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self._names: dict[int, str] = {}  # by their identities

    def constant(self, value: Any, name: str = "object") -> str:
        """A number, a tuple of such, or an object by a name that begins so."""
        if type(value) in (tuple, torch.Size):
            return f"({''.join(f'{self.constant(one, name)}, ' for one in value)})"
        if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if id(value) not in self._names:
            self._names[id(value)] = f"{name}_{len(self.objects)}"
            self.objects[self._names[id(value)]] = value
        return self._names[id(value)]


def text_of(name: str, parameter: str, lines: Sequence[str]) -> str:
    """The text of a function of one parameter."""
    return "\n    ".join([f"def {name}({parameter}):", *lines])


def compiled(text: str, objects: dict[str, Any]) -> Answer:
    """The function that a text defines, which names objects."""
    found: dict[str, Any] = {}
    exec(compile(text, "<written for a kind of calls>", "exec"), objects, found)
    (function,) = found.values()
    return function
