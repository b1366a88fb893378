"""Kinds of calls: what is told apart, and what has none."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

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
    assert _kind(*_USUAL) == _kind(torch.ones(2, 3), *_USUAL[1:])
    assert _kind(*_USUAL) == _kind(*_USUAL[:3], [1, 2], *_USUAL[4:])
    assert _kind(*_USUAL) != _kind(*other)
    assert _recognises(_USUAL, (torch.ones(2, 3), *_USUAL[1:]))
    assert not _recognises(_USUAL, other)
    assert _recognises(other, other)
    assert not _recognises(other, _USUAL)


def test_recognisers_tell_apart_where_tensors_begin_and_negated_views() -> None:
    memory, numbers = torch.zeros(20), torch.zeros(8, dtype=torch.complex64)
    assert _recognises((memory[:8],), (memory[4:12],))
    assert not _recognises((memory[:8],), (memory[1:9],))
    assert _recognises((numbers.imag,), (numbers.imag,))
    assert not _recognises((numbers.imag,), (numbers.conj().imag,))
    assert not _recognises((memory,), (memory.as_subclass(type("Other", (Tensor,), {})),))


def test_what_is_not_itself_has_no_recogniser() -> None:
    assert kinds.recognizer((torch.zeros(2), float("nan")), 1) is None
    assert kinds.recognizer((torch.zeros(2), [torch.zeros(2), float("nan")]), 1) is None


class _Pair(NamedTuple):
    first: Any
    second: Any


_NESTED = (torch.zeros(2), _Pair(torch.zeros(3), [torch.zeros(4), None, (1, 2.0)]), "a", (torch.zeros(5),), [])


@pytest.mark.parametrize(
    "other",
    [
        (_NESTED[0], _Pair(torch.zeros(4), _NESTED[1].second), *_NESTED[2:]),
        (_NESTED[0], _Pair(_NESTED[1].first, [torch.zeros(3), None, (1, 2.0)]), *_NESTED[2:]),
        (_NESTED[0], _Pair(_NESTED[1].first, [_NESTED[1].second[0], None, (1, 2)]), *_NESTED[2:]),
        (_NESTED[0], _Pair(_NESTED[1].first, [_NESTED[1].second[0], None]), *_NESTED[2:]),
        (_NESTED[0], _Pair(_NESTED[1].first, _NESTED[1].second[0]), *_NESTED[2:]),
        (_NESTED[0], tuple(_NESTED[1]), *_NESTED[2:]),
        (_NESTED[0], 3, *_NESTED[2:]),
        (*_NESTED[:3], (torch.zeros(5), torch.zeros(5)), []),
        (*_NESTED[:3], (torch.zeros(5).half(),), []),
        (*_NESTED[:3], torch.zeros(1, 5), []),
        (*_NESTED[:4], [1]),
    ],
)
def test_recognisers_look_into_sequences(other: tuple[Any, ...]) -> None:
    alike = (torch.ones(2), _Pair(torch.ones(3), [torch.ones(4), None, (1, 2.0)]), "a", (torch.ones(5),), [])
    assert _recognises(_NESTED, alike)
    assert not _recognises(_NESTED, other)
    assert _recognises(other, other)
    assert not _recognises(other, _NESTED)


def test_autocast_and_alignment_count() -> None:
    memory = torch.zeros(20)
    kinds_found = [_kind(memory[start : start + 8]) for start in (0, 1, 4)]
    assert kinds_found[0] == kinds_found[2] != kinds_found[1]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            kinds_found.append(_kind(memory[:8]))
    assert len(set(kinds_found)) == 4


def test_sequences_of_tensors_are_looked_into() -> None:
    x, y, z = torch.zeros(2), torch.zeros(3), torch.zeros(4)
    tensors: list[Tensor] = []
    kind = kinds.kind_of(((x, y), [z, None], 1), tensors)
    assert [id(t) for t in tensors] == [id(x), id(y), id(z)]
    assert kind == _kind([torch.ones(2), torch.ones(3)], (torch.ones(4), None), 1)
    others = (((x,), [y, z, None], 1), ((x, y, z), [None], 1), (x, y, [z, None], 1), ((x, y), [z], None, 1))
    assert len({kind, *(_kind(*other) for other in others)}) == 5


@pytest.mark.parametrize(
    "unknown",
    [object(), {1: 2}, torch.zeros(2).as_subclass(type("Other", (Tensor,), {})), torch.zeros(2).char, 1j, [object()]],
)
def test_what_may_be_anything_has_no_kind(unknown: Any) -> None:
    assert _kind(torch.zeros(2), unknown) is None


def test_negated_views_have_no_kind() -> None:
    assert _kind(torch.zeros(2, dtype=torch.complex64).conj().imag) is None


def _kind(*arguments: Any) -> Any:
    return kinds.kind_of(arguments, [])


def _recognises(known: tuple[Any, ...], arguments: tuple[Any, ...]) -> bool:
    """Whether arguments are recognised as of the kind of others, and their tensors found."""
    recognize = kinds.recognizer(known, "known")
    assert recognize is not None
    found = recognize(arguments)
    if found is None:
        return False
    tensors: list[Tensor] = []
    kinds.kind_of(arguments, tensors)
    return found[0] == "known" and len(found[1]) == len(tensors) and all(map(operator.is_, found[1], tensors))


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
