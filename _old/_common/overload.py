"""Operators as compiled graphs call them: past the dispatcher where a call can be replayed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from vitrail.kernels._common.direct import direct_kind, need_gradients
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
        if not options:
            tensors: list[Tensor] = []
            plan = self.replayed.plan_of(direct_kind(arguments, tensors))
            if plan is not None and not need_gradients(tensors):
                return plan.run(tensors)
        return super().__call__(*arguments, **options)
