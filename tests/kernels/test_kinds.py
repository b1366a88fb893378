"""Checks that run once for a kind of calls: what is told apart, and that errors come each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.kernels._common import kinds
from vitrail.kernels.window_attention import window_attention

_USUAL = (torch.zeros(2, 3), None, 1, (1, 2), "a", 0.5)


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3, 2), None, 1, (1, 2), "a", 0.5),
        (torch.zeros(3, 2).T, None, 1, (1, 2), "a", 0.5),
        (torch.zeros(2, 3, dtype=torch.half), None, 1, (1, 2), "a", 0.5),
        (torch.zeros(2, 3, device="meta"), None, 1, (1, 2), "a", 0.5),
        (torch.zeros(2, 3), torch.zeros(()), 1, (1, 2), "a", 0.5),
        (torch.zeros(2, 3), None, 1.0, (1, 2), "a", 0.5),
        (torch.zeros(2, 3), None, True, (1, 2), "a", 0.5),
        (torch.zeros(2, 3), None, 1, (1.0, 2), "a", 0.5),
        (torch.zeros(2, 3), None, 1, (True, 2), "a", 0.5),
        (torch.zeros(2, 3), None, 1, (1, 2, 3), "a", 0.5),
        (torch.zeros(2, 3), None, 1, (1, 2), "b", 0.5),
        (torch.zeros(2, 3), None, 1, (1, 2), "a", 0.25),
    ],
)
def test_tells_apart_all_but_contents(other: tuple[Any, ...]) -> None:
    assert kinds.kind_of(_USUAL) == kinds.kind_of((torch.ones(2, 3), *_USUAL[1:]))
    assert kinds.kind_of(_USUAL) == kinds.kind_of((*_USUAL[:3], [1, 2], *_USUAL[4:]))
    assert kinds.kind_of(_USUAL) != kinds.kind_of(other)


def test_runs_once_for_a_kind_unless_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MOST_REMEMBERED", 2)
    ran: list[Any] = []

    @kinds.once_per_kind
    def check(x: Tensor, least: int) -> int:
        ran.append(tuple(x.shape))
        if len(x) < least:
            raise ValueError("too few")
        return least

    for _ in range(3):
        assert check(torch.randn(4), 2) == 2
        with pytest.raises(ValueError, match="too few"):
            check(torch.randn(1), 2)
    assert ran == [(4,), (1,), (1,), (1,)]
    for size in (5, 6, 4):  # more than is remembered
        check(torch.randn(size), 2)
    assert ran[4:] == [(5,), (6,), (4,)]
    seen = len(ran)
    torch.jit.trace(lambda x: x + check(x, 2), (torch.ones(4),), check_trace=False)
    torch.compile(lambda x: x + check(x, 2), backend="eager", fullgraph=True)(torch.ones(4))
    assert len(ran) > seen


def test_what_equals_something_allowed_is_still_refused() -> None:
    q = torch.randn(1, 4, 4, 1, 16)
    window_attention(q, q, q, window_size=(2, 2))
    for wrong in ((2.0, 2.0), (2, 2.0), 2.0):
        with pytest.raises((ValueError, TypeError)):
            window_attention(q, q, q, window_size=wrong)  # type: ignore[arg-type]


def test_a_full_memory_keeps_what_is_only_replaced() -> None:
    memory = kinds.Memory(2)
    memory["a"], memory["b"] = 1, 2
    memory["a"] = 3
    assert memory == {"a": 3, "b": 2}
    memory["c"] = 4
    assert memory == {"c": 4}
