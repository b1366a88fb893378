"""Triton kernels of window attention: index map, tiling, numerics, roofline and what was tried.

Index map (`index.py`). A window's token t stands at row t // ww and column t % ww of its window; the window's origin
plus the shift, modulo the padded size (the map's own size where the roll comes first), is a pixel. Tokens whose pixel
lies outside the image are padding: they are never read or written, their key and value are `pad_k` and `pad_v` or
hidden. Tokens that wrapped around a border form regions of their own and see only their like.

Tiling (`launch.py` chooses). Windows of up to 64 tokens fit into one tile (`one_tile.py`): a program keeps one head's
bias in registers and walks over windows, so that bias is read, and its gradient written, once a program and not once a
window. Neighbouring programs work on the heads of the same windows, which share memory lines.

Windows of up to 256 tokens in half precision, heads up to 64 channels (`walking.py`): a program keeps a block of
queries, or of keys, of one head and walks over windows as well; in each it meets all keys, or queries, tile by tile,
which is unrolled. The rows of the bias that it needs stay in the multiprocessor's cache. What a query sees depends on
the window only by its class: whether it is the last along an axis (or the last but one). So bias and visibility are
one array of numbers to add, laid out once a call for each class, in the order in which the threads of a tensor core
hold them: it is read in full lines, straight into the registers where it is added, and nothing is compared or
exchanged in the loop. The backward has two kernels. That of the queries makes one pass over the keys and leaves each
row's log-sum-exp and softmax correction; that of the keys has them as rows of its tiles, so that neither product needs
a transposition, and sums the bias gradient of its block up in registers from window to window. Together they take
eight products of tiles where kernels for queries, keys and bias took eleven, and two exponentials a pair, not four.

Larger windows, those of several tiles in float32 or of wider heads, and all of float32 heads of 128 channels
(`tiled.py`), are cut into blocks of queries and keys with an online softmax, a program a block and window; the bias
gradient has a kernel of its own. Blocks are 64 tokens, in float32 32: products outside tensor cores hold whole rows of
both factors in registers, and larger blocks spill thousands of bytes a thread. What is left of a window beyond its
whole blocks has a tile of its own size: 12 x 12 tokens are 64 + 64 + 16, not three blocks.

Numerics. Logits, softmax and all sums are float32; the weights are rounded to the input's dtype before they meet
values or gradients, as in every fused attention. float32 inputs use full float32 products. The backward recomputes
the weights; the softmax correction c_i is sum_j P_ij dP_ij, so that the forward's output is not needed. The one pass
that walks finds dQ_i = sum_j P_ij (dP_ij - c_i) k_j as sum_j P_ij dP_ij k_j - c_i sum_j P_ij k_j, with dP_ij and c_i
less the c_i of the first tile of keys alone, so that rounded sums need not cancel. No atomics: sums
over windows (bias, padding) go to one slot a program and are added in a fixed order, so gradients are deterministic.

Roofline. The forward must move four maps (q, k, v, out), 154 MB at batch 64, 56 x 56 x 96 and bfloat16: 0.05 ms at
3 TB/s; the backward seven. For 14 x 14 tokens in blocks of 64 queries, tiles hold 163 million pairs. A thread of the
forward has 104 pairs a window and issues about 1,600 instructions, 9 of them for each pair, which at one a clock and
scheduler are 0.09 ms; 2,200 and 1,900 in the two backward kernels, 0.12 and 0.11 ms. Exponentials, 16 a clock, take
0.05 ms a pass, products less. So all three are bound by instructions issued.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, batch 64, 56 x 56 x 96, 14 x 14, shifted, bias, CUDA-graph
replay): 0.160 ms forward, 0.651 with the backward, whose kernels of queries and keys take 0.23 and 0.26. The tiled
kernels took 0.246 and 1.298. Other widths, pipelines and programs a multiprocessor: 0.159 to 0.31 forward, 0.67 to
0.91 with the backward.

What was tried for windows of several tiles, judged by code compiled for sm_90 (bfloat16, D = 32, 14 x 14):

=================================================  =====================================================================
idea                                               what came of it
=================================================  =====================================================================
bias in registers from window to window            104 registers a thread in float32, which is what the compiler makes
                                                   of it: two programs a multiprocessor where there can be three; and
                                                   visibility must be compared in the loop
comparing regions in the loop                      places of keys are computed again in the layout of the logits, and a
                                                   branch around it becomes selections: 2,000 instructions, not 1,600
bias read as rows                                  each tile is exchanged through shared memory, 32 KB a tile and window
masks staged in shared memory (`Walk.staged`)      26 KB a stage, fewer programs; kept where registers are short
strides of q, k and v apart                        addresses three times: 100 instructions. Maps of unequal strides,
                                                   which are rare, are copied instead
strides of any sign                                the compiler widens places without sign, strides with: 64-bit
                                                   products of three instructions each; told that strides are positive
tiles of 64 queries in the kernel of the keys      spill, as 104 registers hold the bias gradient: 32 at a time
eight warps for blocks of 128 (`Walk.own`)         10 % fewer instructions, as two blocks share addresses, but twice the
                                                   shared memory, and twice the threads at a barrier
one backward kernel, a window and head a program   not built: five products where two kernels have eight, but a bias
                                                   gradient of 208 x 208 fits into no program's registers, and a kernel
                                                   of its own for that needs two more
saving the log-sum-exp in the forward              not built: saves one product of eight, at the price of an operator
                                                   with two results
=================================================  =====================================================================
"""

from __future__ import annotations

from vitrail.kernels.window_attention.triton.launch import window_attention_backward, window_attention_forward

__all__ = ["window_attention_backward", "window_attention_forward"]
