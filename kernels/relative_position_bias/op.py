"""Registration of `vitrail::relative_position_bias` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. Like all that only moves values it has no entry in PyTorch's FLOP counter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS, Support, triton_support
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.relative_position_bias.reference import relative_position_bias_reference

MAX_WINDOW = 32768  # tokens, whose pairs are counted in 32 bits
_MOST_HEADS = 65535  # of a grid's second axis


def fused_support(table: Tensor, window_size: Sequence[int]) -> Support:
    """The one place that says when the bias is handed to the reference, and why."""
    if math.prod(window_size) > MAX_WINDOW:
        taken = f"Triton kernels take windows of up to {MAX_WINDOW} tokens"
        return Support(False, f"{taken}, the window is {tuple(window_size)}")
    if table.shape[1] > _MOST_HEADS:
        return Support(False, f"Triton kernels take up to {_MOST_HEADS} heads, the table has {table.shape[1]}")
    # There are no heads' widths: any that the shared conditions allow stands for all.
    return triton_support(table, FUSED_HEAD_DIMS[0])


def _forward(table: Tensor, window_size: Sequence[int]) -> Tensor:
    if fused_support(table, window_size).ok:
        from vitrail.kernels.relative_position_bias.triton import relative_position_bias_forward

        return relative_position_bias_forward(table, window_size)
    return relative_position_bias_reference(table, window_size).contiguous()


def _backward(grad: Tensor, table: Tensor, window_size: Sequence[int]) -> Tensor:
    if fused_support(table, window_size).ok:
        from vitrail.kernels.relative_position_bias.triton import relative_position_bias_backward

        return relative_position_bias_backward(grad, table, window_size)
    (d_table,) = reference_gradients(relative_position_bias_reference, (table,), (window_size,), grad)
    return d_table


def _fake_forward(table: Tensor, window_size: Sequence[int]) -> Tensor:
    tokens = math.prod(window_size)
    return torch.empty((table.shape[1], tokens, tokens), dtype=table.dtype, device=table.device)


run_relative_position_bias = register_operator(
    "relative_position_bias", "Tensor table, int[] window_size", ("d_table",), _forward, _backward, _fake_forward
)
