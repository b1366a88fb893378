"""Tiles of rows and of hidden channels, and how they are read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Rows and hidden channels of a program's tiles, and how it is launched."""

    rows: int
    hidden: int
    warps: int
    stages: int
    programs: int = 0  # a multiprocessor, where they walk over the rows

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time parameters and options of a launch."""
        return {
            "ROWS": self.rows,
            "BLOCK": self.hidden,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tile_for(tiles: Mapping[int, Tile], dim: int, out_dim: int) -> Tile:
    """The entry of a table that is ordered by the wider of a row and a result, in channels."""
    return next(tile for width, tile in tiles.items() if max(dim, out_dim) <= width)


def widths_of(dim: int, out_dim: int) -> dict[str, int]:
    """Compile-time parameters of the tiles that hold a row and a result: powers of two from 16 on.

    Those of the second tiles, IN_2 and OUT_2, are 0 where one tile holds all.
    """
    (in_1, in_2), (out_1, out_2) = _two(dim), _two(out_dim)
    return {"IN_1": in_1, "IN_2": in_2, "OUT_1": out_1, "OUT_2": out_2}


def _two(dim: int) -> tuple[int, int]:
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(dim - first))
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


@triton.jit
def load(
    ptr, rows, columns, n_rows, n_columns, ROW: tl.constexpr, COLUMN: tl.constexpr,
    ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix whose rows and columns are ROW and COLUMN numbers apart; zero where they do not exist."""
    inside = ((rows < n_rows) | ALL_ROWS)[:, None] & ((columns < n_columns) | ALL_COLUMNS)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * ROW + columns[None, :] * COLUMN, mask=inside, other=0.0)


@triton.jit
def store(
    ptr, tile, rows, columns, n_rows, n_columns, ROW: tl.constexpr, COLUMN: tl.constexpr, ALL_COLUMNS: tl.constexpr
):
    """Writes a tile of a matrix in its dtype; see `load`."""
    inside = (rows < n_rows)[:, None] & ((columns < n_columns) | ALL_COLUMNS)[None, :]
    place = ptr + rows.to(tl.int64)[:, None] * ROW + columns[None, :] * COLUMN
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=inside)
