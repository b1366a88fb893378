"""Depth-wise convolution in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.partition import pad_map
from vitrail.kernels._common.recording import at_most


def depthwise_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_value: Tensor | None,
    residual: Tensor | None,
    pads: tuple[int, int],
    gelu: bool,
    skip: bool,
) -> Tensor:
    """Computes `activation(conv(x) + bias) + skip * x + residual`.

    See `vitrail.kernels.depthwise_conv.depthwise_conv` for the arguments.
    """
    # Constants also where a graph is recorded: they are sizes of a parameter.
    dim, reach = int(weight.shape[0]), int(weight.shape[2]) // 2
    padded = x
    if pad_value is not None:
        # No more of the padding than the filter meets from inside the map.
        pads = (at_most(pads[0], reach), at_most(pads[1], reach))
        padded = pad_map(x.unsqueeze(3), pads, pad_value.unsqueeze(0)).flatten(3)
    # The permutations are views: the convolution sees a channels-last map and returns one.
    y = F.conv2d(padded.permute(0, 3, 1, 2), weight, bias, padding=reach, groups=dim).permute(0, 2, 3, 1)
    if pad_value is not None:
        y = y[:, : x.shape[1], : x.shape[2]]
    if gelu:
        y = F.gelu(y)
    for added in (x if skip else None, residual):
        if added is not None:
            y = added + y
    return y
