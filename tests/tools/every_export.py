"""Every entry point as an ONNX file of any size, against the model: `make test-export`. Too long for every day."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitrail
from vitrail.tools.export import main

_OTHER_INPUTS = ("scatterformer",)  # they take points, not images


@pytest.mark.parametrize("name", [n for n in vitrail.list_models() if not n.startswith(_OTHER_INPUTS)])
def test_export(name: str, tmp_path: Path) -> None:
    assert main([name, "--dynamic", "-o", str(tmp_path / "model.onnx")]) == 0
