"""Shows which implementation of its operator every layer of a model runs, and why."""

from __future__ import annotations

from dataclasses import dataclass

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
