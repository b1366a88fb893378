"""FLOP formulas: what the operators share, and what PyTorch's counter lacks for the attention it runs on CPUs.

Without the latter `torch.utils.flop_counter` counts fewer operations for a model on the CPU than on any other device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count


def window_flops(q_shape: Sequence[int], window_size: Sequence[int], n_products: int) -> int:
    """Two FLOPs a multiply-add of `n_products` (T, D) x (D, T) products in every window, padded positions included."""
    batch, height, width, heads, dim = q_shape
    n_windows = batch * math.ceil(height / window_size[0]) * math.ceil(width / window_size[1])
    return 2 * n_products * n_windows * heads * math.prod(window_size) ** 2 * dim


def register_cpu_attention() -> None:
    """Teaches the counter the CPU's fused attention and its backward, unless this PyTorch knows them."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if forward not in flop_registry:
        register_flop_formula(forward)(_forward_flops)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if backward not in flop_registry:
        register_flop_formula(backward)(_backward_flops)


def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _backward_flops(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)
