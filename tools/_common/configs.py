"""Finds training configs by path or by the name of a packaged one, and applies changes from the command line."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.tools._common.cli import UsageError, unknown_name


def packaged_configs() -> dict[str, Path]:
    """The configs that come with the package, by names such as "digits/biformer_n"; files named "_*" are bases."""
    root = Path(str(importlib.resources.files("vitrail") / "configs"))
    found = sorted(root.glob("**/*.py"))
    return {str(path.relative_to(root).with_suffix("").as_posix()): path for path in found if path.name[0] != "_"}


def find_config(name: str) -> Path:
    """The file of a config given by path, or by name as `packaged_configs` has it ("configs/" and ".py" allowed).

    Raises:
        UsageError: There is none; the message holds the nearest names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = packaged_configs()
    short = name.removeprefix("./").removeprefix("configs/").removesuffix(".py")
    if short in packaged:
        return packaged[short]
    raise unknown_name("config", short, packaged)


def find_config_or_run(name: str) -> tuple[Path, Path | None]:
    """The config of a training run's work folder and the run's weights, or a config as `find_config` has it and None.

    Raises:
        UsageError: There is none, or the folder is not that of a run.
    """
    folder = Path(name).expanduser()
    if (folder / "config.py").is_file():
        return folder / "config.py", folder / "model.safetensors"
    if folder.is_dir():
        raise UsageError(f"{folder} is not the work folder of a training run: it has no config.py")
    return find_config(name), None


def read_config(path: Path, changes: Sequence[str] = ()) -> Any:
    """Reads a config (it is Python and is executed: use configs that you trust) and applies `key=value` changes.

    Args:
        path: Of the file.
        changes: Such as "optim_wrapper.optimizer.lr=1e-4"; values are Python literals or words.

    Raises:
        UsageError: The file is not a config, or a change is malformed.
    """
    from mmengine.config import Config, DictAction

    from vitrail.models.mm.ops import install_operators

    install_operators()  # before the imports that a config may ask for
    try:
        config = Config.fromfile(path)
    except (SyntaxError, NameError, TypeError, KeyError, OSError, ImportError, AttributeError) as error:
        raise UsageError(f"config {path}: {type(error).__name__}: {error}") from error
    parsed = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise UsageError(f"--cfg-options takes key=value pairs, not {change!r}")
        parsed[key] = DictAction._parse_iterable(value)
    try:
        config.merge_from_dict(parsed)
    except (KeyError, TypeError, AssertionError, IndexError, AttributeError) as error:
        raise UsageError(f"--cfg-options {' '.join(changes)}: {error}") from error
    return config
