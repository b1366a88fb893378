"""Triton kernels of layer normalisation: index map, tiling, numerics and roofline.

Index map. All leading axes are one axis of rows at a constant distance; a program's tile are whole rows, so that a
row's mean and variance never leave the registers. Widths that are no power of two are masked: 96 channels take the
lanes of 128.

Tiling. Small tiles, so that many loads are under way. Forward, a program has one tile. Backward, each of a fixed number
of programs walks over every n-th tile, the next ones being copied to shared memory meanwhile, and keeps the sums of
`grad * normalised` and of `grad` in registers, one for each place of the tile; it adds them up over the tile's rows at
its end and leaves them in a workspace. A second kernel adds the workspace up in a fixed order: gradients are
deterministic.

Numerics. Everything is float32; the variance is the mean of squared distances from the mean, no difference of large
numbers. The backward computes both again, in registers, since it reads the rows anyway: only the inputs are saved.

Roofline. Moved bytes alone count: two maps forward, three backward.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, weight and bias, CUDA-graph replay), microseconds forward,
backward, and both; PyTorch's own kernels; both directions as `torch.compile` makes them of a norm that stands alone:

============  =====================  ===================  ==================  ========
rows          fused                  bytes at 3 TB/s      PyTorch's kernels   compiled
============  =====================  ===================  ==================  ========
401408 x 64   36.4 + 59.5 =  95.9    34.3 + 51.4 =  85.6  439.7 + 378.3
401408 x 96   53.0 + 88.1 = 141.1    51.4 + 77.1 = 128.5  446.4 + 406.8       162.3
100352 x 192  28.1 + 55.3 =  83.4    25.7 + 38.5 =  64.2  129.4 + 154.7       98.5
25088 x 384   12.7 + 32.7 =  45.4    12.8 + 19.3 =  32.1  38.9 + 140.3        60.9
6272 x 768     5.9 + 15.8 =  21.7     6.4 +  9.6 =  16.1  14.5 + 33.1         36.5
6272 x 1536   13.2 + 28.6 =  41.8    12.8 + 19.3 =  32.1  20.7 + 53.9
============  =====================  ===================  ==================  ========

Compiled as a part of `davit_t`, norms of 401408 x 96 took 296 forward and 200 backward, since what was saved for the
backward was the normalised map, in float32. The last three maps partly stay in the second-level cache.

Tried and rejected: tiles that are loaded when they are needed (105.6 backward for 401408 x 96), or one tile ahead into
registers (92.7; 1 to 6 % faster from 384 channels on); forward programs that walk (57.8); backward programs of one warp
and 32 values a thread (53.0 for 100352 x 192, but it spills registers). The second kernel, with
tiles of 256 sums by 8 channels then, took 3.0 to 4.8; with those of now 2.6 to 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.gradients import empty_gradient
from vitrail.kernels._common.launch import as_rows, contiguous, launch, multiprocessors, row_stride
from vitrail.kernels._common.triton import add_parts_kernel


class Tile(NamedTuple):
    """Values of a thread, warps of a program, and programs a multiprocessor where they walk."""

    values: int
    warps: int
    programs: int = 0


_FORWARD = Tile(16, 4)
# By the width that rows take, a power of two.
_BACKWARD = {256: Tile(16, 8, 2), 1024: Tile(16, 4, 3), 8192: Tile(16, 8, 2)}
_STAGES = 3  # of the backward's loop
_PARTS, _CHANNELS = 512, 8  # sums of programs that are added at once, and channels of a program that adds


@triton.jit
def _offsets(rows, columns, STRIDE: tl.constexpr):
    """Element offsets (rows, columns)."""
    return rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]


@triton.jit
def _load(ptr, rows, columns, inside, STRIDE: tl.constexpr):
    """A tile of rows in float32, zero outside."""
    return tl.load(ptr + _offsets(rows, columns, STRIDE), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_parameter(ptr, columns, DIM: tl.constexpr):
    """A vector of parameters in float32, as a tile of one row."""
    return tl.load(ptr + columns, mask=columns < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _inside(rows, columns, n_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    return (rows < n_rows)[:, None] & ((columns < DIM) | (DIM == BLOCK))[None, :]


@triton.jit
def _normalise(x, inside, eps, DIM: tl.constexpr):
    """(normalised rows, 1 / standard deviation of each); `x` is zero outside."""
    mean = tl.sum(x, 1) / DIM
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / DIM + eps)
    # Rows that do not exist have no variance: without `eps` their scale would be infinite, and their values NaN.
    return tl.where(inside, centred * scale[:, None], 0.0), scale


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, n_rows, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    X_STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = _inside(rows, columns, n_rows, DIM, BLOCK)
    x = _load(x_ptr, rows, columns, inside, X_STRIDE)
    y, _ = _normalise(x, inside, eps, DIM)
    if HAS_WEIGHT:
        y *= _load_parameter(weight_ptr, columns, DIM)
    if HAS_BIAS:
        y += _load_parameter(bias_ptr, columns, DIM)
    tl.store(y_ptr + _offsets(rows, columns, DIM), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, d_x_ptr, parts_ptr, n_rows, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every n-th tile of rows; leaves sums for the gradients of weight and bias: (programs, 2, DIM)."""
    columns = tl.arange(0, BLOCK)
    if HAS_WEIGHT:
        weight = _load_parameter(weight_ptr, columns, DIM)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = _inside(rows, columns, n_rows, DIM, BLOCK)
        x = _load(x_ptr, rows, columns, inside, X_STRIDE)
        grad = _load(grad_ptr, rows, columns, inside, GRAD_STRIDE)
        normalised, scale = _normalise(x, inside, eps, DIM)
        if HAS_WEIGHT:
            d_weight += grad * normalised
            if HAS_BIAS:
                d_bias += grad
            grad *= weight
        along = tl.sum(grad * normalised, 1) / DIM
        mean = tl.sum(grad, 1) / DIM
        d_x = (grad - normalised * along[:, None] - mean[:, None]) * scale[:, None]
        tl.store(d_x_ptr + _offsets(rows, columns, DIM), d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        part = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * DIM + columns
        tl.store(part, tl.sum(d_weight, 0), mask=columns < DIM)
        if HAS_BIAS:
            tl.store(part + DIM, tl.sum(d_bias, 0), mask=columns < DIM)


def _cut(tile: Tile, dim: int) -> dict[str, int]:
    """How rows of so many values are cut: constants and options of the kernels; wide rows take more warps."""
    block = triton.next_power_of_2(dim)
    lanes = triton.cdiv(block, tile.values)  # of one row
    warps = max(tile.warps, lanes // 32)
    return {"DIM": dim, "BLOCK": block, "ROWS": max(1, 32 * warps // lanes), "num_warps": warps, "num_stages": 1}


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Fused forward; arguments as in `layer_norm_reference`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = as_rows(x)
    options = _cut(_FORWARD, x.shape[-1])
    launch(
        _layer_norm_fwd_kernel, (triton.cdiv(len(rows), options["ROWS"]),),
        rows, contiguous(weight), contiguous(bias), y, len(rows), eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, X_STRIDE=row_stride(rows), **options,
    )  # fmt: skip
    return y


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused gradients of x, weight and bias, empty for those that are absent."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight, d_bias = (_gradient_of(parameter, x) for parameter in (weight, bias))
    if x.numel() == 0:
        return d_x, d_weight.zero_(), d_bias.zero_()
    rows, grad_rows = as_rows(x), as_rows(grad)
    dim, n_sums = x.shape[-1], (weight is not None) + (bias is not None)
    tile = next(tile for width, tile in _BACKWARD.items() if dim <= width)
    options = _cut(tile, dim)
    n_tiles = triton.cdiv(len(rows), options["ROWS"])
    steps = triton.cdiv(n_tiles, tile.programs * multiprocessors(x.device))
    n_programs = triton.cdiv(n_tiles, steps)  # all with as many tiles, but for the last ones
    parts = torch.empty((n_programs, 2, dim), dtype=torch.float32, device=x.device)
    launch(
        _layer_norm_bwd_kernel, (n_programs,),
        grad_rows, rows, contiguous(weight), d_x, parts, len(rows), eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        GRAD_STRIDE=row_stride(grad_rows), X_STRIDE=row_stride(rows), STAGES=_STAGES, **options,
    )  # fmt: skip
    if n_sums:
        launch(
            add_parts_kernel, (n_sums, triton.cdiv(dim, _CHANNELS)), parts, d_weight, d_bias, n_programs,
            HAS_BIAS=bias is not None, DIM=dim, TAPS=1, PARTS=_PARTS, CHANNELS=_CHANNELS, num_warps=8, num_stages=1,
        )  # fmt: skip
    return d_x, d_weight, d_bias


def _gradient_of(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Room for the gradient of a parameter, empty if there is none."""
    if parameter is None:
        return empty_gradient(x)
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
