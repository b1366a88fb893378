"""What code is told of a recorder that runs in place of a caller."""

import torch
from torch import Tensor, nn

from vitrail.kernels._common.recording import records_graph


class _TellsOfRecorder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if records_graph() else x


def _tells(run: nn.Module) -> bool:
    return bool(run(torch.zeros(1)))


def test_traces_and_exports_are_recorded():
    assert _tells(torch.jit.trace(_TellsOfRecorder(), torch.zeros(1)))
    assert _tells(torch.export.export(_TellsOfRecorder(), (torch.zeros(1),)).module())
    assert _tells(torch.export.export(_TellsOfRecorder(), (torch.zeros(1),), strict=True).module())


def test_plain_and_compiled_calls_are_not():
    assert not _tells(_TellsOfRecorder())
    assert not _tells(torch.compile(_TellsOfRecorder(), backend="eager", fullgraph=True))
