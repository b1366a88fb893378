"""Finds training configs by path or by the name of a packaged one, and applies changes from the command line."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.tools._common.cli import UsageError, unknown_name

# What is read of a config after its file. Other names at its top are the file's own: their values have gone where they
# are used, and to change them later would change nothing.
_PARTS = (
    *("model", "train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator", "train_cfg"),
    *("val_cfg", "test_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr", "default_hooks", "custom_hooks"),
    *("data_root", "load_from", "randomness", "compile", "ddp", "find_unused_parameters", "sync_bn", "env_cfg"),
    *("log_processor", "visualizer", "custom_imports", "default_scope"),
)


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
    if path.is_absolute():
        raise UsageError(f"config {path} does not exist")
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
        UsageError: The file is not a config, or a change is malformed or would change nothing.
    """
    from mmengine.config import Config, DictAction

    from vitrail.models.mm.ops import install_operators

    install_operators()  # before the imports that a config may ask for
    try:
        config = Config.fromfile(path)
    except Exception as error:  # it is Python and can raise anything
        raise UsageError(f"config {path}: {type(error).__name__}: {error}") from error
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise UsageError(f"--cfg-options takes key=value pairs, not {change!r}")
        _check_part(key, config)
        try:
            config.merge_from_dict({key: DictAction._parse_iterable(value)})
        except (KeyError, TypeError, AssertionError, IndexError, AttributeError) as error:
            raise UsageError(f"--cfg-options {change}: {error.args[0] if error.args else error}") from error
    return config


def _check_part(key: str, config: Any) -> None:
    """Raises UsageError where the first word of a change's key is no part of a config."""
    part = key.split(".")[0]
    if part in _PARTS:
        return
    if part in config:
        raise UsageError(
            f"--cfg-options {key}: {part} is a variable of the config file, which has been read; change the parts that "
            f"it stands in, such as train_dataloader.dataset.pipeline.0 (the parts: {', '.join(_PARTS)})"
        )
    raise unknown_name("part of a config", part, _PARTS)
