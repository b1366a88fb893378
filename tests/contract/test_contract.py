"""timm's own model tests pass for the smallest model of every family; `run.py` without arguments tests all models."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract_run", Path(__file__).with_name("run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.find_timm_tests()
    except module.TestsUnavailable as error:
        if os.environ.get("VITRAIL_REQUIRE_CONTRACT") == "1":
            raise
        pytest.skip(f"timm's model tests did not run: {error}")
    return module


@pytest.mark.slow
def test_smallest_models_pass_timms_tests(runner: ModuleType) -> None:
    models = runner.smallest_of_each_family()
    assert models
    done = runner.run(models)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for name in models:
        assert re.search(rf"^{name}: (\d+)/\1 passed$", done.stdout, re.MULTILINE), done.stdout[-2000:]


def test_a_model_without_the_contract_fails(runner: ModuleType) -> None:
    # timm's own test_vit has no convolutional feature pyramid, which the strong group of tests asks for.
    done = runner.run(["test_vit"], extra=["-k", "test_model_default_cfgs or test_model_forward_features"])
    assert done.returncode == 1, done.stdout
    assert re.search(r"^test_vit: \d+/\d+ passed, \d+ failed", done.stdout, re.MULTILINE), done.stdout
    assert "tests were found, at least" in done.stdout


def test_missing_test_file_is_skipped_loudly_or_an_error(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VITRAIL_TIMM_TESTS", str(tmp_path / "absent.py"))
    monkeypatch.delenv("VITRAIL_REQUIRE_CONTRACT", raising=False)
    assert runner.main(["davit_t"]) == 0
    assert "SKIPPED" in capsys.readouterr().err
    monkeypatch.setenv("VITRAIL_REQUIRE_CONTRACT", "1")
    assert runner.main(["davit_t"]) == 1
    assert "absent.py" in capsys.readouterr().err
