"""Reads the layouts of others' checkpoints, for the families' `checkpoint_filter_fn`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


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
