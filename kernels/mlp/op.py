"""Registration of `vitrail::mlp` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only; the backward computes the hidden map again, and only those gradients that are
needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS, Support, triton_support
from vitrail.kernels._common.launch import shared_memory
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.mlp.reference import mlp_gradients, mlp_reference

# Of a row and of a result, forward and backward: wider ones are no faster than PyTorch's products.
MOST_CHANNELS, MOST_TRAINED = 256, 192
_SMALL, _LARGE_TILES = 128, 193 * 1024  # channels, and bytes of shared memory that programs for more of them take


@torch.compiler.assume_constant_result
def has_room(device: torch.device) -> bool:
    """Whether a device has the shared memory that the tiles of wide rows take."""
    return shared_memory(device) >= _LARGE_TILES


def fused_support(x: Tensor, w2: Tensor, dtype: torch.dtype | None = None, backward: bool = False) -> Support:
    """The one place that says when the MLP, or its backward, is handed to the reference, and why.

    `dtype` stands for x's own.
    """
    dtype = dtype or x.dtype
    most = (MOST_TRAINED if backward else MOST_CHANNELS) if has_room(x.device) else _SMALL
    out_channels, hidden = w2.shape
    widest = max(x.shape[-1], out_channels)
    if widest > most:
        return Support(False, f"the Triton kernel takes up to {most} channels here, the input or output has {widest}")
    if 0 in (x.shape[-1], out_channels, hidden):
        return Support(False, "the Triton kernel takes inputs, outputs and hidden maps that have channels")
    if dtype not in (torch.float16, torch.bfloat16):
        return Support(False, f"the Triton kernel takes float16 and bfloat16, the input is {dtype}")
    # Channels are masked: any width that the shared conditions allow stands for all.
    return triton_support(x, FUSED_HEAD_DIMS[0])


def _forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    if fused_support(x, w2).ok:
        from vitrail.kernels.mlp.triton import mlp_forward

        return mlp_forward(x, w1, b1, w2, b2)
    return mlp_reference(x, w1, b1, w2, b2).contiguous()


def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    if fused_support(x, w2, backward=True).ok:
        from vitrail.kernels.mlp.triton import mlp_backward

        return mlp_backward(grad, x, w1, b1, w2, b2, needed)
    return mlp_gradients(grad, x, w1, b1, w2, b2, needed)


def _fake_forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    return torch.empty((*x.shape[:-1], w2.shape[0]), dtype=x.dtype, device=x.device)


run_mlp = register_operator(
    "mlp",
    "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2",
    ("d_x", "d_w1", "d_b1", "d_w2", "d_b2"),
    _forward,
    _backward,
    _fake_forward,
    tells_needed=True,
)


def _product_flops(x_shape: Any, w1_shape: Any, w2_shape: Any) -> tuple[int, int]:
    """Two FLOPs a multiply-add of each of the two products."""
    n_rows = math.prod(x_shape[:-1])
    return 2 * n_rows * math.prod(w1_shape), 2 * n_rows * math.prod(w2_shape)


@register_flop_formula(torch.ops.vitrail.mlp)
def _forward_flops(x_shape: Any, w1_shape: Any, b1: Any, w2_shape: Any, *_: Any, **__: Any) -> int:
    return sum(_product_flops(x_shape, w1_shape, w2_shape))


@register_flop_formula(torch.ops.vitrail.mlp_backward)
def _backward_flops(
    grad: Any, x_shape: Any, w1_shape: Any, b1: Any, w2_shape: Any, b2: Any, needed: Sequence[bool], *_: Any, **__: Any
) -> int:
    """The first product once more, the gradient of the hidden map, and a product for each that is needed."""
    first, second = _product_flops(x_shape, w1_shape, w2_shape)
    need_x, need_w1, need_b1, need_w2, _need_b2 = needed
    hidden = (need_x or need_w1 or need_b1) * second + (need_x or need_w1 or need_b1 or need_w2) * first
    return hidden + need_x * first + need_w1 * first + need_w2 * second
