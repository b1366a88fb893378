"""Layer normalisation with PyTorch's and timm's parameters, by a fused operator in training."""

# TorchScript has no tuples of any length, such as a norm's shape is; it takes them as lists.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

from typing import List, Optional  # noqa: UP035 -- TorchScript reads the annotations

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.layers.fast_norm import fast_layer_norm
from torch import Tensor, nn

from vitrail.kernels._common.dispatch import settings
from vitrail.kernels._common.recording import records_graph
from vitrail.kernels.layer_norm import layer_norm

# Values from which a step that is not compiled gains by the operator: below, it waits for its host, for which the
# operator is a little more work. Eager training on an H100 (bfloat16, 224, torch 2.11), milliseconds with PyTorch's /
# from 2**25, 2**24, 2**23, 2**22 values / always: DaViT-T, and accelerated Swin-T alike, with 128 images 63 / 54, 51,
# 49, 49 / 48; DaViT-T with 64: 39 / 39, 37, 35, 36 / 34, Swin-T 38 / 38, 36, 35, 34 / 37; with 16, where the host is
# what is waited for, 29 / 31, 29, 29, 28 / 27 and 34 / 32, 31, 31, 32 / 34.
_LARGE = 2**23


def _layer_norm(
    x: Tensor,
    normalized_shape: List[int],  # noqa: UP006
    weight: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    eps: float,
) -> Tensor:
    """`F.layer_norm`, by the operator where that is quicker; see `LayerNorm`."""
    if torch.jit.is_scripting():
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    # Norms of several axes, and inputs that do not fit, are PyTorch's to compute and to complain of.
    if not trains or records_graph() or x.shape[-1:] != torch.Size(normalized_shape) or not _is_worth_it(x):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    return layer_norm(x, weight, bias, eps)


def _is_worth_it(x: Tensor) -> bool:
    """Whether a training step gains by the operator, or it was asked for."""
    return torch.compiler.is_compiling() or settings.default_backend == "triton" or x.numel() >= _LARGE


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with a fused operator in training: same arguments, parameters and results.

    Where gradients are recorded, on a GPU and over one axis, it runs `vitrail.kernels.layer_norm`, which moves each map
    once in each direction: under `torch.compile` always (PyTorch's own saves the normalised map for the backward there,
    in float32), else for maps of 2**23 values or more, on which the host is not what is waited for, or where
    `VITRAIL_BACKEND` is "triton". Everywhere else, exported models included, it is `F.layer_norm`: in inference
    `torch.compile` fuses that with its neighbours.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., *normalized_shape) -> the same."""
        return _layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@register_notrace_module
class TimmLayerNorm(timm.layers.LayerNorm):
    """timm's `LayerNorm`, with the operator that `LayerNorm` has in training."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same."""
        if self._fast_norm:
            return fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return _layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@register_notrace_module
class LayerNorm2d(timm.layers.LayerNorm2d):
    """timm's `LayerNorm2d`, over the channels of (B, C, H, W), with the operator that `LayerNorm` has in training."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, channels-last."""
        x = x.permute(0, 2, 3, 1)
        if self._fast_norm:
            x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = _layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
