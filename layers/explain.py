"""Shows what the layers of a model do: which implementation of its operator each runs and why, what each is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.kernels._common.dispatch import Choice, record_choices


@dataclass(frozen=True)
class Explanation:
    """The backend choices of one forward pass; printing it gives a table.

    Attributes:
        rows: (qualified name of the layer, its operator call) in the order of execution.
    """

    rows: tuple[tuple[str, Choice], ...]

    def __str__(self) -> str:
        header = ("layer", "operator", "backend", "reason", "input")
        cells = [(name, c.op, c.backend, c.reason, "x".join(map(str, c.shape))) for name, c in self.rows]
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *cells]
        )


@torch.no_grad()
def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Runs `model(x)` once, without gradients, and lists which backend every operator call used, and why.

    Args:
        model: Any module; train or eval mode is left as it is.
        x: Its input, on the model's device.
    """
    rows: list[tuple[str, Choice]] = []
    running: list[str] = []
    handles = []
    with record_choices() as choices:

        def credit_running_module() -> None:
            # Called whenever a module starts or ends: what is new was called by the innermost one that runs.
            rows.extend((running[-1], choice) for choice in choices[len(rows) :])

        def enter(name: str) -> None:
            credit_running_module()
            running.append(name)

        def leave() -> None:
            credit_running_module()
            running.pop()

        for name, module in model.named_modules():
            name = name or "(model)"
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            handles.append(module.register_forward_hook(lambda *_: leave()))
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()
    return Explanation(tuple(rows))


@torch.no_grad()
def layer_inputs(model: nn.Module, x: Tensor, layers: Mapping[str, nn.Module]) -> dict[str, tuple[Any, ...]]:
    """Runs `model(x)` once, without gradients, and returns the positional arguments that chosen layers were given.

    Args:
        model: Any module; train or eval mode is left as it is.
        x: Its input, on the model's device.
        layers: Layers of the model by any names. Of a layer that is called more than once the last call is kept; one
            that is not called is left out.
    """
    kept: dict[str, tuple[Any, ...]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _module, given, name=name: kept.update({name: given}))
        for name, layer in layers.items()
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return kept
