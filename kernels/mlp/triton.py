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

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.gradients import empty_gradient
from vitrail.kernels._common.launch import as_rows, contiguous, launch, multiprocessors, row_stride
from vitrail.kernels._common.triton import add_parts_kernel, gelu_16, gelu_16_and_slope


class Tile(NamedTuple):
    """Rows and hidden channels of a program's tiles, and how it is launched."""

    rows: int
    hidden: int
    warps: int
    stages: int
    programs: int = 0  # a multiprocessor, where they walk


# By the wider of a row and a result, in channels.
_BWD_ROWS_TILES = {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 4, 3)}
_BWD_WEIGHTS_TILES = {64: Tile(64, 64, 4, 2, 2), 128: Tile(64, 64, 4, 2, 2)}
_PARTS, _NUMBERS = 32, 128  # sums of programs that are added at once, and numbers of a program that adds
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


@triton.jit(do_not_specialize=["n_rows"])
def _mlp_bwd_rows_kernel(
    grad_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, d_x_ptr, act_ptr, d_hidden_ptr, sums_1_ptr, sums_2_ptr, n_rows,
    HAS_B1: tl.constexpr, STORES: tl.constexpr, SUMS_1: tl.constexpr, SUMS_2: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    IN_1: tl.constexpr, IN_2: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_1, out_1 = tl.arange(0, IN_1), tl.arange(0, OUT_1)
    x_1 = _load(x_ptr, rows, in_1, n_rows, DIM, X_STRIDE, 1, False, DIM >= IN_1)
    grad_1 = _load(grad_ptr, rows, out_1, n_rows, OUT, GRAD_STRIDE, 1, False, OUT >= OUT_1)
    total_1 = tl.zeros((ROWS, IN_1), tl.float32)
    if IN_2 > 0:
        in_2 = IN_1 + tl.arange(0, IN_2)
        x_2 = _load(x_ptr, rows, in_2, n_rows, DIM, X_STRIDE, 1, False, DIM == IN_1 + IN_2)
        total_2 = tl.zeros((ROWS, IN_2), tl.float32)
    if OUT_2 > 0:
        out_2 = OUT_1 + tl.arange(0, OUT_2)
        grad_2 = _load(grad_ptr, rows, out_2, n_rows, OUT, GRAD_STRIDE, 1, False, OUT == OUT_1 + OUT_2)
    if SUMS_2:
        sums = sums_2_ptr + tl.program_id(0).to(tl.int64) * OUT
        tl.store(sums + out_1, tl.sum(grad_1.to(tl.float32), 0), mask=out_1 < OUT)
        if OUT_2 > 0:
            tl.store(sums + out_2, tl.sum(grad_2.to(tl.float32), 0), mask=out_2 < OUT)
    for start in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
        hidden = start + tl.arange(0, BLOCK)
        whole: tl.constexpr = HIDDEN % BLOCK == 0
        w1_1 = _load(w1_ptr, hidden, in_1, HIDDEN, DIM, DIM, 1, whole, DIM >= IN_1)
        h = tl.dot(x_1, tl.trans(w1_1))
        d_h = tl.dot(grad_1, _load(w2_ptr, out_1, hidden, OUT, HIDDEN, HIDDEN, 1, OUT >= OUT_1, whole))
        if IN_2 > 0:
            w1_2 = _load(w1_ptr, hidden, in_2, HIDDEN, DIM, DIM, 1, whole, DIM == IN_1 + IN_2)
            h = tl.dot(x_2, tl.trans(w1_2), acc=h)
        if OUT_2 > 0:
            w2_2 = _load(w2_ptr, out_2, hidden, OUT, HIDDEN, HIDDEN, 1, OUT == OUT_1 + OUT_2, whole)
            d_h = tl.dot(grad_2, w2_2, acc=d_h)
        if HAS_B1:
            h += tl.load(b1_ptr + hidden, mask=(hidden < HIDDEN) | whole, other=0.0).to(tl.float32)[None, :]
        act, slope = gelu_16_and_slope(h)
        d_h *= slope
        if SUMS_1:
            sums_1 = sums_1_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + hidden
            tl.store(sums_1, tl.sum(d_h, 0), mask=hidden < HIDDEN)
        d_hidden = d_h.to(x_1.dtype)
        if STORES:
            place = rows.to(tl.int64)[:, None] * HIDDEN + hidden[None, :]
            inside = (rows < n_rows)[:, None] & ((hidden < HIDDEN) | whole)[None, :]
            tl.store(act_ptr + place, act.to(x_1.dtype), mask=inside)
            tl.store(d_hidden_ptr + place, d_hidden, mask=inside)
        total_1 = tl.dot(d_hidden, w1_1, acc=total_1)
        if IN_2 > 0:
            total_2 = tl.dot(d_hidden, w1_2, acc=total_2)
    _store(d_x_ptr, d_x_ptr, total_1, rows, in_1, n_rows, False, DIM, DIM >= IN_1)
    if IN_2 > 0:
        _store(d_x_ptr, d_x_ptr, total_2, rows, in_2, n_rows, False, DIM, DIM == IN_1 + IN_2)


@triton.jit
def _store_sums(ptr, total, rows, columns, n_rows, n_columns, ROW: tl.constexpr, COLUMN: tl.constexpr):
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(ptr + rows[:, None] * ROW + columns[None, :] * COLUMN, total, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _mlp_bwd_weights_kernel(
    grad_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, d_w1_ptr, d_b1_ptr, d_w2_ptr, d_hidden_ptr, n_rows, n_parts,
    HAS_B1: tl.constexpr, STORES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SUMS: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    IN_1: tl.constexpr, IN_2: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of hidden channels and every n-th tile of rows: sums for the gradients of weights and first bias.

    FIRST: of the first weight; SECOND: of the second one; SUMS: of the bias, which FIRST's products have.
    """
    blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    part = tl.program_id(0) // blocks
    hidden = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    whole: tl.constexpr = HIDDEN % BLOCK == 0
    in_1, out_1 = tl.arange(0, IN_1), tl.arange(0, OUT_1)
    w1_1 = _load(w1_ptr, hidden, in_1, HIDDEN, DIM, DIM, 1, whole, DIM >= IN_1)
    if IN_2 > 0:
        in_2 = IN_1 + tl.arange(0, IN_2)
        w1_2 = _load(w1_ptr, hidden, in_2, HIDDEN, DIM, DIM, 1, whole, DIM == IN_1 + IN_2)
    if OUT_2 > 0:
        out_2 = OUT_1 + tl.arange(0, OUT_2)
    if FIRST:
        w2_1 = _load(w2_ptr, hidden, out_1, HIDDEN, OUT, 1, HIDDEN, whole, OUT >= OUT_1)
        d_w1_1 = tl.zeros((BLOCK, IN_1), tl.float32)
        if IN_2 > 0:
            d_w1_2 = tl.zeros((BLOCK, IN_2), tl.float32)
        if OUT_2 > 0:
            w2_2 = _load(w2_ptr, hidden, out_2, HIDDEN, OUT, 1, HIDDEN, whole, OUT == OUT_1 + OUT_2)
        if SUMS:
            d_b1 = tl.zeros((BLOCK,), tl.float32)
    if SECOND:
        d_w2_1 = tl.zeros((BLOCK, OUT_1), tl.float32)
        if OUT_2 > 0:
            d_w2_2 = tl.zeros((BLOCK, OUT_2), tl.float32)
    if HAS_B1:
        b1 = tl.load(b1_ptr + hidden, mask=hidden < HIDDEN, other=0.0).to(tl.float32)[:, None]
    for tile in tl.range(part, tl.cdiv(n_rows, ROWS), n_parts, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        x_1 = _load(x_ptr, rows, in_1, n_rows, DIM, X_STRIDE, 1, False, DIM >= IN_1)
        h = tl.dot(w1_1, tl.trans(x_1))
        if IN_2 > 0:
            x_2 = _load(x_ptr, rows, in_2, n_rows, DIM, X_STRIDE, 1, False, DIM == IN_1 + IN_2)
            h = tl.dot(w1_2, tl.trans(x_2), acc=h)
        grad_1 = _load(grad_ptr, rows, out_1, n_rows, OUT, GRAD_STRIDE, 1, False, OUT >= OUT_1)
        if OUT_2 > 0:
            grad_2 = _load(grad_ptr, rows, out_2, n_rows, OUT, GRAD_STRIDE, 1, False, OUT == OUT_1 + OUT_2)
        if FIRST:
            d_h = tl.dot(w2_1, tl.trans(grad_1))
            if OUT_2 > 0:
                d_h = tl.dot(w2_2, tl.trans(grad_2), acc=d_h)
        if HAS_B1:
            h += b1
        act, slope = gelu_16_and_slope(h)
        if SECOND:
            act = act.to(x_1.dtype)
            d_w2_1 = tl.dot(act, grad_1, acc=d_w2_1)
            if OUT_2 > 0:
                d_w2_2 = tl.dot(act, grad_2, acc=d_w2_2)
        if FIRST:
            d_h *= slope
            if SUMS:
                d_b1 += tl.sum(d_h, 1)
            d_hidden = d_h.to(x_1.dtype)
            if STORES:
                place = hidden[:, None] + rows.to(tl.int64)[None, :] * HIDDEN
                inside = ((hidden < HIDDEN) | whole)[:, None] & (rows < n_rows)[None, :]
                tl.store(d_hidden_ptr + place, d_hidden, mask=inside)
            d_w1_1 = tl.dot(d_hidden, x_1, acc=d_w1_1)
            if IN_2 > 0:
                d_w1_2 = tl.dot(d_hidden, x_2, acc=d_w1_2)
    if FIRST:
        d_w1_ptr += part.to(tl.int64) * HIDDEN * DIM
        _store_sums(d_w1_ptr, d_w1_1, hidden, in_1, HIDDEN, DIM, DIM, 1)
        if IN_2 > 0:
            _store_sums(d_w1_ptr, d_w1_2, hidden, in_2, HIDDEN, DIM, DIM, 1)
        if SUMS:
            tl.store(d_b1_ptr + part.to(tl.int64) * HIDDEN + hidden, d_b1, mask=hidden < HIDDEN)
    if SECOND:
        d_w2_ptr += part.to(tl.int64) * HIDDEN * OUT
        _store_sums(d_w2_ptr, d_w2_1, hidden, out_1, HIDDEN, OUT, 1, HIDDEN)
        if OUT_2 > 0:
            _store_sums(d_w2_ptr, d_w2_2, hidden, out_2, HIDDEN, OUT, 1, HIDDEN)


def mlp_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Fused gradients of x, w1, b1, w2 and b2; empty where they are not needed or there is no such input."""
    inputs = (x, w1, b1, w2, b2)
    needed = [t is not None and is_needed for t, is_needed in zip(inputs, needed, strict=True)]
    if grad.numel() == 0 or x.numel() == 0:
        return tuple(torch.zeros_like(t) if n else empty_gradient(x) for t, n in zip(inputs, needed, strict=True))
    call = _Backward(as_rows(grad), as_rows(x), w1.contiguous(), contiguous(b1), w2.contiguous())
    d_b2 = empty_gradient(x)
    if max(call.dim, call.out_dim) <= _WIDEST_TWICE:
        d_x, _, _, _, sums_2 = call.of_rows(False, False, needed[4]) if needed[0] else [None] * 5
        d_w1, d_b1, d_w2 = call.of_weights(*needed[1:4])
    else:
        d_x, act, d_hidden, sums_1, sums_2 = call.of_rows(needed[1] or needed[3], needed[2], needed[4])
        d_w1 = d_hidden.t() @ call.rows if needed[1] else None
        d_w2 = call.grads.t() @ act if needed[3] else None
        d_b1 = add_up(sums_1, x.dtype) if needed[2] else None
    if needed[4]:
        d_b2 = call.grads.sum(0) if sums_2 is None else add_up(sums_2, x.dtype)
    d_x = d_x.view(x.shape) if needed[0] else None
    return tuple(empty_gradient(x) if t is None else t for t in (d_x, d_w1, d_b1, d_w2, d_b2))


_WIDEST_TWICE = 128


def add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    size = total.numel()
    launch(
        add_parts_kernel, (1, triton.cdiv(size, _NUMBERS)), parts, total, total, len(parts),
        HAS_BIAS=True, DIM=size, TAPS=0, PARTS=_PARTS, CHANNELS=_NUMBERS, num_warps=8, num_stages=1,
    )  # fmt: skip
    return total


class _Backward:
    def __init__(self, grads, rows, w1, b1, w2):
        self.grads, self.rows, self.w1, self.b1, self.w2 = grads, rows, w1, b1, w2
        self.hidden, self.dim = w1.shape
        self.out_dim = w2.shape[0]
        (in_1, in_2), (out_1, out_2) = _tiles_of(self.dim), _tiles_of(self.out_dim)
        self.constants = dict(
            HAS_B1=b1 is not None, GRAD_STRIDE=row_stride(grads), X_STRIDE=row_stride(rows), DIM=self.dim,
            HIDDEN=self.hidden, OUT=self.out_dim, IN_1=in_1, IN_2=in_2, OUT_1=out_1, OUT_2=out_2,
        )  # fmt: skip

    def _tile(self, tiles):
        return next(tile for width, tile in tiles.items() if max(self.dim, self.out_dim) <= width)

    def of_rows(self, stores, sums_1, sums_2, tile=None):
        tile = tile or self._tile(_BWD_ROWS_TILES)
        n_rows = len(self.rows)
        n_tiles = triton.cdiv(n_rows, tile.rows)
        d_x = torch.empty((n_rows, self.dim), dtype=self.rows.dtype, device=self.rows.device)
        act, d_hidden = (d_x.new_empty((n_rows, self.hidden)) if stores else None for _ in range(2))
        p_1 = d_x.new_empty((n_tiles, self.hidden), dtype=torch.float32) if sums_1 else None
        p_2 = d_x.new_empty((n_tiles, self.out_dim), dtype=torch.float32) if sums_2 else None
        launch(
            _mlp_bwd_rows_kernel, (n_tiles,),
            self.grads, self.rows, self.w1, self.b1, self.w2, d_x, act, d_hidden, p_1, p_2, n_rows,
            STORES=stores, SUMS_1=sums_1, SUMS_2=sums_2, ROWS=tile.rows, BLOCK=tile.hidden, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages, **self.constants,
        )  # fmt: skip
        return d_x, act, d_hidden, p_1, p_2

    def of_weights(self, need_w1, need_b1, need_w2, tile=None):
        if not (need_w1 or need_b1 or need_w2):
            return None, None, None
        p_w1, p_b1, p_w2 = self.parts_of_weights(need_w1 or need_b1, need_b1, need_w2, tile)
        dtype = self.rows.dtype
        return (
            add_up(p_w1, dtype) if need_w1 else None,
            add_up(p_b1, dtype) if need_b1 else None,
            add_up(p_w2, dtype) if need_w2 else None,
        )

    def parts_of_weights(self, first, sums, second, tile=None, d_hidden=None):
        tile = tile or self._tile(_BWD_WEIGHTS_TILES)
        n_rows, device = len(self.rows), self.rows.device
        blocks = triton.cdiv(self.hidden, tile.hidden)
        slots = max(1, tile.programs * multiprocessors(device) // blocks)
        n_parts = min(slots, triton.cdiv(n_rows, tile.rows))
        def room(*shape):
            return torch.empty((n_parts, *shape), dtype=torch.float32, device=device)
        p_w1 = room(self.hidden, self.dim) if first else None
        p_b1 = room(self.hidden) if sums else None
        p_w2 = room(self.out_dim, self.hidden) if second else None
        launch(
            _mlp_bwd_weights_kernel, (n_parts * blocks,),
            self.grads, self.rows, self.w1, self.b1, self.w2, p_w1, p_b1, p_w2, d_hidden, n_rows, n_parts,
            STORES=d_hidden is not None, FIRST=first, SECOND=second, SUMS=sums, ROWS=tile.rows, BLOCK=tile.hidden, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages, **self.constants,
        )  # fmt: skip
        return p_w1, p_b1, p_w2
