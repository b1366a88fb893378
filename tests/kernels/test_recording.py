"""Code knows when a recorder runs it in place of a caller, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitrail.kernels._common.recording import records_graph


class _Tells(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (1 if records_graph() else 0)


_X = torch.zeros(2)
_CALLERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda module: module,
    "compiled": lambda module: torch.compile(module, fullgraph=True, backend="eager"),
    "compiled for any size": lambda module: torch.compile(module, fullgraph=True, backend="eager", dynamic=True),
}
_RECORDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "traced": lambda module: torch.jit.trace(module, (_X,), check_trace=False),
    "exported": lambda module: torch.export.export(module, (_X,)).module(),
    "exported strictly": lambda module: torch.export.export(module, (_X,), strict=True).module(),
}


@pytest.mark.parametrize("caller", _CALLERS)
def test_callers_do_not_record(caller: str) -> None:
    assert _CALLERS[caller](_Tells())(_X).tolist() == [0, 0]


@pytest.mark.parametrize("recorder", _RECORDERS)
def test_recorders_do(recorder: str) -> None:
    assert _RECORDERS[recorder](_Tells())(_X).tolist() == [1, 1]
