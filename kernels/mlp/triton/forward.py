"""The forward kernel and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import as_rows, contiguous, launch, row_stride
from vitrail.kernels._common.triton import gelu_16
from vitrail.kernels.mlp.triton.tiles import Tile, load, store, tile_for, widths_of

# By the wider of a row and a result, in channels.
TILES = {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 3), 192: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)}


@triton.jit
def _add_bias(total, ptr, columns, n_columns, ALL: tl.constexpr):
    return total + tl.load(ptr + columns, mask=(columns < n_columns) | ALL, other=0.0).to(tl.float32)[None, :]


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
    x_1 = load(x_ptr, rows, in_1, n_rows, DIM, X_STRIDE, 1, False, DIM >= IN_1)
    total_1 = tl.zeros((ROWS, OUT_1), tl.float32)
    if IN_2 > 0:
        in_2 = IN_1 + tl.arange(0, IN_2)
        x_2 = load(x_ptr, rows, in_2, n_rows, DIM, X_STRIDE, 1, False, DIM == IN_1 + IN_2)
    if OUT_2 > 0:
        out_2 = OUT_1 + tl.arange(0, OUT_2)
        total_2 = tl.zeros((ROWS, OUT_2), tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
        hidden = start + tl.arange(0, BLOCK)
        whole: tl.constexpr = HIDDEN % BLOCK == 0
        # Products in float16 or bfloat16: Triton's precision of float32 does not matter.
        h = tl.dot(x_1, load(w1_ptr, in_1, hidden, DIM, HIDDEN, 1, DIM, DIM >= IN_1, whole))
        if IN_2 > 0:
            h = tl.dot(x_2, load(w1_ptr, in_2, hidden, DIM, HIDDEN, 1, DIM, DIM == IN_1 + IN_2, whole), acc=h)
        if HAS_B1:
            h = _add_bias(h, b1_ptr, hidden, HIDDEN, whole)
        h = gelu_16(h).to(x_1.dtype)
        total_1 = tl.dot(h, load(w2_ptr, hidden, out_1, HIDDEN, OUT, 1, HIDDEN, whole, OUT >= OUT_1), acc=total_1)
        if OUT_2 > 0:
            w2 = load(w2_ptr, hidden, out_2, HIDDEN, OUT, 1, HIDDEN, whole, OUT == OUT_1 + OUT_2)
            total_2 = tl.dot(h, w2, acc=total_2)
    if HAS_B2:
        total_1 = _add_bias(total_1, b2_ptr, out_1, OUT, OUT >= OUT_1)
    store(y_ptr, total_1, rows, out_1, n_rows, OUT, OUT, 1, OUT >= OUT_1)
    if OUT_2 > 0:
        if HAS_B2:
            total_2 = _add_bias(total_2, b2_ptr, out_2, OUT, OUT == OUT_1 + OUT_2)
        store(y_ptr, total_2, rows, out_2, n_rows, OUT, OUT, 1, OUT == OUT_1 + OUT_2)


def mlp_forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Fused forward; arguments as in `mlp_reference`."""
    hidden, dim = w1.shape
    out_dim = w2.shape[0]
    y = torch.empty((*x.shape[:-1], out_dim), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    tile = tile_for(TILES, dim, out_dim)
    launch(
        _mlp_fwd_kernel, (triton.cdiv(len(rows), tile.rows),),
        rows, w1.contiguous(), contiguous(b1), w2.contiguous(), contiguous(b2), y, len(rows),
        HAS_B1=b1 is not None, HAS_B2=b2 is not None, X_STRIDE=row_stride(rows), DIM=dim, HIDDEN=hidden, OUT=out_dim,
        **widths_of(dim, out_dim), **tile.constants,
    )  # fmt: skip
    return y
