"""Fixtures and rules that all tests share: where shared test data lies, what needs a GPU, fixed random seeds."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from _interpreter import quicken
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():
    # Triton reads this when it is first imported: its kernels then run on the CPU, in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # every core has a process already: more threads would wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    settings.load_profile("repeatable")


# Folders and files by how long their slowest file takes, so that no process is left with one of them at the end.
_SLOWEST_FIRST = ("contract", "tools", "models", "docs", "configs", "test_import.py", "test_packaging.py", "kernels",
                  "layers")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):  # in the process that starts one for every core
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy, too, reads it when it is first imported
    # Compiling makes so many objects that last that the collector, as it is set, takes a tenth of the time.
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    gc.freeze()
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_drawn_on_meta() -> Iterator[None]:
    """Truncated normals are clamped in Python there, most of the time of building a model, and leave nothing."""
    import timm.layers.weight_init as timm_init

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((timm_init, "_trunc_normal_"), (torch.nn.init, "_no_grad_trunc_normal_")):
            patch.setattr(module, name, _drawn_elsewhere(getattr(module, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def _the_interpreter_does_nothing_in_vain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
            quicken(patch)
        yield


@pytest.fixture(autouse=True)
def _patched_operators_are_not_replayed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Replayed calls would not notice that a test has put another table in place of a kernel's own."""
    if "monkeypatch" not in request.fixturenames or "kernels" not in request.path.parts:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.kernels._common.replay.REPLAYS", False)
        yield


def _drawn_elsewhere(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else draw(tensor, *args, **kwargs)


def _turn(item: pytest.Item) -> int:
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    return _SLOWEST_FIRST.index(folder) if folder in _SLOWEST_FIRST else len(_SLOWEST_FIRST)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- transforms of other libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    """Compiled graphs of one test count towards the recompilation limit of the next that shares code with it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _forget_default_scope() -> Iterator[None]:
    """A Runner of one test leaves its scope as the process's: the next test's heads would look there for losses."""
    yield
    if "mmengine.registry.default_scope" in sys.modules:
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()


@pytest.fixture(scope="session")
def root_dir() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden cases: outputs of the official implementations (see `_golden.load_case`)."""
    return _shared_folder("golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the small sample data sets."""
    return _shared_folder("data")


def _shared_folder(name: str) -> Path:
    """Returns a folder of the shared test data, or skips the test with the place where it was looked for."""
    shared = Path(os.environ.get("VITRAIL_SHARED") or ROOT.parent / "shared")
    folder = shared / name
    if not folder.is_dir():
        pytest.skip(f"no folder {name!r} at {shared}; set VITRAIL_SHARED to the folder that holds it")
    return folder
