"""Every entry point as an ONNX file of any size, against the model: `make test-export`. Too long for every day.

`EXPORTS=model_cards/exports.json make test-export` also notes the figures, which the documentation shows.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm

import vitrail
from vitrail.tools.export import main

_IMAGES = [name for name in vitrail.list_models() if timm.get_pretrained_cfg(name).input_size]


@pytest.mark.parametrize("name", _IMAGES)
def test_export(name: str, tmp_path: Path) -> None:
    notes = ["--json", os.environ["EXPORTS"]] if "EXPORTS" in os.environ else []
    file = tmp_path / "model.onnx"
    assert main([name, "--dynamic", "-o", str(file), *notes]) == 0
    file.unlink()  # together they are many gigabytes
