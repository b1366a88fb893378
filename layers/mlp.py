"""The feed-forward layer of transformers with timm's parameters, by a fused operator in inference."""

from __future__ import annotations

import timm.layers
import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules import module as watched

from vitrail.kernels._common.recording import records_graph
from vitrail.kernels.mlp import mlp
from vitrail.kernels.mlp.api import runs_fused


@register_notrace_module
class Mlp(timm.layers.Mlp):
    """timm's `Mlp` with a fused operator in inference: same arguments, parameters and results.

    In evaluation mode where no gradient is recorded, on a GPU, `vitrail.kernels.mlp` computes it at once for the dtypes
    and widths that its kernel takes. Everywhere else each part is called on its own, as in timm: in training, in
    exported models, and where a part is not the plain one, such as a layer that was quantised or has an adapter, a hook
    or a norm in between.
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
        if self.training or records_graph() or not self._is_plain():
            return False
        given = (x, *self.fc1.parameters(), *self.fc2.parameters())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            return False
        return runs_fused(x, self.fc2.weight)

    def _is_plain(self) -> bool:
        """Whether the operator computes what the parts would; what replaces or watches one of them wants its call."""
        kinds = {
            self.fc1: nn.Linear, self.act: nn.GELU, self.drop1: nn.Dropout, self.norm: nn.Identity,
            self.fc2: nn.Linear, self.drop2: nn.Dropout,
        }  # fmt: skip
        return (
            all(type(part) is kind and not _has_hooks(part) for part, kind in kinds.items())
            and self.act.approximate == "none"
            # Quantised weights are tensors of their own kinds inside of plain layers.
            and all(type(layer.weight) in (nn.Parameter, Tensor) for layer in (self.fc1, self.fc2))
        )


def _has_hooks(module: nn.Module) -> bool:
    of_all = watched._global_forward_hooks or watched._global_forward_pre_hooks
    return bool(of_all or module._forward_hooks or module._forward_pre_hooks)
