"""Routing attention with its position term in plain PyTorch: its two operators' references, one after the other."""

from __future__ import annotations

from torch import Tensor

from vitrail.kernels._common.recording import is_padded
from vitrail.kernels.depthwise_conv.reference import depthwise_conv_reference
from vitrail.kernels.routing_attention.reference import region_size, routing_attention_reference


def routing_attention_lepe_reference(
    qkv: Tensor,
    pads: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    routes: Tensor,
    n_regions: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attention of every region over its routed regions, plus the values' convolution, (B, H, W, heads * D).

    See `vitrail.kernels.routing_attention_lepe.routing_attention_lepe` for the arguments.
    """
    q, k, v = qkv.unbind(3)
    missing = region_size(qkv.shape[1], qkv.shape[2], n_regions)[1]
    _, pad_k, pad_v = (None, None, None) if pads is None or not is_padded(missing) else pads.unbind(0)
    attention = routing_attention_reference(q, k, v, pad_k, pad_v, routes, n_regions, scale)
    pad_value = None if pad_v is None else pad_v.flatten()
    return depthwise_conv_reference(
        v.flatten(3), weight, bias, pad_value, attention.flatten(3), missing, gelu=False, skip=False
    )
