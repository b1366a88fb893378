"""Triton kernel of the MLP: index map, tiling, numerics and roofline.

Index map. All leading axes are one axis of rows at a constant distance. A program holds a tile of rows and the sums of
its results in registers and walks over the hidden channels, block by block: a block's product with the rows, GELU, and
its product with the second weight's block, which is added to the sums. The hidden map never leaves the registers; the
weights, which all programs read, come from the second-level cache.

Tiling. Tiles' sides are powers of two. So that 96 or 192 channels do not take the products of 128 or 256, channels lie
in two tiles side by side, of 64 and 32 or of 128 and 64; what is left over is masked.

Numerics. Sums are float32; the first product goes through GELU without being rounded, and is rounded to the inputs'
dtype as an operand of the second one.

Roofline. Moved bytes, one map in and one out, take less than the products: 401408 rows of 96 channels with 384 hidden
ones are 51 microseconds at 3 TB/s, and 59 GFLOP, 60 at the tensor cores' peak. Between them stand the weights, which
come from the second-level cache once a tile of rows, and GELU, evaluated 154 million times: with ReLU in its place that
case took 152 in place of 198 (in tiles of 64 x 64), with `tl.erf` 337.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, with biases, CUDA-graph replay), microseconds:

============  ======  =====  =======  ========  ==================
rows          hidden  fused  PyTorch  compiled  bytes at 3 TB/s
============  ======  =====  =======  ========  ==================
401408 x 64   192      76.9  273.1    281.9     34.3
401408 x 96   384     188.6  537.1    546.2     51.4
401408 x 128  512     278.3  660.7              68.5
100352 x 128  384      62.0  154.0    155.7     17.1
100352 x 192  768     156.7  261.7    269.7     25.7
25088 x 256   768      55.9   80.0               8.6
100352 x 256  1024    226.1  349.1              34.3
25088 x 384   1536    210.7  158.9    162.9     12.8
============  ======  =====  =======  ========  ==================

The last one, the best of five tilings, is why wider rows are the reference's. Few rows leave multiprocessors idle: 3136
of 96 took 9.5 (PyTorch 11.4), of 192 and of 256 channels 24 and 27 (15 and 16); 12544 took 11.9, 24.8 and 28.8 (20.8,
37.0 and 39.2).

Tried and rejected: programs that keep all weights in shared memory and walk over the rows (225.8 for 96 channels, 78.6
for 64); 8 warps for 96 channels (212.7) and 4 stages (206.9); a shorter polynomial for GELU, good for bfloat16 alone
(190.4 where 198.4 was). Adding the block's residual here takes 34 for 401408 x 96 and 12 for 100352 x 192, by itself 76
and 38; but then a hook on the layer would see the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import as_rows, contiguous, launch, row_stride
from vitrail.kernels._common.triton import gelu_16


class Tile(NamedTuple):
    """Rows and hidden channels of a program's tiles, and how it is launched."""

    rows: int
    hidden: int
    warps: int
    stages: int


# By the wider of a row and a result, in channels.
_TILES = {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 3), 192: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)}


@triton.jit
def _load(
    ptr, rows, columns, n_rows, n_columns, ROW: tl.constexpr, COLUMN: tl.constexpr,
    ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix whose rows and columns are ROW and COLUMN numbers apart; zero where they do not exist."""
    inside = ((rows < n_rows) | ALL_ROWS)[:, None] & ((columns < n_columns) | ALL_COLUMNS)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * ROW + columns[None, :] * COLUMN, mask=inside, other=0.0)


@triton.jit
def _store(y_ptr, b2_ptr, total, rows, columns, n_rows, HAS_BIAS: tl.constexpr, DIM: tl.constexpr, ALL: tl.constexpr):
    """Stores a tile of results, contiguous rows of DIM."""
    exists = (columns < DIM) | ALL
    if HAS_BIAS:
        total += tl.load(b2_ptr + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    place = y_ptr + rows.to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(place, total.to(y_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def _mlp_fwd_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, n_rows, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    X_STRIDE: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    IN_1: tl.constexpr, IN_2: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows. IN_1 and IN_2 are the widths of the tiles that hold its channels, OUT_1 and OUT_2 its results'.

    The second ones are 0 where one tile holds all.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_1, out_1 = tl.arange(0, IN_1), tl.arange(0, OUT_1)
    x_1 = _load(x_ptr, rows, in_1, n_rows, DIM, X_STRIDE, 1, False, DIM >= IN_1)
    total_1 = tl.zeros((ROWS, OUT_1), tl.float32)
    if IN_2 > 0:
        in_2 = IN_1 + tl.arange(0, IN_2)
        x_2 = _load(x_ptr, rows, in_2, n_rows, DIM, X_STRIDE, 1, False, DIM == IN_1 + IN_2)
    if OUT_2 > 0:
        out_2 = OUT_1 + tl.arange(0, OUT_2)
        total_2 = tl.zeros((ROWS, OUT_2), tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
        hidden = start + tl.arange(0, BLOCK)
        whole: tl.constexpr = HIDDEN % BLOCK == 0
        # Products in float16 or bfloat16: Triton's precision of float32 does not matter.
        h = tl.dot(x_1, _load(w1_ptr, in_1, hidden, DIM, HIDDEN, 1, DIM, DIM >= IN_1, whole))
        if IN_2 > 0:
            h = tl.dot(x_2, _load(w1_ptr, in_2, hidden, DIM, HIDDEN, 1, DIM, DIM == IN_1 + IN_2, whole), acc=h)
        if HAS_B1:
            h += tl.load(b1_ptr + hidden, mask=(hidden < HIDDEN) | whole, other=0.0).to(tl.float32)[None, :]
        h = gelu_16(h).to(x_1.dtype)
        total_1 = tl.dot(h, _load(w2_ptr, hidden, out_1, HIDDEN, OUT, 1, HIDDEN, whole, OUT >= OUT_1), acc=total_1)
        if OUT_2 > 0:
            w2 = _load(w2_ptr, hidden, out_2, HIDDEN, OUT, 1, HIDDEN, whole, OUT == OUT_1 + OUT_2)
            total_2 = tl.dot(h, w2, acc=total_2)
    _store(y_ptr, b2_ptr, total_1, rows, out_1, n_rows, HAS_B2, OUT, OUT >= OUT_1)
    if OUT_2 > 0:
        _store(y_ptr, b2_ptr, total_2, rows, out_2, n_rows, HAS_B2, OUT, OUT == OUT_1 + OUT_2)


def _tiles_of(dim: int) -> tuple[int, int]:
    """Widths of the tiles that hold so many channels, powers of two from 16 on; the second is 0 if it is not needed."""
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(dim - first))
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def mlp_forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Fused forward; arguments as in `mlp_reference`."""
    hidden, dim = w1.shape
    out_dim = w2.shape[0]
    y = torch.empty((*x.shape[:-1], out_dim), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    tile = next(tile for width, tile in _TILES.items() if max(dim, out_dim) <= width)
    (in_1, in_2), (out_1, out_2) = _tiles_of(dim), _tiles_of(out_dim)
    launch(
        _mlp_fwd_kernel, (triton.cdiv(len(rows), tile.rows),),
        rows, w1.contiguous(), contiguous(b1), w2.contiguous(), contiguous(b2), y, len(rows),
        HAS_B1=b1 is not None, HAS_B2=b2 is not None, X_STRIDE=row_stride(rows), DIM=dim, HIDDEN=hidden, OUT=out_dim,
        IN_1=in_1, IN_2=in_2, OUT_1=out_1, OUT_2=out_2, ROWS=tile.rows, BLOCK=tile.hidden, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
