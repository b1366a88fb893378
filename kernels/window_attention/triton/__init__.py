"""Triton kernels of window attention: index map, tiling and numerics.

Index map. A window's token t stands at row t // ww and column t % ww of its window; the window's origin plus the
shift, modulo the padded size (the map's own size where the roll comes first), is a pixel. Tokens whose pixel lies
outside the image are padding: they are never read or written, their key and value are `pad_k` and `pad_v` or hidden.
Tokens that wrapped around a border form regions of their own and see only their like.

Tiling. Windows of up to `_SINGLE_TILE` tokens fit into one tile: a program keeps one head's bias in registers and
walks over windows, so that bias is read, and its gradient written, once a program and not once a window. Neighbouring
programs work on the heads of the same windows, which share memory lines. Larger windows are cut into blocks of
queries and keys with an online softmax. What is left of a window beyond its whole blocks has a tile of its own size,
and as queries a launch of its own: 12 x 12 tokens are 64 + 64 + 16, not three blocks.

Numerics. Logits, softmax and all sums are float32; the weights are rounded to the input's dtype before they meet
values or gradients, as in every fused attention. float32 inputs use full float32 products. The backward recomputes
the weights; the softmax correction is sum_j P_ij dP_ij, so that the forward's output is not needed. No atomics: sums
over windows (bias, padding) go to one slot a program and are added in a fixed order, so gradients are deterministic.
"""

from __future__ import annotations

from vitrail.kernels.window_attention.triton.launch import window_attention_backward, window_attention_forward

__all__ = ["window_attention_backward", "window_attention_forward"]
