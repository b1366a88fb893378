"""Triton kernels of linear attention: index map, tiling and numerics.

Index map. Token n of an image stands at row n // W and column n % W; tensors are read and written where they lie, with
any strides over (B, H, W, heads): the parts of a packed projection need no copy.

Tiling. `kernels/_common/triton.py`: a program has one chunk of one image's tokens in one head. Forward, two passes: the
sums of every chunk's keys and of its keys times values, then every query against their total. Backward, three: the same
sums, then the queries' gradients along with the sums for the keys' and values' gradients, which are the third pass.
Where the map is one chunk and heads are small, one kernel makes all passes, and the sums stay in registers. Every order
of addition is fixed; there are no atomics.

Numerics. Everything but the inputs and results is float32: the sums grow with the map and a gradient divided by them is
far below float16's least number. Products of two inputs are exact; where a float32 operand meets half inputs the
product is TF32, which holds an input exactly and has float32's range. float32 inputs use full float32 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch, map_strides, unit_stride
from vitrail.kernels._common.triton import Chunks, place, relu, square_offsets, token_offsets

_BLOCK_BYTES = 4096  # of one tile of tokens: at twice this the backward spills registers in float32
_LEAST_CHUNK = 512  # tokens
_MOST_CHUNKS = 64
_MOST_WHOLE = 64  # channels of a head where one kernel makes all passes: with more it spills registers in float32


@triton.jit
def _store_sums(sums_ptr, row, chunk, n_chunks, products, vector, HEAD_DIM: tl.constexpr):
    """Writes a chunk's (D, D) and (D,) sums to its slot of the workspace."""
    slot = sums_ptr + (row.to(tl.int64) * n_chunks + chunk) * (HEAD_DIM * HEAD_DIM + HEAD_DIM)
    tl.store(slot + square_offsets(HEAD_DIM), products)
    tl.store(slot + HEAD_DIM * HEAD_DIM + tl.arange(0, HEAD_DIM), vector)


@triton.jit
def _add_chunks(sums_ptr, row, n_chunks, HEAD_DIM: tl.constexpr):
    """Totals over an image's chunks, in their order."""
    SIZE: tl.constexpr = HEAD_DIM * HEAD_DIM + HEAD_DIM
    products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    vector = tl.zeros((HEAD_DIM,), tl.float32)
    slot = sums_ptr + row.to(tl.int64) * n_chunks * SIZE
    for chunk in range(n_chunks):
        products += tl.load(slot + chunk * SIZE + square_offsets(HEAD_DIM))
        vector += tl.load(slot + chunk * SIZE + HEAD_DIM * HEAD_DIM + tl.arange(0, HEAD_DIM))
    return products, vector


