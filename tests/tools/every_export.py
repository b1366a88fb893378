"""Every entry point as an ONNX file of any size, against the model: `make test-export`. Too long for every day.

`EXPORTS=model_cards/exports.json make test-export` also notes the figures, which the documentation shows.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitrail.tools._common.entry_points import image_models
from vitrail.tools.export import main


@pytest.mark.parametrize("name", image_models())
def test_export(name: str, tmp_path: Path) -> None:
    notes = ["--json", os.environ["EXPORTS"]] if "EXPORTS" in os.environ else []
    file = tmp_path / "model.onnx"
    assert main([name, "--dynamic", "-o", str(file), *notes]) == 0
    file.unlink()  # together they are many gigabytes
