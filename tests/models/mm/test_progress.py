"""The shown speed and time left follow the latest iterations."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from vitrail.models.mm import progress
from vitrail.models.mm.progress import ProgressHook


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def _lines(monkeypatch: pytest.MonkeyPatch, durations: list[float], batch: int) -> list[tuple[float, float, float]]:
    """(seconds since the start, images/s, seconds left) of every line shown in an epoch of such iterations."""
    clock, console = _Clock(), Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(progress, "time", clock)
    runner = SimpleNamespace(iter=0, epoch=0, max_iters=len(durations), max_epochs=1, validations_left=lambda _: 0)
    hook = ProgressHook(console)
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    found: list[tuple[float, float, float]] = []
    for i, seconds in enumerate(durations):
        clock.now += seconds
        runner.iter = i
        hook.after_train_iter(runner, i, {"indices": range(batch)}, {})
        for speed, left in re.findall(r"([\d,]+) images/s  ([\d:]+) left", console.file.getvalue())[len(found) :]:
            minutes, rest = left.split(":")[-2:]
            found.append((clock.now, float(speed.replace(",", "")), 60 * int(minutes) + int(rest)))
    return found


def test_speed_forgets_a_slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [45.0, 6.0, *[0.25] * 800]
    first, second, *others = _lines(monkeypatch, durations, batch=64)
    assert first[0] == 45.0
    for now, speed, left in (second, *others):
        assert speed == 256
        assert left == pytest.approx(sum(durations) - now, abs=1)
    assert len(others) >= 3


def test_speed_follows_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines(monkeypatch, [0.1] * 1000 + [0.5] * 400, batch=10)
    speeds = {now: speed for now, speed, _ in lines}
    assert {speed for now, speed in speeds.items() if now < 100} == {100}
    assert {speed for now, speed in speeds.items() if now > 121} == {20}


def test_slow_iterations_are_averaged_over_few(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines(monkeypatch, [40.0, *[8.0] * 20], batch=16)
    assert [speed for now, speed, _ in lines if now > 70] == [2.0] * len([now for now, *_ in lines if now > 70])
