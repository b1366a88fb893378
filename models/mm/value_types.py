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

_WORDS = {bool: "a truth value", int: "a number", float: "a number"}
_NAMES = {"bool": bool, "int": int, "float": float, "None": types.NoneType}


def check_value_types(path: str, part: Any, registries: Sequence[Registry]) -> None:
    """Looks for strings where a class takes numbers or truth values, in a part of a config and in all parts of it.

    Only what is certain is refused: strings for arguments whose annotation consists of `bool`, `int`, `float` and
    `None`, or that have none and such a default. The libraries' own configs give lists, and numbers for strings, where
    annotations do not say so.

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
            if name == "type" or kind is None or not isinstance(value, str):
                continue
            parameter = _parameter(kind, name)
            wanted = _plain_types(parameter) if parameter is not None else None
            if wanted:
                words = " or ".join(dict.fromkeys(text for plain, text in _WORDS.items() if plain in wanted))
                raise ValueError(f"{place}.{name} is {value!r}; {_name(kind)} takes {words}")


def _dicts_of(path: str, part: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(part, Mapping):
        yield path, part
    items = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, (list, tuple)) else ()
    for key, value in items:
        yield from _dicts_of(f"{path}.{key}", value)


def _find(kind: Any, registries: Sequence[Registry]) -> Any:
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    for registry in registries:
        with registry.switch_scope_and_registry(None) as scoped:  # a root knows nothing of the libraries'
            found = scoped.get(kind)
        if found is not None:
            return found
    return None


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


def _plain_types(parameter: inspect.Parameter) -> set[type] | None:
    """The types that an argument takes besides None: some of bool, int and float, or None if it may take others."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        kinds = [type(parameter.default)]
    elif isinstance(annotation, str):
        names = annotation.removeprefix("Optional[").removesuffix("]").split("|")
        kinds = [_NAMES.get(name.strip()) for name in names]
    else:
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        kinds = list(typing.get_args(annotation)) if is_union else [annotation]
    plain = {kind for kind in kinds if kind is not types.NoneType}
    return plain if plain <= {bool, int, float} else None


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", repr(kind))
