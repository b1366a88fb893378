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
    """What became of the first launch of every kernel, and how many codes some operators have for many sizes."""
    return compiled_rows()


@pytest.fixture
def kernels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "kernel" in row]


def test_kernels_compile(kernels: list[dict[str, Any]]) -> None:
    assert faults(kernels, most_spilled=0) == []
    assert sum("registers" in row for row in kernels) == len({row["operator"] for row in kernels})


def test_masks_of_depthwise_convolution_are_not_packed(kernels: list[dict[str, Any]]) -> None:
    """LLVM's vectoriser would; ptxas 12.8 makes wrong code of it."""
    assert [row["packed"] for row in kernels if row["operator"] == "depthwise_conv" and "packed" in row] == [0]


def test_no_kernel_is_left_out(kernels: list[dict[str, Any]]) -> None:
    assert {(row["operator"], row["kernel"]) for row in kernels} == written_kernels()


def test_sizes_make_no_new_code(rows: list[dict[str, Any]]) -> None:
    """Maps, scans, grids and rows of 16 sizes: an entry for each would push out the code of all other launches."""
    sized = [row for row in rows if "sizes" in row]
    assert len(sized) == 6
    for row in sized:
        assert row["keys"] == row["codes"] < row["launches"] / 2, row