@triton.jit
def _weights_sum(queries, keys_sum, floor):
    """The sum of each query's weights, and the denominator that it gives."""
    total = tl.sum(queries * keys_sum[None, :], 1)
    return total, tl.maximum(total, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _chunk_sums(
    k_ptr, v_ptr, k_strides, v_strides, image, head, first, end, width, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The sums of keys times values and of keys over the tokens from `first` to below `end`."""
    products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    keys_sum = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        exists = (tokens < end)[:, None]
        k = tl.load(k_ptr + token_offsets(image, head, tokens, width, k_strides, HEAD_DIM), mask=exists, other=0.0)
        v = tl.load(v_ptr + token_offsets(image, head, tokens, width, v_strides, HEAD_DIM), mask=exists, other=0.0)
        keys = relu(k)
        products = tl.dot(tl.trans(keys), v, acc=products, input_precision="ieee")
        keys_sum += tl.sum(keys.to(tl.float32), 0)
    return products, keys_sum


@triton.jit
def _map_sums(
    k_ptr, v_ptr, sums_ptr, k_strides, v_strides, image, head, row, n_chunks, first, end, width,
    IS_WHOLE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The sums over the whole map: made here where the chunk is all of it, else of what the chunks have left."""
    if IS_WHOLE:
        return _chunk_sums(k_ptr, v_ptr, k_strides, v_strides, image, head, first, end, width, BLOCK, HEAD_DIM)
    else:
        return _add_chunks(sums_ptr, row, n_chunks, HEAD_DIM)


@triton.jit
def _store_key_gradients(
    k_ptr, v_ptr, d_k_ptr, d_v_ptr, k_strides, v_strides, d_k_strides, d_v_strides, d_products, d_keys_sum,
    image, head, first, end, width, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values from `first` to below `end` from those of the sums."""
    PRECISION: tl.constexpr = "ieee" if k_ptr.dtype.element_ty == tl.float32 else "tf32"
    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        exists = (tokens < end)[:, None]
        k = tl.load(k_ptr + token_offsets(image, head, tokens, width, k_strides, HEAD_DIM), mask=exists, other=0.0)
        v = tl.load(v_ptr + token_offsets(image, head, tokens, width, v_strides, HEAD_DIM), mask=exists, other=0.0)
        d_k = tl.dot(v.to(tl.float32), tl.trans(d_products), input_precision=PRECISION) + d_keys_sum[None, :]
        d_v = tl.dot(relu(k.to(tl.float32)), d_products, input_precision=PRECISION)
        d_k_offsets = token_offsets(image, head, tokens, width, d_k_strides, HEAD_DIM)
        d_v_offsets = token_offsets(image, head, tokens, width, d_v_strides, HEAD_DIM)
        tl.store(d_k_ptr + d_k_offsets, tl.where(k > 0, d_k, 0.0).to(k.dtype), mask=exists)
        tl.store(d_v_ptr + d_v_offsets, d_v.to(k.dtype), mask=exists)


@triton.jit(do_not_specialize=["n_tokens", "width", "heads", "n_chunks", "chunk_size"])
def _linear_attention_sums_kernel(
    k_ptr, v_ptr, sums_ptr, k_strides, v_strides, n_tokens, width, heads, n_chunks, chunk_size,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One chunk's sums of keys times values and of keys."""
    image, head, chunk, row = place(n_chunks, heads)
    first = chunk * chunk_size
    end = tl.minimum(first + chunk_size, n_tokens)
    products, keys_sum = _chunk_sums(
        k_ptr, v_ptr, k_strides, v_strides, image, head, first, end, width, BLOCK, HEAD_DIM
    )
    _store_sums(sums_ptr, row, chunk, n_chunks, products, keys_sum, HEAD_DIM)


@triton.jit(do_not_specialize=["n_tokens", "width", "heads", "n_chunks", "chunk_size"])
def _linear_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, temperature_ptr, out_ptr, sums_ptr, q_strides, k_strides, v_strides, out_strides,
    n_tokens, width, heads, n_chunks, chunk_size, floor,
    IS_WHOLE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The result at one chunk's queries; where it is the whole map the sums are made here."""
    image, head, chunk, row = place(n_chunks, heads)
    first = chunk * chunk_size
    end = tl.minimum(first + chunk_size, n_tokens)
    products, keys_sum = _map_sums(
        k_ptr, v_ptr, sums_ptr, k_strides, v_strides, image, head, row, n_chunks, first, end, width,
        IS_WHOLE, BLOCK, HEAD_DIM,
    )  # fmt: skip
    products *= tl.load(temperature_ptr + head).to(tl.float32)
    PRECISION: tl.constexpr = "ieee" if q_ptr.dtype.element_ty == tl.float32 else "tf32"
    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        exists = (tokens < end)[:, None]
        q = tl.load(q_ptr + token_offsets(image, head, tokens, width, q_strides, HEAD_DIM), mask=exists, other=0.0)
        queries = relu(q.to(tl.float32))
        _, denominator = _weights_sum(queries, keys_sum, floor)
        out = tl.dot(queries, products, input_precision=PRECISION) / denominator[:, None]
        out_offsets = token_offsets(image, head, tokens, width, out_strides, HEAD_DIM)
        tl.store(out_ptr + out_offsets, out.to(q.dtype), mask=exists)


@triton.jit(do_not_specialize=["n_tokens", "width", "heads", "n_chunks", "chunk_size"])
def _linear_attention_bwd_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, temperature_ptr, d_q_ptr, d_k_ptr, d_v_ptr, sums_ptr, d_sums_ptr, d_temperature_ptr,
    grad_strides, q_strides, k_strides, v_strides, d_q_strides, d_k_strides, d_v_strides,
    n_tokens, width, heads, n_chunks, chunk_size, floor,
    IS_WHOLE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's queries, and the chunk's share in those of the sums and of the temperature.

    Where it is the whole map, the gradients of keys and values, too.
    """
    image, head, chunk, row = place(n_chunks, heads)
    first = chunk * chunk_size
    end = tl.minimum(first + chunk_size, n_tokens)
    products, keys_sum = _map_sums(
        k_ptr, v_ptr, sums_ptr, k_strides, v_strides, image, head, row, n_chunks, first, end, width,
        IS_WHOLE, BLOCK, HEAD_DIM,
    )  # fmt: skip
    temperature = tl.load(temperature_ptr + head).to(tl.float32)
    d_products = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    d_keys_sum = tl.zeros((HEAD_DIM,), tl.float32)
    d_temperature = tl.zeros((BLOCK,), tl.float32)
    PRECISION: tl.constexpr = "ieee" if q_ptr.dtype.element_ty == tl.float32 else "tf32"
    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        exists = (tokens < end)[:, None]
        grad_offsets = token_offsets(image, head, tokens, width, grad_strides, HEAD_DIM)
        grad = tl.load(grad_ptr + grad_offsets, mask=exists, other=0.0).to(tl.float32)
        q = tl.load(q_ptr + token_offsets(image, head, tokens, width, q_strides, HEAD_DIM), mask=exists, other=0.0)
        queries = relu(q.to(tl.float32))
        total, denominator = _weights_sum(queries, keys_sum, floor)
        d_numerator = grad / denominator[:, None]
        d_queries = tl.dot(d_numerator, tl.trans(products), input_precision=PRECISION)
        # The gradient against the result, without the temperature; the result itself is not needed.
        share = tl.sum(d_queries * queries, 1)
        d_total = tl.where(total >= floor, -temperature * share / denominator, 0.0)
        d_queries = temperature * d_queries + d_total[:, None] * keys_sum[None, :]
        d_q_offsets = token_offsets(image, head, tokens, width, d_q_strides, HEAD_DIM)
        tl.store(d_q_ptr + d_q_offsets, tl.where(q > 0, d_queries, 0.0).to(q.dtype), mask=exists)
        d_products = tl.dot(tl.trans(queries), d_numerator, acc=d_products, input_precision=PRECISION)
        d_keys_sum += tl.sum(d_total[:, None] * queries, 0)
        d_temperature += share
    tl.store(d_temperature_ptr + row * n_chunks + chunk, tl.sum(d_temperature, 0))
    d_products *= temperature
    if IS_WHOLE:
        _store_key_gradients(
            k_ptr, v_ptr, d_k_ptr, d_v_ptr, k_strides, v_strides, d_k_strides, d_v_strides, d_products, d_keys_sum,
            image, head, first, end, width, BLOCK, HEAD_DIM,
        )  # fmt: skip
    else:
        _store_sums(d_sums_ptr, row, chunk, n_chunks, d_products, d_keys_sum, HEAD_DIM)


@triton.jit(do_not_specialize=["n_tokens", "width", "heads", "n_chunks", "chunk_size"])
def _linear_attention_bwd_dkdv_kernel(
    k_ptr, v_ptr, d_k_ptr, d_v_ptr, d_sums_ptr, k_strides, v_strides, d_k_strides, d_v_strides,
    n_tokens, width, heads, n_chunks, chunk_size,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's keys and values."""
    image, head, chunk, row = place(n_chunks, heads)
    d_products, d_keys_sum = _add_chunks(d_sums_ptr, row, n_chunks, HEAD_DIM)
    first = chunk * chunk_size
    _store_key_gradients(
        k_ptr, v_ptr, d_k_ptr, d_v_ptr, k_strides, v_strides, d_k_strides, d_v_strides, d_products, d_keys_sum,
        image, head, first, tl.minimum(first + chunk_size, n_tokens), width, BLOCK, HEAD_DIM,
    )  # fmt: skip


def linear_attention_forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, floor: float) -> Tensor:
    """Fused forward; arguments as in `linear_attention_reference`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = unit_stride(q, k, v)
    chunks = _chunks(q)
    launch(
        _linear_attention_fwd_kernel, chunks.grid, q, k, v, temperature.contiguous(), out, _sums(k, v, chunks),
        *map_strides(q, k, v, out), *chunks.scalars, floor, IS_WHOLE=_is_whole(chunks), **chunks.options,
    )  # fmt: skip
    return out


def linear_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor,
    d_q: Tensor, d_k: Tensor, d_v: Tensor, floor: float,
) -> Tensor:  # fmt: skip
    """Fused backward: fills `d_q`, `d_k` and `d_v`, which may have any strides over (B, H, W, heads).

    Returns:
        Gradient of the temperature.
    """
    if q.numel() == 0:
        return torch.zeros_like(temperature)
    grad, q, k, v = unit_stride(grad, q, k, v)
    chunks = _chunks(q)
    sums, d_sums, d_temperature = _sums(k, v, chunks), _workspace(chunks), chunks.workspace(1)
    launch(
        _linear_attention_bwd_dq_kernel, chunks.grid, grad, q, k, v, temperature.contiguous(), d_q, d_k, d_v,
        sums, d_sums, d_temperature, *map_strides(grad, q, k, v, d_q, d_k, d_v), *chunks.scalars, floor,
        IS_WHOLE=_is_whole(chunks), **chunks.options,
    )  # fmt: skip
    if d_sums is not None:
        launch(
            _linear_attention_bwd_dkdv_kernel, chunks.grid, k, v, d_k, d_v, d_sums, *map_strides(k, v, d_k, d_v),
            *chunks.scalars, **chunks.options,
        )  # fmt: skip
    return d_temperature.sum((0, 2, 3)).to(temperature.dtype)


def _sums(k: Tensor, v: Tensor, chunks: Chunks) -> Tensor | None:
    """Every chunk's sums of keys times values and of keys, where they do not stay in registers."""
    sums = _workspace(chunks)
    if sums is not None:
        launch(
            _linear_attention_sums_kernel, chunks.grid, k, v, sums, *map_strides(k, v), *chunks.scalars,
            **chunks.options,
        )  # fmt: skip
    return sums


def _workspace(chunks: Chunks) -> Tensor | None:
    """Uninitialised sums, where they do not stay in registers."""
    return None if _is_whole(chunks) else chunks.workspace(chunks.head_dim * (chunks.head_dim + 1))


def _is_whole(chunks: Chunks) -> bool:
    """Whether one kernel makes all passes."""
    return chunks.n_chunks == 1 and chunks.head_dim <= _MOST_WHOLE


def _chunks(q: Tensor) -> Chunks:
    return Chunks(q, _BLOCK_BYTES, _LEAST_CHUNK, _MOST_CHUNKS)
