"""All launches of all Triton kernels, compiled for an H100: `make test-kernels-compile`. Too long for every day."""

from __future__ import annotations

import pytest
from _compilation import compiled_rows, faults, written_kernels

pytest.importorskip("triton")
_MOST_SPILLED = 512  # of float32 heads of 128 channels, whose tiles nearly fill the registers


@pytest.mark.parametrize("operator", sorted({operator for operator, _ in written_kernels()}))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_compiles(operator: str, dtype: str) -> None:
    assert faults(compiled_rows(operator, "--dtype", dtype), _MOST_SPILLED) == []
