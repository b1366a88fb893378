"""A backbone for dense prediction: the maps of chosen stages, each through a norm of its own.

A family whose authors publish such backbones declares two constants in its module: `DENSE_NORM_KEY`, the official name
of a stage's output norm with a place for the stage's number, and `DENSE_NORM_EPS`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitrail.models._checkpoint import unwrap
from vitrail.models._hierarchical import HierarchicalBackbone


class DenseBackbone(nn.Module):
    """Turns an image into a list of (B, C, h, w) maps, without the model's classifier and final norm.

    Output norms are LayerNorms over channels. What they compute is not fed to the next stage.

    Args:
        model: A model of this package. It is taken over: stages and layers that no output needs are removed.
        out_indices: Stages to return, in ascending order.
        output_norm: Give every output a norm; otherwise the stages' maps are returned as they are.

    Attributes:
        channels: Channels of each output.
        reductions: Stride of each output against the image.

    Raises:
        ValueError: `out_indices` is empty, out of order or out of range.
        NotImplementedError: `output_norm` is asked for, but the family declares none.
    """

    def __init__(
        self, model: HierarchicalBackbone, out_indices: Sequence[int] = (0, 1, 2, 3), output_norm: bool = True
    ) -> None:
        super().__init__()
        indices, n_stages = list(out_indices), len(model.stages)
        if not indices or indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= n_stages:
            raise ValueError(f"out_indices is {out_indices}; allowed: ascending stages from 0 to {n_stages - 1}")
        self.out_indices = indices
        self.channels = [model.feature_info[i]["num_chs"] for i in indices]
        self.reductions = [model.feature_info[i]["reduction"] for i in indices]
        self.norms = nn.ModuleDict(_output_norms(model, indices) if output_norm else {})
        model.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, in_chans, H, W) -> one (B, C, h, w) for each of `out_indices`."""
        maps = self.model.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)
        if not self.norms:
            return maps
        return [norm(x) for norm, x in zip(self.norms.values(), maps, strict=True)]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], backbone: DenseBackbone) -> dict[str, Tensor]:
    """Renames a checkpoint of a classifier or of an official dense backbone to the parameters of `backbone`.

    The classifier, the final norm and norms of stages that are not returned are dropped. A checkpoint without any
    output norm, as of a classifier, leaves those of `backbone` as they are.

    Args:
        state_dict: Weights of the authors, of the family's model or of a `DenseBackbone`, alone or under
            "state_dict" or "model".
        backbone: The backbone that will load them.
    """
    state_dict = unwrap(state_dict)
    if any(key.startswith("model.") for key in state_dict):
        return dict(state_dict)  # its own layout
    family = _family(backbone.model)
    official_norm = re.compile(re.escape(getattr(family, "DENSE_NORM_KEY", "")).replace(r"\{\}", r"(\d+)") + r"\.(\w+)")
    matches = {key: official_norm.fullmatch(key) for key in state_dict}
    rest = {key: value for key, value in state_dict.items() if not matches[key]}
    renamed = family.checkpoint_filter_fn(rest, backbone.model)
    unused = re.compile(rf"(head|norm)\.|stages\.({'|'.join(_dropped_stages(backbone))})\.")
    weights = {f"model.{key}": value for key, value in renamed.items() if not unused.match(key)}
    norms = {f"norms.{m[1]}.{m[2]}": state_dict[key] for key, m in matches.items() if m and m[1] in backbone.norms}
    own_norms = {f"norms.{key}": value for key, value in backbone.norms.state_dict().items()}
    return weights | (norms or own_norms)


def _family(model: nn.Module) -> Any:
    """The module that defines the model's class, with its constants and key mapping."""
    return sys.modules[type(model).__module__]


def _output_norms(model: HierarchicalBackbone, indices: Sequence[int]) -> dict[str, nn.Module]:
    eps = getattr(_family(model), "DENSE_NORM_EPS", None)
    if eps is None:
        raise NotImplementedError(
            f"output_norm: {type(model).__name__} declares no norm of its stages' outputs; allowed: output_norm=False"
        )
    like = next(model.parameters())
    channels = {i: model.feature_info[i]["num_chs"] for i in indices}
    return {str(i): LayerNorm2d(n, eps=eps, device=like.device, dtype=like.dtype) for i, n in channels.items()}


def _dropped_stages(backbone: DenseBackbone) -> list[str]:
    """Numbers of the stages behind the last one that is returned."""
    kept = len(backbone.model.stages)
    return [str(i) for i in range(kept, len(backbone.model.feature_info))] or ["none"]
