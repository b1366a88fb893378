"""Reads checkpoint files without running code, and others' layouts for the families' `checkpoint_filter_fn`."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

_SIGNS_OF_OBJECTS = ("GLOBAL ", "call reduce", "instantiate")  # in what torch's restricted unpickler says


class HoldsObjectsError(ValueError):
    """A file holds Python objects, which could run code on loading."""


class DamagedError(ValueError):
    """A file is damaged or no checkpoint; its message is the reader's first line, or empty."""


def load_without_code(path: Path, harmless: Sequence[type] = ()) -> Any:
    """Reads a `.safetensors` or `torch.save` file without running any code from it.

    Args:
        path: The file.
        harmless: Classes without behaviour whose objects may stand in the file.

    Raises:
        HoldsObjectsError: It holds objects of other classes.
        DamagedError: It is damaged or no checkpoint.
        OSError: It cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(list(harmless)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(sign in str(error) for sign in _SIGNS_OF_OBJECTS):
            raise HoldsObjectsError from error
        raise DamagedError from error
    except OSError:
        raise
    except Exception as error:  # the bytes of a damaged file can make the unpickler raise anything
        raise DamagedError((str(error).splitlines() or [type(error).__name__])[0]) from error


class UntrainedPartWarning(UserWarning):
    """A `checkpoint_filter_fn` gives parameters that the checkpoint lacks the values that the model was initialised
    with. That is a start for training; what only evaluates makes an error of this warning.
    """


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of a training checkpoint that keeps them under "state_dict" or "model"; plain weights as they are."""
    for wrapper in ("state_dict", "model"):
        checkpoint = checkpoint.get(wrapper, checkpoint)
    return checkpoint


def rename_keys(weights: Mapping[str, Any], rules: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Applies every (pattern, replacement) in turn to every key.

    Rules must leave the model's own keys alone, so that its own checkpoints pass unchanged.
    """
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def describe_misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Names the first of the weights that are missing, left over or of another shape, and counts the others; or ""."""
    misfits = [f"missing {name}" for name in expected if name not in weights]
    misfits += [f"unexpected {name}" for name in weights if name not in expected]
    misfits += [
        f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    return abridge(misfits)


def abridge(faults: Sequence[str]) -> str:
    """The first four of many faults, and how many there are besides."""
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
