"""pytest plugin: timm's own model tests, on chosen models only.

Loaded before timm's `tests/test_models.py` is imported. That file asks `timm.list_models` for the models of every test
as it is imported; here the answer is always the chosen names, whatever size limits, exclusions or module lists the
file asks with, so that no model drops out unnoticed. Tests that were not parametrised by such an answer are left out.

The run fails if a test of a chosen model fails or is skipped, or if the models did not all get the same tests.
"""

from __future__ import annotations

import collections
import gc
import os
from typing import Any

import pytest
import timm

import vitrail  # noqa: F401 -- registers the models

MODELS_VARIABLE = "VITRAIL_CONTRACT_MODELS"
# A model gets 10 tests in timm 1.0.29, the oldest supported version, and 11 in 1.0.31.
LEAST_TESTS = 10


class ChosenName(str):
    """A model name that `list_models` below handed out; tells such parameters from names written in the test file."""

    __slots__ = ()


CHOSEN = [ChosenName(name) for name in os.environ.get(MODELS_VARIABLE, "").split()]


def _list_models(filter: Any = "", *args: Any, pretrained: bool = False, **kwargs: Any) -> list[ChosenName]:
    """Stands in for `timm.list_models`: none with a name filter (special cases) or with weights, else all chosen."""
    return [] if filter or pretrained else list(CHOSEN)


def _list_pretrained(*args: Any, **kwargs: Any) -> list[str]:
    return []


class Outcomes:
    """Counts what became of every test of every chosen model."""

    def __init__(self) -> None:
        self.by_model: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in CHOSEN}
        self._model_of: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = []
        for item in items:
            name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
            if isinstance(name, ChosenName):
                self._model_of[item.nodeid] = name
                kept.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.by_model[self._model_of[report.nodeid]][report.outcome] += 1

    def problems(self) -> list[str]:
        """What makes the run a failure besides failed tests."""
        found = []
        if not CHOSEN:
            found.append(f"no models were chosen in {MODELS_VARIABLE}")
        for name, counts in self.by_model.items():
            if counts["skipped"]:
                found.append(f"{name}: {counts['skipped']} tests were skipped, the contract wants them run")
            if counts.total() < LEAST_TESTS:
                found.append(f"{name}: {counts.total()} tests were found, at least {LEAST_TESTS} expected")
        if len({counts.total() for counts in self.by_model.values()}) > 1:
            found.append("the models did not all get the same number of tests")
        return found

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.problems():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"model contract of timm {timm.__version__}")
        for name, counts in self.by_model.items():
            other = "".join(f", {counts[kind]} {kind}" for kind in ("failed", "skipped") if counts[kind])
            terminalreporter.line(f"{name}: {counts['passed']}/{counts.total()} passed{other}")
        for problem in self.problems():
            terminalreporter.line(f"ERROR {problem}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(20_000, 20, 20)  # as in the other tests
    timm.list_models = timm.models.list_models = _list_models
    timm.list_pretrained = timm.models.list_pretrained = _list_pretrained
    config.pluginmanager.register(Outcomes())
