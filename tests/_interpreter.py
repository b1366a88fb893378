"""Triton's interpreter in a third of the time: without what it does in vain in every call and every operation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Spares the interpreter work that changes no result.

    - A call of one `triton.jit` function by another looks through the language for what is to be replaced by the
      interpreter's operations, which the launch or another call has done.
    - Every operation makes a table of all dtypes to look one up.
    - Every sum, difference and product of integers is computed once more, in int64, to see whether it has overflowed;
      nobody asks about the result unless Triton debugs.
    """
    from triton.runtime import interpreter

    language = interpreter.tl

    @functools.cache
    def find_languages(function: Any) -> list[Any]:
        return [x for x in function.__globals__.values() if x is language or x is language.core]

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if any(language.core.is_builtin(found.load) for found in find_languages(self.fn)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    find_dtype = interpreter._get_np_dtype
    pointer = language.pointer_type
    kept: dict[str, np.dtype] = {}

    @functools.wraps(find_dtype)
    def find_kept_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        if isinstance(scalar, pointer):
            return find_dtype(scalar)
        found = kept.get(scalar.name)
        if found is None:
            found = kept[scalar.name] = find_dtype(scalar)
        return found

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    patch.setattr(interpreter, "_get_np_dtype", find_kept_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
