"""Operators as compiled graphs call them: past the dispatcher where a call can be replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from vitrail.kernels._common.direct import need_gradients, someone_watches_graphs
from vitrail.kernels._common.kinds import any_autocast, kind_of
from vitrail.kernels._common.replay import Replayed


class ReplayingOverload(OpOverload):
    """`torch.ops.vitrail.NAME.default`, which replays what it can.

    PyTorch's dispatcher takes several times as long as a replay. Where no gradient is needed and nothing watches it
    would do nothing but find the implementation; all other calls take its way, among them the first ones of a kind,
    whose arguments it checks.
    """

    operator: Any  # set where it is an operator's forward
    replayed: Replayed

    @classmethod
    def of(cls, overload: Any, replayed: Replayed) -> None:
        """Makes one of an operator that `replayed` implements."""
        overload.__class__ = cls
        overload.replayed = replayed

    def __call__(self, /, *arguments: Any, **options: Any) -> Any:
        if not options and not someone_watches_graphs():
            is_usual = not torch.is_grad_enabled() and not any_autocast()  # as graphs run
            result = self.replayed.run_expected(arguments) if is_usual else None
            if result is not None:
                return result
            tensors: list[Tensor] = []
            plan = self.replayed.plan_of(kind_of(arguments, tensors))
            if plan is not None and not need_gradients(tensors):
                if is_usual:
                    self.replayed.expect(plan, arguments)
                return plan.run(tensors)
        return super().__call__(*arguments, **options)
