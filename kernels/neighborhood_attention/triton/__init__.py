"""Triton kernels of neighborhood attention: index map, tiling and numerics.

Index map (`index.py`). On each axis, tokens whose positions leave the same rest modulo the dilation form a group, and a
token has a place in its group. All windows and tiles are boxes of places of one group; only addresses know of pixels,
so that no dilation is copied or permuted. A map has three axes here, of which a call's missing ones have length 1.
Starts and ends of windows never decrease from one query to the next. So the keys that a tile of queries sees are one
interval an axis, and the queries that see a tile of keys as well, whatever stride, causal axes and borders.

Tiling (`launch.py` chooses, `tiles.py` computes). A program has one head and a tile of 16 queries, such as 2x8, which
is what one warp multiplies: larger tiles see more keys of which each query needs fewer. Its keys are a box, for 7x7
neighborhoods 8x14, which fits into one tile of 8x16 keys: no online softmax, one pass. Larger kernels walk over several
tiles. Where the keys are few for their queries (groups of 7x7 places, as DiNAT's), four warps share a tile of 8x8
queries. What a query does not see is hidden afterwards: rows and columns of tiles are powers of two, so the compiler
finds that a thread has few distinct rows and columns, and a mask costs two selections a logit. The third axis has tiles
of one plane, over which the walk goes last.

Backward. One kernel finds the gradient of the queries and leaves the softmax statistics of each row; one
has a tile of keys and walks over the queries that see them; additional keys are summed over shares of all queries. The
bias' gradient: tiles of keys at a fixed place from the tile of queries hold pairs of fixed distances, so that a program
adds whole tiles up, over many tiles of queries; a second kernel adds along the distances.

Numerics. Logits, softmax and all sums are float32; the weights are rounded to the inputs' dtype before they meet values
or gradients; float32 inputs use full float32 products. There the statistics are the rows' maxima and totals, not their
log-sum-exp, whose rounding is one error of all weights of a row: sums of many, as a pad's gradient, do not average it.
The bias' gradient of float32 has its products, and statistics of its own, in float64: as a sum over the whole map it
would show their rounding, and worse, that of statistics which were rounded otherwise than its weights.
The forward leaves nothing but its output. No atomics: every gradient has one program, or partial sums that are added in
a fixed order. Gradients are therefore deterministic.

Roofline. The forward has to move q, k, v and the output once, the backward these, the output's gradient and three
gradients. A tile of 2x8 queries reads the keys of 7 tiles, mostly from the caches: with 7x7 neighborhoods that, and the
instructions for 128 logits a query of which 49 count, are what the time goes into.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, D 32, 7x7, batch 64, CUDA-graph replay), milliseconds
forward / forward and backward: 56x56, 2 heads 0.077 / 0.317 (flex_attention, compiled, 0.471 / 1.72); 28x28, 4 heads
0.045 / 0.188; 14x14, 8 heads 0.023 / 0.097; 56x56 with dilation 8 0.048 / 0.204, with stride 4 0.054 / 0.243, with a
bias 0.101 / 0.745; 200x336, batch 2 0.053 / 0.218. Those are the fastest tiles of each kernel; the table of tiles has
them but for the bias. In the backward of the keys 2x8 keys against 32 queries, two stages, take 0.117 at 56x56; 64
queries 0.187, 8x8 keys 0.153 to 0.172.

Ideas, with what the compiler makes of them (Triton 3.8 for sm_90, bfloat16, D 32, 7x7, forward, registers a thread):

| idea | outcome |
|---|---|
| masked loads, zeros where nothing is read | rejected: 1600 instructions, not 1380; the nearest token is read instead |
| int64 offsets inside an image | only where needed: 1490 instructions, not 1380 |
| the scale on every product | rejected: 1360 instructions, not 1290; it goes into the exponent's multiply-add |
| the bias added to the product | rejected: layouts are converted, several reductions a row, up to 4100 instructions |
| one loop also where there is one tile | rejected: 197 registers, not 160 |
| 128 keys in two tiles of 64 | 127 registers, but a third more instructions; an entry of the table for wider heads |
| tiles of 8x8 queries, four warps | 72 registers and half of the reads, but 224 logits a query instead of 128 |
| two walks in the backward of the queries | rejected where one tile holds all keys: 255 registers and spills, not 201 |
| 128 queries a tile in the backward of the keys | rejected: spills |
| the walk's position carried from step to step | not tried: a division a step, of which there are two |
"""

from vitrail.kernels.neighborhood_attention.triton.launch import (
    neighborhood_attention_backward,
    neighborhood_attention_forward,
)

__all__ = ["neighborhood_attention_backward", "neighborhood_attention_forward"]
