"""Kernels for windows of a few tiles: programs keep their block of a window, and walk over the windows."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vitrail.kernels._common.triton import (
    finite,
    load_kv,
    load_statistics,
    online_softmax,
    softmax_statistics,
    statistics_of,
    store_statistics,
)
from vitrail.kernels.window_attention.triton.index import locate, mask_class, offsets, window_of_class
from vitrail.kernels.window_attention.triton.tiles import store_pad_gradients

_LOG2E = tl.constexpr(math.log2(math.e))
# Of the gradients of weights in the kernel of the queries: there they are counted from a base, not yet divided by the
# total, and reach twice what float16 holds before one of them alone does.
_UNIT = tl.constexpr(0.25)


@triton.jit(do_not_specialize=["height", "width"])
def _window_mask_kernel(
    out_ptr, bias_ptr, height, width, n_heads,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HIDES_PADS: tl.constexpr, N_CLASSES: tl.constexpr,
    N_ROWS: tl.constexpr, N_COLUMNS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """What is added to the logits, (classes, heads, N_ROWS, N_COLUMNS) in fragments: bias, and -inf what is not seen.

    Rows are queries and columns keys, or vice versa with `KEYS_FIRST`. A fragment is 16 x 16 numbers, those of a
    warp's accumulators in tensor cores, thread by thread, 8 each. A program fills 16 rows.
    """
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    row_fragment = tl.program_id(0) % (N_ROWS // 16)
    head = (tl.program_id(0) // (N_ROWS // 16)) % n_heads
    number = tl.program_id(0) // (N_ROWS // 16 * n_heads)
    window = window_of_class(number, height, width, WINDOW_H, WINDOW_W, N_CLASSES)
    index = tl.arange(0, 256)
    row = row_fragment * 16 + (index // 2) % 2 * 8 + index // 32
    _, _, _, row_real, row_region = locate(row, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST)
    for column_fragment in range(N_COLUMNS // 16):
        column = column_fragment * 16 + (index // 4) % 2 * 8 + (index // 8) % 4 * 2 + index % 2
        queries, keys = (column, row) if KEYS_FIRST else (row, column)
        _, _, _, column_real, column_region = locate(
            column, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        visible = (row < N_TOKENS) & (column < N_TOKENS) & (row_region == column_region)
        if HIDES_PADS:
            visible = visible & (row_real if KEYS_FIRST else column_real)
        tile = tl.where(visible, 0.0, float("-inf"))
        if HAS_BIAS:
            at = (head * N_TOKENS + queries) * N_TOKENS + keys
            tile = tl.load(bias_ptr + at, mask=visible, other=float("-inf"))
        tl.store(out_ptr + (tl.program_id(0) * (N_COLUMNS // 16) + column_fragment) * 256 + index, tile)


@triton.jit
def _mask_tile(
    ptr, number, row, column, always, N_ROWS: tl.constexpr, N_COLUMNS: tl.constexpr, STAGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tile of what `_window_mask_kernel` laid out, from a row and a column on.

    One after the other, threads read 8 numbers each; the permutation says that they are those of the tile that the
    tensor cores' accumulators have in the same threads, so that nothing is exchanged.
    """
    index = tl.arange(0, ROWS * COLUMNS)
    fragment = index // 256
    row_fragment = row // 16 + fragment % (ROWS // 16)
    column_fragment = column // 16 + fragment // (ROWS // 16)
    at = ((number * (N_ROWS // 16) + row_fragment) * (N_COLUMNS // 16) + column_fragment) * 256 + index % 256
    if STAGED:
        tile = tl.load(ptr + at)
    else:
        # In a branch, so that Triton does not stage in shared memory what the caches hold from window to window.
        tile = tl.zeros((ROWS * COLUMNS,), ptr.dtype.element_ty)
        if always:
            tile = tl.load(ptr + at)
    tile = tile.reshape(COLUMNS // 16, ROWS // 16, 8, 4, 2, 2, 2)
    return tile.permute(1, 5, 2, 0, 4, 3, 6).reshape(ROWS, COLUMNS)


@triton.jit
def _own(n_heads, strides, OWN: tl.constexpr, N_OWN: tl.constexpr):
    """(tokens that a program works for, head, first window, step to the next)."""
    # Otherwise the compiler, which knows that coordinates are not negative, multiplies 64 bits by 64.
    tl.assume(strides[1] >= 0)
    tl.assume(strides[2] >= 0)
    tokens = (tl.program_id(0) % N_OWN) * OWN + tl.arange(0, OWN)
    head = (tl.program_id(0) // N_OWN) % n_heads
    return tokens, head, tl.program_id(0) // (N_OWN * n_heads), tl.num_programs(0) // (N_OWN * n_heads)


@triton.jit
def _keys(
    START: tl.constexpr, q, window, head, number, row, always, k_ptr, v_ptr, mask_ptr, pad_k_ptr, pad_v_ptr,
    strides, height, width, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_PAD: tl.constexpr, N_ROWS: tl.constexpr, N_COLUMNS: tl.constexpr,
    STAGED: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values, and the queries' logits."""
    tokens = START + tl.arange(0, BLOCK)
    batch, y, x, real, _region = locate(tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST)
    at = offsets(batch, y, x, head, strides, HEAD_DIM)
    k = load_kv(k_ptr, pad_k_ptr, at, real, head, HAS_PAD, HEAD_DIM)
    v = load_kv(v_ptr, pad_v_ptr, at, real, head, HAS_PAD, HEAD_DIM)
    logits = tl.dot(q, tl.trans(k)) * scale
    logits += _mask_tile(mask_ptr, number, row, START, always, N_ROWS, N_COLUMNS, STAGED, OWN, BLOCK)
    return k, v, logits


@triton.jit
def _fwd_step(v, logits, maximum, total, out):
    """Online softmax over one more tile of keys."""
    weights, decay, maximum, total = online_softmax(logits, maximum, total, _LOG2E)
    out = tl.dot(weights.to(v.dtype), v, acc=out * decay[:, None])
    return maximum, total, out


@triton.jit(do_not_specialize=["height", "width", "n_windows"])
def _window_fwd_walking_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, pad_k_ptr, pad_v_ptr, out_ptr,
    strides, out_strides, height, width, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_PAD: tl.constexpr, N_CLASSES: tl.constexpr,
    HEAD_DIM: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr, N_ROWS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """One program: one block of queries of one head, in every `step`-th window."""
    q_tokens, head, first, step = _own(n_heads, strides, OWN, N_OWN)
    row = (tl.program_id(0) % N_OWN) * OWN
    for window in range(first, n_windows, step):
        batch, y, x, real, _region = locate(
            q_tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        number = mask_class(window, height, width, WINDOW_H, WINDOW_W, N_CLASSES) * n_heads + head
        q = tl.load(q_ptr + offsets(batch, y, x, head, strides, HEAD_DIM), mask=real[:, None], other=0.0)
        maximum = tl.full((OWN,), float("-inf"), tl.float32)
        total = tl.zeros((OWN,), tl.float32)
        out = tl.zeros((OWN, HEAD_DIM), tl.float32)
        for tile in tl.static_range(WHOLE // BLOCK + (REST > 0)):
            _k, v, logits = _keys(
                tile * BLOCK, q, window, head, number, row, window < n_windows, k_ptr, v_ptr, mask_ptr, pad_k_ptr,
                pad_v_ptr, strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, HAS_PAD,
                N_ROWS, WHOLE + REST, STAGED, OWN, BLOCK if tile * BLOCK < WHOLE else REST, HEAD_DIM,
            )  # fmt: skip
            maximum, total, out = _fwd_step(v, logits, maximum, total, out)
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out_ptr + offsets(batch, y, x, head, out_strides, HEAD_DIM),
            out.to(out_ptr.dtype.element_ty),
            mask=real[:, None],
        )


@triton.jit
def _dq_step(grad, k, v, logits, maximum, total, base, correction, weighted, mean_key, IS_FIRST: tl.constexpr):
    """One more tile of keys in the queries' gradients and in the statistics of the softmax.

    The first tile's correction is the base from which all count: sums of large numbers that cancel would round off.
    Base, correction and `weighted` are times `_UNIT`.
    """
    d_weights = tl.dot(grad, tl.trans(v))
    weights, decay, maximum, total = online_softmax(logits, maximum, total, _LOG2E)
    if IS_FIRST:
        base = tl.sum(weights * d_weights, 1) * _UNIT / tl.where(total == 0.0, 1.0, total)
    d_weights = weights * (d_weights * _UNIT - base[:, None])
    correction = correction * decay + tl.sum(d_weights, 1)
    mean_key = tl.dot(weights.to(k.dtype), k, acc=mean_key * decay[:, None])
    weighted = tl.dot(d_weights.to(k.dtype), k, acc=weighted * decay[:, None])
    return maximum, total, base, correction, weighted, mean_key


@triton.jit(do_not_specialize=["height", "width", "n_windows"])
def _window_bwd_dq_walking_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, pad_k_ptr, pad_v_ptr, d_q_ptr, stats_ptr,
    grad_strides, strides, d_q_strides, height, width, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_PAD: tl.constexpr, N_CLASSES: tl.constexpr,
    HEAD_DIM: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr, N_ROWS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, STAGED: tl.constexpr, N_STATS: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, block by block as in the forward; leaves statistics of the rows for the other kernel.

    In one pass: d_q is the sum of P (dP - correction) k, which is (sum of P dP k) - correction (sum of P k), with dP
    and correction counted from the same base.
    """
    q_tokens, head, first, step = _own(n_heads, strides, OWN, N_OWN)
    row = (tl.program_id(0) % N_OWN) * OWN
    for window in range(first, n_windows, step):
        batch, y, x, real, _region = locate(
            q_tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        number = mask_class(window, height, width, WINDOW_H, WINDOW_W, N_CLASSES) * n_heads + head
        q = tl.load(q_ptr + offsets(batch, y, x, head, strides, HEAD_DIM), mask=real[:, None], other=0.0)
        grad = tl.load(grad_ptr + offsets(batch, y, x, head, grad_strides, HEAD_DIM), mask=real[:, None], other=0.0)
        maximum = tl.full((OWN,), float("-inf"), tl.float32)
        total = tl.zeros((OWN,), tl.float32)
        base = tl.zeros((OWN,), tl.float32)
        correction = tl.zeros((OWN,), tl.float32)
        weighted = tl.zeros((OWN, HEAD_DIM), tl.float32)
        mean_key = tl.zeros((OWN, HEAD_DIM), tl.float32)
        for tile in tl.static_range(WHOLE // BLOCK + (REST > 0)):
            k, v, logits = _keys(
                tile * BLOCK, q, window, head, number, row, window < n_windows, k_ptr, v_ptr, mask_ptr, pad_k_ptr,
                pad_v_ptr, strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST, HAS_PAD,
                N_ROWS, WHOLE + REST, STAGED, OWN, BLOCK if tile * BLOCK < WHOLE else REST, HEAD_DIM,
            )  # fmt: skip
            maximum, total, base, correction, weighted, mean_key = _dq_step(
                grad, k, v, logits, maximum, total, base, correction, weighted, mean_key, tile == 0
            )
        total = tl.where(total == 0.0, 1.0, total)
        correction = correction / total
        d_q = (weighted - correction[:, None] * mean_key) * (scale / (total * _UNIT))[:, None]
        at = offsets(batch, y, x, head, d_q_strides, HEAD_DIM)
        tl.store(d_q_ptr + at, d_q.to(q.dtype), mask=real[:, None])
        shift, factor = softmax_statistics(finite(maximum), total, q.dtype)
        stats = statistics_of(stats_ptr, window * n_heads + head, N_STATS, q.dtype) + q_tokens
        store_statistics(stats, N_STATS, shift, factor, (base + correction) / _UNIT, q_tokens < N_STATS, q.dtype)


@triton.jit
def _dkdv_step(
    START: tl.constexpr, k, v, d_k, d_v, window, head, number, row, always, grad_ptr, q_ptr, mask_ptr, stats,
    grad_strides, strides, height, width, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, N_ROWS: tl.constexpr, N_STATS: tl.constexpr, STAGED: tl.constexpr,
    OWN: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One more tile of queries in the gradients of keys and values; and that of the logits, whose rows are keys."""
    tokens = START + tl.arange(0, BLOCK)
    batch, y, x, real, _region = locate(tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST)
    q = tl.load(q_ptr + offsets(batch, y, x, head, strides, HEAD_DIM), mask=real[:, None], other=0.0)
    grad = tl.load(grad_ptr + offsets(batch, y, x, head, grad_strides, HEAD_DIM), mask=real[:, None], other=0.0)
    shift, factor, correction = load_statistics(stats + tokens, N_STATS, None, q.dtype)
    logits = tl.dot(k, tl.trans(q)) * scale
    logits += _mask_tile(mask_ptr, number, row, START, always, N_ROWS, N_STATS, STAGED, OWN, BLOCK)
    weights = tl.exp2(logits * _LOG2E - shift[None, :]) * factor[None, :]
    d_v = tl.dot(weights.to(v.dtype), grad, acc=d_v)
    d_weights = tl.dot(v, tl.trans(grad))
    d_logits = weights * (d_weights - correction[None, :])
    d_k = tl.dot(d_logits.to(q.dtype), q, acc=d_k)
    return d_k, d_v, d_logits


@triton.jit
def _bias_sums(OWN: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros for all tiles of some rows."""
    tiles = ()
    for tile in tl.static_range(WHOLE // BLOCK + (REST > 0)):
        zeros = tl.zeros((OWN, BLOCK if tile * BLOCK < WHOLE else REST), tl.float32)
        tiles = tiles + (zeros,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _store_bias_tile(
    ptr, keys, START: tl.constexpr, tile, N_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes a tile, whose rows are keys, to a slot (N_TOKENS, N_TOKENS), whose columns are keys."""
    queries = START + tl.arange(0, BLOCK)
    inside = (keys < N_TOKENS)[:, None] & (queries < N_TOKENS)[None, :]
    tl.store(ptr + queries[None, :] * N_TOKENS + keys[:, None], tile, mask=inside)


@triton.jit(do_not_specialize=["height", "width", "n_windows"])
def _window_bwd_dkdv_walking_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, pad_k_ptr, pad_v_ptr, d_k_ptr, d_v_ptr, d_bias_ptr, d_pad_ptr, stats_ptr,
    grad_strides, strides, d_strides, height, width, n_windows, n_heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_Y: tl.constexpr, SHIFT_X: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, N_CLASSES: tl.constexpr,
    HEAD_DIM: tl.constexpr, OWN: tl.constexpr, N_OWN: tl.constexpr, N_ROWS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, STAGED: tl.constexpr, N_STATS: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: one block of keys of one head, in every `step`-th window; and of the bias there."""
    N_TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    N_TILES: tl.constexpr = WHOLE // BLOCK + (REST > 0)
    tokens, head, first, step = _own(n_heads, strides, OWN, N_OWN)
    row = (tl.program_id(0) % N_OWN) * OWN
    d_biases = ()
    if HAS_BIAS:
        d_biases = _bias_sums(OWN, WHOLE, REST, BLOCK)
    if HAS_PAD:
        d_pad_k = tl.zeros((HEAD_DIM,), tl.float32)
        d_pad_v = tl.zeros((HEAD_DIM,), tl.float32)
    for window in range(first, n_windows, step):
        batch, y, x, real, _region = locate(
            tokens, window, height, width, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST
        )
        number = mask_class(window, height, width, WINDOW_H, WINDOW_W, N_CLASSES) * n_heads + head
        at = offsets(batch, y, x, head, strides, HEAD_DIM)
        k = load_kv(k_ptr, pad_k_ptr, at, real, head, HAS_PAD, HEAD_DIM)
        v = load_kv(v_ptr, pad_v_ptr, at, real, head, HAS_PAD, HEAD_DIM)
        stats = statistics_of(stats_ptr, window * n_heads + head, N_STATS, q_ptr.dtype.element_ty)
        d_k = tl.zeros((OWN, HEAD_DIM), tl.float32)
        d_v = tl.zeros((OWN, HEAD_DIM), tl.float32)
        new_d_biases = ()
        for tile in tl.static_range(N_TILES):
            d_k, d_v, d_logits = _dkdv_step(
                tile * BLOCK, k, v, d_k, d_v, window, head, number, row, window < n_windows, grad_ptr, q_ptr, mask_ptr,
                stats, grad_strides, strides, height, width, scale, WINDOW_H, WINDOW_W, SHIFT_Y, SHIFT_X, ROLL_FIRST,
                N_ROWS, N_STATS, STAGED, OWN, BLOCK if tile * BLOCK < WHOLE else REST, HEAD_DIM,
            )  # fmt: skip
            if HAS_BIAS:
                d_bias = d_biases[tile] + d_logits
                new_d_biases = new_d_biases + (d_bias,)  # type: ignore[assignment]  # noqa: RUF005
        d_biases = new_d_biases
        d_k = d_k * scale
        at = offsets(batch, y, x, head, d_strides, HEAD_DIM)
        tl.store(d_k_ptr + at, d_k.to(k.dtype), mask=real[:, None])
        tl.store(d_v_ptr + at, d_v.to(v.dtype), mask=real[:, None])
        if HAS_PAD:
            is_pad = ((tokens < N_TOKENS) & (real == 0))[:, None]
            d_pad_k += tl.sum(tl.where(is_pad, d_k, 0.0), 0)
            d_pad_v += tl.sum(tl.where(is_pad, d_v, 0.0), 0)
    if HAS_BIAS:
        slot = d_bias_ptr + (first * n_heads + head).to(tl.int64) * (N_TOKENS * N_TOKENS)
        for tile in tl.static_range(N_TILES):
            _store_bias_tile(
                slot, tokens, tile * BLOCK, d_biases[tile], N_TOKENS, BLOCK if tile * BLOCK < WHOLE else REST
            )  # fmt: skip
    if HAS_PAD:
        pad_slot = ((first * N_OWN + tl.program_id(0) % N_OWN) * n_heads + head).to(tl.int64)
        store_pad_gradients(d_pad_ptr, pad_slot, d_pad_k, d_pad_v, HEAD_DIM)
