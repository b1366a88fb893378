"""The feed-forward layer of transformers with timm's parameters, by a fused operator."""

from __future__ import annotations

from itertools import chain

import timm.layers
import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as watched

from vitrail.kernels._common.direct import need_gradients
from vitrail.kernels._common.dispatch import settings
from vitrail.kernels._common.recording import records_graph
from vitrail.kernels.mlp import mlp
from vitrail.kernels.mlp.api import runs_fused

# Rows from which the kernels fill a GPU: with fewer, 192 channels take longer than PyTorch's own products.
_FEWEST_ROWS = 8192
_PARTS = (
    ("fc1", nn.Linear),
    ("act", nn.GELU),
    ("drop1", nn.Dropout),
    ("norm", nn.Identity),
    ("fc2", nn.Linear),
    ("drop2", nn.Dropout),
)
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)  # the last ones stand for the others in runs without data


@register_notrace_module
class Mlp(timm.layers.Mlp):
    """timm's `Mlp` with a fused operator: same arguments, parameters and results.

    On a GPU `vitrail.kernels.mlp` computes it at once for the dtypes and widths that its kernels take (fewer channels
    in training than in inference), from 8192 rows on, or for any number where `VITRAIL_BACKEND` is "triton"; for the
    backward nothing is kept but the layer's input.
    Everywhere else each part is called on its own, as in timm: where training drops hidden values, in exported models,
    and where a part is not the plain one, such as a layer that was quantised or has an adapter, a hook or a norm in
    between.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript leaves out a branch on this call alone
            if self._runs_fused(x):
                return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    @torch.jit.unused
    def _runs_fused(self, x: Tensor) -> bool:
        if not self.is_plain() or self._drops() or records_graph():
            return False
        return _is_worth_it(x) and runs_fused(x, self.fc2.weight, need_gradients(chain([x], self.parameters())))

    def _drops(self) -> bool:
        return any(part.training and part.p > 0 for part in (self.drop1, self.drop2))

    def is_plain(self: timm.layers.Mlp) -> bool:
        """Whether the operator computes what the parts would; what replaces or watches one of them wants its call."""
        if watched._global_forward_hooks or watched._global_forward_pre_hooks:
            return False
        if watched._global_backward_hooks or watched._global_backward_pre_hooks:
            return False
        parts = self._modules  # quicker than attributes: this is a part of every call
        for name, kind in _PARTS:
            part = parts[name]
            if type(part) is not kind or part._forward_hooks or part._forward_pre_hooks:
                return False
            if part._backward_hooks or part._backward_pre_hooks:
                return False
            # Quantised weights are tensors of their own kinds inside of plain layers.
            if kind is nn.Linear and type(part._parameters["weight"]) not in _PLAIN_TENSORS:
                return False
        return bool(self.act.approximate == "none")


def _is_worth_it(x: Tensor) -> bool:
    """Whether the kernel is quicker, or was asked for."""
    return settings.default_backend == "triton" or x.numel() >= _FEWEST_ROWS * x.shape[-1]
