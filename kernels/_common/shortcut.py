"""Shortcuts: what calls go straight to whose way an earlier call of the same kind has gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from vitrail.kernels._common.direct import someone_watches
from vitrail.kernels._common.replay import Replayed


def need_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call on `tensors` is to be differentiated."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class ReplayingOverload(OpOverload):
    """An operator as compiled graphs call it (`torch.ops.vitrail.NAME.default`), which replays what it can.

    PyTorch's dispatcher takes several times as long as a replay. What it would do besides is nothing for a call that
    needs no gradient and that nothing watches: both are looked at here. All other calls take its way, among them the
    first ones of a kind, whose arguments it checks.
    """

    replayed: Replayed

    @classmethod
    def of(cls, overload: Any, replayed: Replayed) -> None:
        """Makes one of an operator that is implemented by `replayed`."""
        overload.__class__ = cls
        overload.replayed = replayed

    def __call__(self, /, *arguments: Any, **options: Any) -> Any:
        if not options and not someone_watches():
            tensors: list[Tensor] = []
            plan = self.replayed.plan_of(arguments, tensors)
            if plan is not None and not need_gradients(tensors):
                return plan.run(tensors)
        return super().__call__(*arguments, **options)
