"""The backward kernels and their launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.gradients import empty_gradient, zeros_or_empty
from vitrail.kernels._common.launch import as_rows, contiguous, launch, multiprocessors, row_stride
from vitrail.kernels._common.triton import gelu_16_and_slope, sum_of_parts
from vitrail.kernels.mlp.op import has_room
from vitrail.kernels.mlp.triton.tiles import Tile, load, store, tile_for, widths_of

# By the wider of a row and a result, in channels; and for devices with less shared memory, on which it is not measured.
TILES = {64: Tile(64, 64, 4, 3, 2), 96: Tile(64, 128, 8, 3, 1), 192: Tile(32, 128, 8, 3, 1)}
_SMALL = Tile(32, 64, 4, 2, 1)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _mlp_bwd_kernel(
    grad_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, d_hidden_ptr, d_w1_ptr, d_b1_ptr, d_w2_ptr, d_b2_ptr, n_rows, n_parts,
    HAS_B1: tl.constexpr, STORES: tl.constexpr, SUMS_W1: tl.constexpr, SUMS_B1: tl.constexpr, SUMS_W2: tl.constexpr,
    SUMS_B2: tl.constexpr, GRAD_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr,
    IN_1: tl.constexpr, IN_2: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of hidden channels and every n-th tile of rows; tiles of the channels are those of the forward kernel.

    Leaves the gradient of the hidden map before GELU (STORES) and sums for the gradients of the parameters (SUMS),
    those of the last bias for COLUMNS of its numbers.
    """
    n_blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    whole: tl.constexpr = HIDDEN % BLOCK == 0
    needs_d_h: tl.constexpr = STORES or SUMS_W1 or SUMS_B1
    block = tl.program_id(0) % n_blocks
    part = (tl.program_id(0) // n_blocks).to(tl.int64)
    hidden = block * BLOCK + tl.arange(0, BLOCK)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    in_1, out_1 = tl.arange(0, IN_1), tl.arange(0, OUT_1)
    w1_1 = load(w1_ptr, hidden, in_1, HIDDEN, DIM, DIM, 1, whole, DIM >= IN_1)
    w2_1 = load(w2_ptr, hidden, out_1, HIDDEN, OUT, 1, HIDDEN, whole, OUT >= OUT_1)
    d_w1_1 = tl.zeros((BLOCK, IN_1), tl.float32)
    d_w2_1 = tl.zeros((BLOCK, OUT_1), tl.float32)
    d_b1 = tl.zeros((BLOCK,), tl.float32)
    d_b2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    if IN_2 > 0:
        in_2 = IN_1 + tl.arange(0, IN_2)
        w1_2 = load(w1_ptr, hidden, in_2, HIDDEN, DIM, DIM, 1, whole, DIM == IN_1 + IN_2)
        d_w1_2 = tl.zeros((BLOCK, IN_2), tl.float32)
    if OUT_2 > 0:
        out_2 = OUT_1 + tl.arange(0, OUT_2)
        w2_2 = load(w2_ptr, hidden, out_2, HIDDEN, OUT, 1, HIDDEN, whole, OUT == OUT_1 + OUT_2)
        d_w2_2 = tl.zeros((BLOCK, OUT_2), tl.float32)
    if HAS_B1:
        b1 = tl.load(b1_ptr + hidden, mask=(hidden < HIDDEN) | whole, other=0.0).to(tl.float32)[:, None]
    for tile in tl.range(tl.program_id(0) // n_blocks, tl.cdiv(n_rows, ROWS), n_parts, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        x_1 = load(x_ptr, rows, in_1, n_rows, DIM, X_STRIDE, 1, False, DIM >= IN_1)
        grad_1 = load(grad_ptr, rows, out_1, n_rows, OUT, GRAD_STRIDE, 1, False, OUT >= OUT_1)
        # Hidden tiles are (BLOCK, ROWS): as first operands of the products with rows they need not be transposed.
        h = tl.dot(w1_1, tl.trans(x_1))
        if IN_2 > 0:
            x_2 = load(x_ptr, rows, in_2, n_rows, DIM, X_STRIDE, 1, False, DIM == IN_1 + IN_2)
            h = tl.dot(w1_2, tl.trans(x_2), acc=h)
        if OUT_2 > 0:
            grad_2 = load(grad_ptr, rows, out_2, n_rows, OUT, GRAD_STRIDE, 1, False, OUT == OUT_1 + OUT_2)
        if needs_d_h:
            d_h = tl.dot(w2_1, tl.trans(grad_1))
            if OUT_2 > 0:
                d_h = tl.dot(w2_2, tl.trans(grad_2), acc=d_h)
        if HAS_B1:
            h += b1
        act, slope = gelu_16_and_slope(h)
        if SUMS_W2:  # rows that do not exist have no gradient, though GELU makes something of their bias
            act = act.to(x_1.dtype)
            d_w2_1 = tl.dot(act, grad_1, acc=d_w2_1)
            if OUT_2 > 0:
                d_w2_2 = tl.dot(act, grad_2, acc=d_w2_2)
        if needs_d_h:
            d_h *= slope
            if SUMS_B1:
                d_b1 += tl.sum(d_h, 1)
            d_h = d_h.to(x_1.dtype)
            if STORES:
                if BLOCK > 64:  # each is the quicker one there, by up to a tenth
                    store(d_hidden_ptr, tl.trans(d_h), rows, hidden, n_rows, HIDDEN, HIDDEN, 1, whole)
                else:
                    place = d_hidden_ptr + rows.to(tl.int64)[None, :] * HIDDEN + hidden[:, None]
                    tl.store(place, d_h, mask=(rows < n_rows)[None, :] & ((hidden < HIDDEN) | whole)[:, None])
            if SUMS_W1:
                d_w1_1 = tl.dot(d_h, x_1, acc=d_w1_1)
                if IN_2 > 0:
                    d_w1_2 = tl.dot(d_h, x_2, acc=d_w1_2)
        if SUMS_B2:
            d_b2 += load(grad_ptr, rows, columns, n_rows, OUT, GRAD_STRIDE, 1, False, False).to(tl.float32)
    if SUMS_W1:
        d_w1_ptr += part * HIDDEN * DIM
        store(d_w1_ptr, d_w1_1, hidden, in_1, HIDDEN, DIM, DIM, 1, DIM >= IN_1)
        if IN_2 > 0:
            store(d_w1_ptr, d_w1_2, hidden, in_2, HIDDEN, DIM, DIM, 1, DIM == IN_1 + IN_2)
    if SUMS_B1:
        tl.store(d_b1_ptr + part * HIDDEN + hidden, d_b1, mask=hidden < HIDDEN)
    if SUMS_W2:
        d_w2_ptr += part * HIDDEN * OUT
        store(d_w2_ptr, d_w2_1, hidden, out_1, HIDDEN, OUT, 1, HIDDEN, OUT >= OUT_1)
        if OUT_2 > 0:
            store(d_w2_ptr, d_w2_2, hidden, out_2, HIDDEN, OUT, 1, HIDDEN, OUT == OUT_1 + OUT_2)
    if SUMS_B2:
        tl.store(d_b2_ptr + part * OUT + columns, tl.sum(d_b2, 0), mask=columns < OUT)


def mlp_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Fused gradients of x, w1, b1, w2 and b2; empty where they are not needed or there is no such input."""
    inputs = (x, w1, b1, w2, b2)
    wanted = [t is not None and is_needed for t, is_needed in zip(inputs, needed, strict=True)]
    if x.numel() == 0:
        return tuple(zeros_or_empty(x, t if wants else None) for t, wants in zip(inputs, wanted, strict=True))
    d_hidden = x.new_empty((*x.shape[:-1], len(w1))) if wanted[0] else None
    parts = _sums(grad, x, w1, b1, w2, d_hidden, wanted[1:]) if any(wanted) else [None] * 4
    d_x = empty_gradient(x) if d_hidden is None else d_hidden @ w1
    return d_x, *(empty_gradient(x) if part is None else sum_of_parts(part, x.dtype) for part in parts)


def _sums(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    d_hidden: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Fills the gradient of the hidden map; returns sums for the gradients of w1, b1, w2 and b2 where wanted.

    Those are (programs, *shape of the gradient), in float32.
    """
    rows, grads = as_rows(x), as_rows(grad)
    hidden, dim = w1.shape
    out_dim, n_rows = len(w2), len(rows)
    tile = tile_for(TILES, dim, out_dim) if has_room(x.device) else _SMALL
    n_blocks = triton.cdiv(hidden, tile.hidden)
    n_parts = min(max(1, tile.programs * multiprocessors(x.device) // n_blocks), triton.cdiv(n_rows, tile.rows))
    shapes = ((hidden, dim), (hidden,), (out_dim, hidden), (out_dim,))
    parts = [
        torch.empty((n_parts, *shape), dtype=torch.float32, device=x.device) if wants else None
        for shape, wants in zip(shapes, wanted, strict=True)
    ]
    launch(
        _mlp_bwd_kernel, (n_parts * n_blocks,),
        grads, rows, w1.contiguous(), contiguous(b1), w2.contiguous(), d_hidden, *parts, n_rows, n_parts,
        HAS_B1=b1 is not None, STORES=d_hidden is not None,
        **{f"SUMS_{name}": wants for name, wants in zip(("W1", "B1", "W2", "B2"), wanted, strict=True)},
        GRAD_STRIDE=row_stride(grads), X_STRIDE=row_stride(rows), DIM=dim, HIDDEN=hidden, OUT=out_dim,
        COLUMNS=triton.next_power_of_2(triton.cdiv(out_dim, n_blocks)), **widths_of(dim, out_dim), **tile.constants,
    )  # fmt: skip
    return parts
