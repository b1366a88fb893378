"""PyTorch's FLOP counter sees the attention that CPUs run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import vitrail.kernels  # noqa: F401 -- registers the formulas


def test_fused_attention_on_the_cpu_is_counted() -> None:
    q, k, v = (torch.randn(2, 3, tokens, 8, requires_grad=True) for tokens in (5, 7, 7))
    product = 2 * (2 * 3 * 5 * 7 * 8)
    with FlopCounterMode(display=False) as counter:
        out = F.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # One product is computed anew, four make the gradients.
    assert counter.get_total_flops() == 5 * product
