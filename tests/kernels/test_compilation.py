"""Triton kernels compile for an H100: here all are translated and one of each operator compiled; see `every_kernel.py`.

The interpreter, which runs them in the other tests, takes much that the compiler refuses.
"""

from __future__ import annotations

from typing import Any

import pytest
from _compilation import compiled_rows, faults, written_kernels

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What became of the first launch of every kernel."""
    return compiled_rows()


def test_kernels_compile(rows: list[dict[str, Any]]) -> None:
    assert faults(rows) == []
    assert sum("registers" in row for row in rows) == len({row["operator"] for row in rows})


def test_no_kernel_is_left_out(rows: list[dict[str, Any]]) -> None:
    assert {(row["operator"], row["kernel"]) for row in rows} == written_kernels()


def test_sizes_make_no_new_code() -> None:
    """Maps, scans and grids of 32 sizes: an entry for each would push out the code of all other launches."""
    for row in compiled_rows("--sizes"):
        assert row["keys"] == row["codes"] <= 32 < row["launches"], row
