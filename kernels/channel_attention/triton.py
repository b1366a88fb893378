"""Triton kernels of channel attention: index map, tiling and numerics.

Index map. Token n of an image stands at row n // W and column n % W; tensors are read and written where they lie, with
any strides over (B, H, W, groups).

Tiling. The map of a group is a sum over all tokens, and every token needs the whole map: two passes. In both, a program
has one chunk of one image's tokens in one group; the groups of a chunk, whose channels share memory lines, are
neighbours. The first pass leaves each chunk's sums in a workspace, the second adds them up in the order of the chunks
(so that results do not depend on the schedule), takes the softmax and applies it to its chunk. Each tensor is thus read
once forward; the backward reads k and v twice rather than keep the map, whose float32 sums would outlive the forward.

Numerics. Sums, softmax and its derivative are float32. The weights are rounded to the inputs' dtype before they meet
q or the gradient, as in the reference. The logits' gradient meets k and v as TF32, because it has the range of a sum
over the image, which float16 has not. float32 inputs use full float32 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.launch import launch, map_strides, unit_stride
from vitrail.kernels._common.triton import Chunks, place, square_offsets, token_offsets

_BLOCK_BYTES = 8192  # of one tile of tokens
_LEAST_CHUNK = 512  # tokens: smaller chunks would move more sums than tokens
_MOST_CHUNKS = 64


@triton.jit(do_not_specialize=["n_tokens", "width", "groups", "n_chunks", "chunk_size"])
def _sums_kernel(
    k_ptr, v_ptr, grad_ptr, q_ptr, sums_ptr, k_strides, v_strides, grad_strides, q_strides,
    n_tokens, width, groups, n_chunks, chunk_size,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One chunk's `k^T v` and, in the backward, `grad^T q`: (rows, chunks, 1 or 2, D, D)."""
    image, group, chunk, row = place(n_chunks, groups)
    N_SUMS: tl.constexpr = 2 if BACKWARD else 1
    logits = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    d_weights = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    first = chunk * chunk_size
    for start in range(first, tl.minimum(first + chunk_size, n_tokens), BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        exists = (tokens < n_tokens)[:, None]
        k = tl.load(k_ptr + token_offsets(image, group, tokens, width, k_strides, HEAD_DIM), mask=exists, other=0.0)
        v = tl.load(v_ptr + token_offsets(image, group, tokens, width, v_strides, HEAD_DIM), mask=exists, other=0.0)
        logits = tl.dot(tl.trans(k), v, acc=logits, input_precision="ieee")
        if BACKWARD:
            grad_offsets = token_offsets(image, group, tokens, width, grad_strides, HEAD_DIM)
            grad = tl.load(grad_ptr + grad_offsets, mask=exists, other=0.0)
            q = tl.load(q_ptr + token_offsets(image, group, tokens, width, q_strides, HEAD_DIM), mask=exists, other=0.0)
            d_weights = tl.dot(tl.trans(grad), q, acc=d_weights, input_precision="ieee")
    slot = sums_ptr + (row * n_chunks + chunk).to(tl.int64) * (N_SUMS * HEAD_DIM * HEAD_DIM) + square_offsets(HEAD_DIM)
    tl.store(slot, logits)
    if BACKWARD:
        tl.store(slot + HEAD_DIM * HEAD_DIM, d_weights)


@triton.jit
def _add_chunks(sums_ptr, row, n_chunks, which, N_SUMS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Sum over an image's chunks, in their order."""
    SIZE: tl.constexpr = HEAD_DIM * HEAD_DIM
    total = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    slot = sums_ptr + row.to(tl.int64) * n_chunks * (N_SUMS * SIZE) + which * SIZE + square_offsets(HEAD_DIM)
    for chunk in range(n_chunks):
        total += tl.load(slot + chunk * (N_SUMS * SIZE))
    return total


@triton.jit
def _softmax(logits):
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["n_tokens", "width", "groups", "n_chunks", "chunk_size"])
def _apply_kernel(
    q_ptr, out_ptr, sums_ptr, q_strides, out_strides, n_tokens, width, groups, n_chunks, chunk_size, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Mixes the channels of one chunk's queries by the group's map."""
    image, group, chunk, row = place(n_chunks, groups)
    weights = _softmax(_add_chunks(sums_ptr, row, n_chunks, 0, 1, HEAD_DIM) * scale)
    first = chunk * chunk_size
    for start in range(first, tl.minimum(first + chunk_size, n_tokens), BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        exists = (tokens < n_tokens)[:, None]
        q = tl.load(q_ptr + token_offsets(image, group, tokens, width, q_strides, HEAD_DIM), mask=exists, other=0.0)
        out = tl.dot(q, tl.trans(weights.to(q.dtype)), input_precision="ieee")
        out_offsets = token_offsets(image, group, tokens, width, out_strides, HEAD_DIM)
        tl.store(out_ptr + out_offsets, out.to(q.dtype), mask=exists)


@triton.jit(do_not_specialize=["n_tokens", "width", "groups", "n_chunks", "chunk_size"])
def _gradients_kernel(
    grad_ptr, k_ptr, v_ptr, d_q_ptr, d_k_ptr, d_v_ptr, sums_ptr,
    grad_strides, k_strides, v_strides, d_q_strides, d_k_strides, d_v_strides,
    n_tokens, width, groups, n_chunks, chunk_size, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's q, k and v, from the sums of `k^T v` and `grad^T q`."""
    image, group, chunk, row = place(n_chunks, groups)
    weights = _softmax(_add_chunks(sums_ptr, row, n_chunks, 0, 2, HEAD_DIM) * scale)
    d_weights = _add_chunks(sums_ptr, row, n_chunks, 1, 2, HEAD_DIM)
    d_logits = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None]) * scale
    PRECISION: tl.constexpr = "ieee" if k_ptr.dtype.element_ty == tl.float32 else "tf32"
    first = chunk * chunk_size
    for start in range(first, tl.minimum(first + chunk_size, n_tokens), BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        exists = (tokens < n_tokens)[:, None]
        grad_offsets = token_offsets(image, group, tokens, width, grad_strides, HEAD_DIM)
        grad = tl.load(grad_ptr + grad_offsets, mask=exists, other=0.0)
        k = tl.load(k_ptr + token_offsets(image, group, tokens, width, k_strides, HEAD_DIM), mask=exists, other=0.0)
        v = tl.load(v_ptr + token_offsets(image, group, tokens, width, v_strides, HEAD_DIM), mask=exists, other=0.0)
        d_q = tl.dot(grad, weights.to(grad.dtype), input_precision="ieee")
        d_k = tl.dot(v.to(tl.float32), tl.trans(d_logits), input_precision=PRECISION)
        d_v = tl.dot(k.to(tl.float32), d_logits, input_precision=PRECISION)
        d_q_offsets = token_offsets(image, group, tokens, width, d_q_strides, HEAD_DIM)
        d_k_offsets = token_offsets(image, group, tokens, width, d_k_strides, HEAD_DIM)
        d_v_offsets = token_offsets(image, group, tokens, width, d_v_strides, HEAD_DIM)
        tl.store(d_q_ptr + d_q_offsets, d_q.to(k.dtype), mask=exists)
        tl.store(d_k_ptr + d_k_offsets, d_k.to(k.dtype), mask=exists)
        tl.store(d_v_ptr + d_v_offsets, d_v.to(k.dtype), mask=exists)


def channel_attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Fused forward; arguments as in `channel_attention_reference`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = unit_stride(q, k, v)
    chunks = _chunks(q)
    sums = chunks.workspace(chunks.head_dim**2)
    k_strides, v_strides, q_strides, out_strides = map_strides(k, v, q, out)
    launch(
        _sums_kernel, chunks.grid, k, v, None, None, sums, k_strides, v_strides, q_strides, q_strides, *chunks.scalars,
        BACKWARD=False, **chunks.options,
    )  # fmt: skip
    launch(_apply_kernel, chunks.grid, q, out, sums, q_strides, out_strides, *chunks.scalars, scale, **chunks.options)
    return out


def channel_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor, scale: float
) -> None:
    """Fused backward: fills `d_q`, `d_k` and `d_v`, which may have any strides over (B, H, W, groups)."""
    if q.numel() == 0:
        return
    grad, q, k, v = unit_stride(grad, q, k, v)
    chunks = _chunks(q)
    sums = chunks.workspace(2 * chunks.head_dim**2)
    launch(
        _sums_kernel, chunks.grid, k, v, grad, q, sums, *map_strides(k, v, grad, q), *chunks.scalars, BACKWARD=True,
        **chunks.options,
    )  # fmt: skip
    launch(
        _gradients_kernel, chunks.grid, grad, k, v, d_q, d_k, d_v, sums, *map_strides(grad, k, v, d_q, d_k, d_v),
        *chunks.scalars, scale, **chunks.options,
    )  # fmt: skip


def _chunks(q: Tensor) -> Chunks:
    return Chunks(q, _BLOCK_BYTES, _LEAST_CHUNK, _MOST_CHUNKS)
