"""Triton kernels of the MLP: index map, tiling, numerics and roofline.

Index map. All leading axes are one axis of rows at a constant distance. Forward (`forward.py`) a program holds a tile
of rows and the sums of its results in registers and walks over the hidden channels, block by block: a block's product
with the rows, GELU, and its product with the second weight's block, which is added to the sums. The hidden map never
leaves the registers; the weights, which all programs read, come from the second-level cache.

Backward (`backward.py`) it is the other way round: a program holds a block of hidden channels, its rows of both weights
and the sums of their gradients, and walks over every n-th tile of rows. From a tile of rows and one of the gradient it
makes the block's hidden values and their gradient, transposed, so that they are the first operands of the products
with those same tiles without leaving the registers. The bias before GELU takes the sums of what is there; of the last
bias each block adds up some of the columns. Programs leave their sums in a workspace, which PyTorch adds up: gradients
are deterministic. The gradient of the hidden map, which the rows' gradient sums over all blocks, is
written once, in the inputs' dtype, and PyTorch multiplies it with the first weight. What is not needed is left out.

Tiling. Tiles' sides are powers of two. So that 96 or 192 channels do not take the products of 128 or 256, channels lie
in two tiles side by side, of 64 and 32 or of 128 and 64; what is left over is masked.

Numerics. Sums are float32; hidden values go through GELU and its derivative without being rounded, and they and their
gradient are rounded to the inputs' dtype as operands of the next products.

Roofline. Moved bytes, one map in and one out, take less than the products: 401408 rows of 96 channels with 384 hidden
ones are 51 microseconds at 3 TB/s, and 59 GFLOP, 60 at the tensor cores' peak. Between them stand the weights, which
come from the second-level cache once a tile of rows, and GELU, evaluated 154 million times: with ReLU in its place that
case took 152 in place of 198 (in tiles of 64 x 64), with `tl.erf` 337.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, with biases, CUDA-graph replay), microseconds forward:

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

Tried and rejected forward: programs that keep all weights in shared memory and walk over the rows (225.8 for 96
channels, 78.6 for 64); 8 warps for 96 channels (212.7) and 4 stages (206.9); a shorter polynomial for GELU, good for
bfloat16 alone (190.4 where 198.4 was). Adding the block's residual here takes 34 for 401408 x 96 and 12 for 100352 x
192, by itself 76 and 38; but then a hook on the layer would see the sum.

Backward. GELU, its derivative and the rest are 27 instructions a hidden value (96 channels; Triton 3.8 for sm_90),
which take about as long as the four products at the tensor cores' peak. Measured there: the kernel (W) and PyTorch's
product (X), which with the addition of the programs' sums (20 to 40) make the backward; it; both directions; and both
in PyTorch:

============  ======  =====  =====  ========  =====  =======  ========
rows          hidden  W      X      backward  both   PyTorch  compiled
============  ======  =====  =====  ========  =====  =======  ========
401408 x 64   192     155.1   75.4  256.3     340.3  1012.9   837.5
401408 x 96   384     345.6  137.5  513.1     704.8  1688.1   1582.5
100352 x 128  384     126.9   42.1  194.5     257.8  599.2    452.4
100352 x 192  768     411.8   75.4  528.6     683.2  965.9    820.7
25088 x 192   768     116.2   22.8  177.9     224.1  307.0    241.1
8192 x 64     192       9.6    5.4   27.5      33.3  63.5     43.2
8192 x 96     384      15.3    6.4   38.9      47.8  80.6     58.7
8192 x 128    384      19.3    5.7   42.3      53.3  86.9     59.8
8192 x 192    768      47.3    7.6   91.0     114.6  126.3    91.5
============  ======  =====  =====  ========  =====  =======  ========

Changed since: PyTorch adds up the sums, in as much time by itself (6.6 where the kernel took 6.9, 8.9 where it took
16); and tiles of 128 hidden channels are turned before they are written, W then is 343.8 for 401408 x 96, 124.5 for
100352 x 128 and 370.0 for 100352 x 192.

256 channels (25088 rows, 768 hidden) take 128 and 61 in a launch for each weight, 217 in one; with the product (23),
the sums and the forward (59) that is no less than the compiled 253: in training they are the reference's.

Tried and rejected in the backward: a kernel of tiles of rows that computes the hidden gradient a second time for the
rows' gradient (324 for 401408 x 96, 119 for 401408 x 64, 100 for 100352 x 128, the best of six tilings or more; to
write it costs 80, 20 and 24, and the product X), or that writes both hidden maps for PyTorch's products (643 for
401408 x 96, 471 for 100352 x 192, then 143 and 145, 74 and 80 for the weights); a launch for each weight (263 + 148 for
100352 x 192); two stages (504 for 401408 x 96); tiles of 64 hidden channels where the sums of the last bias take the
last registers (568 for 401408 x 96, 432 without them); PyTorch's sum for that bias (93 for 401408 x 96; here it is
free).
"""

from vitrail.kernels.mlp.triton.backward import mlp_backward
from vitrail.kernels.mlp.triton.forward import mlp_forward

__all__ = ["mlp_backward", "mlp_forward"]
