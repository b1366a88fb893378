"""Routing attention with its position term on the Triton kernels of `routing_attention` and `depthwise_conv`.

Index maps, tiling and numerics are described there. The forward adds the convolution to the attention's result in
place, which the convolution reads where it writes. The backward writes into the three parts of one gradient: the
convolution's gradients first, then those of attention, whose sums for the values begin with what the convolution has
left (in float32 it is added at the end, since each product would be rounded at its size). So the gradient of the values
is rounded to the inputs' dtype once more than in one sum, not twice, and nothing is added, stacked or copied
afterwards: for a map of 56x56x64, batch 128, in bfloat16 that is 0.4 GB less to move.

Measured on one H100 80GB (torch 2.11, triton 3.6, bfloat16, batch 128, CUDA-graph replay), microseconds of attention's
backward at 56x56x64, top-1 / 28x28x128, top-4 / 14x14x256, top-16, which adds to the gradient of the values: 257 / 219
/ 237, and 243 / 214 / 246 without the addition. Its sums have to begin with what is added, and where a program has four
warps they are kept to 128 registers: added at the end it took 280 / 237 / 255, without the limit 273 / 219 / 249, and
with the limit for single warps, too, 234 at the second size. Prefetched into the L2 cache and added at the end: 297 /
239 / 266.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.kernels._common.gradients import zeros_or_empty
from vitrail.kernels.depthwise_conv.triton import depthwise_conv_backward, depthwise_conv_forward
from vitrail.kernels.routing_attention.reference import region_size
from vitrail.kernels.routing_attention.triton import routing_attention_forward, routing_attention_gradients


def routing_attention_lepe_forward(
    qkv: Tensor,
    pads: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    routes: Tensor,
    n_regions: tuple[int, int],
    scale: float,
) -> Tensor:
    """Fused forward; arguments as in `routing_attention_lepe_reference`."""
    q, k, v = qkv.unbind(3)
    missing, (pad_k, pad_v, pad_value) = _padding(qkv, pads, n_regions)
    out = torch.empty((*q.shape[:3], q.shape[3] * q.shape[4]), dtype=q.dtype, device=q.device)
    routing_attention_forward(q, k, v, pad_k, pad_v, routes, n_regions, scale, out=out.view(q.shape))
    return depthwise_conv_forward(v.flatten(3), weight, bias, pad_value, out, missing, False, False, out=out)


def routing_attention_lepe_backward(
    grad: Tensor,
    qkv: Tensor,
    pads: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    routes: Tensor,
    n_regions: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused gradients of qkv, pads, weight and bias, contiguous, and empty for those that are absent."""
    q, k, v = qkv.unbind(3)
    missing, (pad_k, pad_v, pad_value) = _padding(qkv, pads, n_regions)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    d_q, d_k, d_v = d_qkv.unbind(3)
    _, d_weight, d_bias, d_pad_value = depthwise_conv_backward(
        grad, v.flatten(3), weight, bias, pad_value, missing, False, False, d_x=d_v.flatten(3)
    )
    d_attention_pads = routing_attention_gradients(
        grad.unflatten(3, qkv.shape[4:]), q, k, v, d_q, d_k, d_v, pad_k, pad_v, routes, n_regions, scale, adds_to_v=True
    )
    if pads is None or d_attention_pads is None:
        return d_qkv, zeros_or_empty(grad, pads), d_weight, d_bias
    d_pad_k, d_pad_v = d_attention_pads
    d_pads = torch.zeros_like(pads, memory_format=torch.contiguous_format)  # those of the queries stay zero
    d_pads[1], d_pads[2] = d_pad_k, d_pad_v + d_pad_value.view(qkv.shape[4:])
    return d_qkv, d_pads, d_weight, d_bias


def _padding(
    qkv: Tensor, pads: Tensor | None, n_regions: tuple[int, int]
) -> tuple[tuple[int, int], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Rows and columns to whole regions; what they hold: keys, values (heads, D), and the latter as (heads * D,)."""
    missing = region_size(qkv.shape[1], qkv.shape[2], n_regions)[1]
    if pads is None or missing == (0, 0):
        return missing, (None, None, None)
    return missing, (pads[1], pads[2], pads[2].flatten())
