"""mmcv's operators without a compiler: a stand-in for the extension `mmcv._ext`, which plain pip does not build.

Importing this module installs the stand-in, as configs do by `custom_imports` and the tools by `install_operators`. It
must happen before `mmcv.ops` or `mmdet.models` is imported. A compiled extension, where there is one, is used instead.
What the operators compute is in `_operators`; those that are not there raise when they are called.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from vitrail.models.mm._operators import OPERATORS

EXTENSION = "mmcv._ext"


class StandInModule(ModuleType):
    """Has every name that mmcv asks an extension for."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _missing_operator(name)


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the stand-in. It stands last among the finders, so that a compiled extension wins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The stand-in's place, for its name alone."""
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == EXTENSION else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An empty stand-in."""
        return StandInModule(spec.name, "Operators of vitrail under the names of mmcv's extension.")

    def exec_module(self, module: ModuleType) -> None:
        """Fills it."""
        module.__dict__.update(OPERATORS)


def install_operators() -> None:
    """Makes `import mmcv._ext` find the stand-in where no compiled extension is installed; once is enough."""
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


def _missing_operator(name: str) -> Callable[..., NoReturn]:
    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"mmcv's operator {name!r} needs mmcv's compiled operators; without them there are {', '.join(OPERATORS)}"
        )

    return missing


install_operators()
