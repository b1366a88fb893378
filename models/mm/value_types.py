"""Compares the values of a config with what the classes that it names say of their arguments.

The libraries store most arguments as they are; a number that is none would end a run at its first step.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.registry import Registry

_KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}
_NAMES = {"bool": bool, "int": int, "float": float, "str": str, "None": types.NoneType}


def check_value_types(path: str, part: Any, registries: Sequence[Registry]) -> None:
    """Looks for strings where a class takes numbers, and the like, in a part of a config and in all parts of it.

    Only what is certain is refused: arguments whose annotation consists of `bool`, `int`, `float`, `str` and `None`, or
    without one whose default is a plain value. None fits all, and truth values and numbers fit each other. What the
    registries do not know, and arguments that a class only passes on, are left alone.

    Args:
        path: The part's key, such as "model".
        part: Its value.
        registries: Where its types may stand; the library's scope must be the default.

    Raises:
        ValueError: A value is of another type.
    """
    for place, settings in _dicts_of(path, part):
        kind = _find(settings.get("type"), registries)
        for name, value in settings.items():
            parameter = _parameter(kind, name) if name != "type" and kind is not None else None
            wanted = _kinds_against(value, parameter) if parameter is not None else None
            if wanted:
                raise ValueError(f"{place}.{name} is {value!r}; {_name(kind)} takes {' or '.join(wanted)}")


def _dicts_of(path: str, part: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(part, Mapping):
        yield path, part
    items = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, (list, tuple)) else ()
    for key, value in items:
        yield from _dicts_of(f"{path}.{key}", value)


def _find(kind: Any, registries: Sequence[Registry]) -> Any:
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    return next((found for registry in registries if (found := registry.get(kind)) is not None), None)


def _parameter(kind: Any, name: str) -> inspect.Parameter | None:
    """The argument of a class, or of the base to which the class passes it on."""
    for owner in kind.__mro__ if isinstance(kind, type) else (kind,):
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if function is None:
            continue
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # compiled classes have none
            return None
        if name in parameters:
            return parameters[name]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return None
    return None


def _kinds_against(value: Any, parameter: inspect.Parameter) -> list[str] | None:
    """What an argument takes, in words, if the value is certainly nothing of it."""
    annotated, default = _plain_types(parameter.annotation), parameter.default
    if value is None or (annotated is None and default == "auto"):  # which stands for values of any type
        return None
    given = _family(type(value))
    if annotated is None and parameter.annotation is parameter.empty and type(default) in _KINDS:
        annotated = {type(default)}
        if given is None:  # a default of 3 may stand for (3, 3), too
            return None
    if not annotated or given in map(_family, annotated):
        return None
    return list(dict.fromkeys(_KINDS[kind] for kind in _NAMES.values() if kind in annotated))


def _plain_types(annotation: Any) -> set[type] | None:
    """The types of an annotation, without None; None unless all of them are plain."""
    if isinstance(annotation, str):
        kinds = [_NAMES.get(name.strip()) for name in annotation.split("|")]
    else:
        kinds = list(typing.get_args(annotation)) if _is_union(annotation) else [annotation]
    if not all(kind in _NAMES.values() for kind in kinds):
        return None
    return {kind for kind in kinds if kind is not types.NoneType}


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _family(kind: type) -> str | None:
    """Types of one family fit each other."""
    return "number" if issubclass(kind, (bool, int, float)) else "string" if issubclass(kind, str) else None


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", repr(kind))
