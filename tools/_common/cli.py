"""From exceptions to one line on stderr and an exit status, the same for every command.

| outcome | exit status | stderr |
|---|---|---|
| done | what the command returned, 0 | |
| `UsageError`: a wrong argument, an unknown name, a device that is not there | 2 | one line |
| `ToolError`, `ValueError`, `OSError`, `NotImplementedError`, out of memory: an expected failure | 1 | one line |
| Ctrl-C | 130 | one line |
| anything else is a defect of the command | 1 (Python's) | traceback |

`VITRAIL_DEBUG=1` in the environment shows the traceback of expected failures, too.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import torch

_FROM_LOADER = re.compile(r"Caught \w+ in .*\.\nOriginal Traceback")


class UsageError(Exception):
    """The command was called wrongly: exit status 2."""


class ToolError(RuntimeError):
    """The command was called rightly and cannot do its work: exit status 1."""


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises `UsageError` in place of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError` with argparse's message and where to read on."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def run_command(main: Callable[[], int | None]) -> int:
    """Runs a command and turns its outcome into an exit status (module docstring).

    Args:
        main: The command, without arguments: `run_command(lambda: train(options))`. None counts as 0.

    Returns:
        The exit status, for `sys.exit`.
    """
    try:
        return main() or 0
    except SystemExit as stop:  # argparse's --help and --version
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except UsageError as error:
        return _fail(str(error), 2)
    except torch.OutOfMemoryError as error:
        return _fail(f"out of GPU memory: try a smaller batch size ({_first_line(error)})", 1)
    except OSError as error:
        return _fail(_describe_os_error(error), 1)
    except (ToolError, ValueError, NotImplementedError) as error:
        return _fail(message_of(error), 1)


def message_of(error: BaseException) -> str:
    """An error's message; of one that a data loader's process raised, its own words without the traceback around them.

    PyTorch hands on such an error as one of the same type whose message is the traceback.
    """
    text = str(error)
    if not _FROM_LOADER.match(text):
        return text
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return text.rpartition(f"\n{name}: ")[2].strip()


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A usage error for a name that does not exist, with the nearest names that do.

    Args:
        kind: What the name names, such as "model".
        name: The name as given.
        known: All names that exist.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"nearest names: {', '.join(near)}" if near else f"{len(known)} names are known, none is near"
    return UsageError(f"unknown {kind} {name!r}; {hint}")


def select_device(name: str) -> torch.device:
    """The device for `--device auto|cpu|cuda|cuda:N`.

    Raises:
        UsageError: The device is not there, or the name means nothing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device is {name!r}; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device is {name}, but PyTorch sees no CUDA GPU here; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UsageError(f"--device is {name}, but there are {torch.cuda.device_count()} GPUs (counted from 0)")
    return device


def check_output_file(path: Path, option: str) -> None:
    """Raises `UsageError` where a file cannot be written; to be asked before the work whose result it is to hold."""
    if path.is_dir():
        raise UsageError(f"{option} is {path}, a folder; expected the name of a file")
    check_output_folder(path.parent, option, path)


def check_output_folder(folder: Path, option: str, given: Path | None = None) -> None:
    """Raises `UsageError` where a folder is not there and cannot be made, or cannot be written to.

    Args:
        folder: The folder.
        option: Where its name comes from, such as "--output".
        given: What stands there, if that is not the folder itself.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{option} is {given or folder}, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option} is {given or folder}, but {there} cannot be written to")


def describe_device(device: torch.device) -> str:
    """Name of a GPU, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _fail(message: str, status: int) -> int:
    if os.environ.get("VITRAIL_DEBUG") == "1":
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _describe_os_error(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; free some space and run again"
    if error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return message_of(error)
