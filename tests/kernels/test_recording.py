"""What code is told of a recorder that runs in place of a caller."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from vitrail.kernels._common.recording import records_graph, surely


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


class _Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if surely(x.shape[0] % 7 == 0) else x - 1


@pytest.mark.parametrize("scripted", [False, True], ids=["plain", "scripted"])
def test_a_plain_or_scripted_call_knows_its_sizes(scripted: bool) -> None:
    run = torch.jit.script(_Whole()) if scripted else _Whole()
    assert [run(torch.zeros(n))[0].item() for n in (14, 15)] == [1, -1]


def test_compiled_code_knows_constant_sizes_and_takes_any_other() -> None:
    counter = CompileCounter()
    compiled = torch.compile(_Whole(), backend=counter, fullgraph=True)
    values = [compiled(torch.zeros(n))[0].item() for n in (14, 21, 22, 28)]
    assert values == [1, -1, -1, -1]  # from the second size on one graph serves all
    assert counter.frame_count == 2


def test_what_is_recorded_for_any_size_knows_none() -> None:
    x = torch.zeros(14)
    traced = torch.jit.trace(_Whole(), x, check_trace=False)
    size = torch.export.Dim("size", min=2)
    exported = torch.export.export(_Whole(), (x,), dynamic_shapes=({0: size},)).module()
    for run in (traced, exported):
        assert [run(torch.zeros(n))[0].item() for n in (14, 15)] == [-1, -1]
    assert torch.export.export(_Whole(), (x,)).module()(x)[0] == 1
