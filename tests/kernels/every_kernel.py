"""All launches of all Triton kernels, compiled for an H100: `make test-kernels-compile`. Too long for every day."""

from __future__ import annotations

import pytest
from _compilation import compiled_rows, faults

pytest.importorskip("triton")
_OPERATORS = (
    "window_attention",
    "neighborhood_attention",
    "routing_attention",
    "linear_attention",
    "channel_attention",
    "varied_window_attention",
    "strip_gate",
    "depthwise_conv",
    "scattered_linear_attention",
    "sparse_conv",
)


@pytest.mark.parametrize("operator", _OPERATORS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_compiles(operator: str, dtype: str) -> None:
    assert faults(compiled_rows(operator, "--dtype", dtype)) == []
