"""How large models are and what they cost."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.tools._common import cards

_read_measured = functools.cache(cards.read_measured)


def parameters_and_gmacs(name: str, size: int | None = None, **changes: Any) -> tuple[int, float]:
    """Parameters of a model, and its multiply-adds in 10^9 of a square image of `size`, by default the model's own.

    The multiply-adds of a model as it is registered are those of the cards, which
    `tests/tools/test_model_cards.py::test_all_counts_are_right` holds against new counts, as these take seconds.
    """
    model = timm.create_model(name, device="meta", **changes).eval()
    parameters = sum(p.numel() for p in model.parameters())
    kept = _read_measured().get(name)
    if kept is not None and not changes and size in (None, kept["input_size"][-1]):
        return parameters, kept["gmacs"]
    size = size or model.default_cfg["input_size"][-1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return parameters, counter.get_total_flops() / 2e9
