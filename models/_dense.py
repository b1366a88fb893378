"""A backbone for dense prediction: the maps of chosen stages, each through a norm of its own.

A family whose authors publish such backbones declares two constants in its module: `DENSE_NORM_KEY`, the official name
of a stage's output norm with a place for the stage's number, and `DENSE_NORM_EPS`. For timm's families they stand here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vitrail.layers.norm import LayerNorm2d
from vitrail.models._checkpoint import unwrap


class OutputNorm(NamedTuple):
    """How the authors of a family normalise the outputs of a dense backbone: by a LayerNorm over channels.

    Attributes:
        key: Name of a stage's norm in the authors' checkpoints, with a place for the stage's number.
        eps: Of the norm.
    """

    key: str
    eps: float


# Source: the authors' detectors and segmenters, github.com/SwinTransformer, facebookresearch/ConvNeXt, dingmyu/davit.
_TIMM_NORMS = {
    "timm.models.swin_transformer": OutputNorm("norm{}", 1e-5),
    "timm.models.convnext": OutputNorm("norm{}", 1e-6),
    "timm.models.davit": OutputNorm("norm{}", 1e-5),
}


class DenseBackbone(nn.Module):
    """Turns an image into a list of (B, C, h, w) maps, without the model's classifier and final norm.

    Output norms are LayerNorms over channels. What they compute is not fed to the next stage.

    Args:
        model: A model of this package or of timm. It is taken over: stages and layers that no output needs are
            removed.
        out_indices: Entries of the model's `feature_info` to return, in ascending order. For the models of this
            package these are the stages; many convolutional networks of timm count their stem as 0.
        output_norm: Give every output a norm; None for where the family's authors do.

    Attributes:
        channels: Channels of each output.
        reductions: Stride of each output against the image.

    Raises:
        ValueError: `out_indices` is empty, out of order or out of range.
        NotImplementedError: `output_norm` is asked for, but the family declares none; or the model does not give its
            stages' maps.
    """

    def __init__(
        self, model: nn.Module, out_indices: Sequence[int] = (0, 1, 2, 3), output_norm: bool | None = True
    ) -> None:
        super().__init__()
        for method in ("forward_intermediates", "prune_intermediate_layers"):
            if not hasattr(model, method):
                raise NotImplementedError(f"{type(model).__name__} has no {method}, it cannot be a dense backbone")
        levels = getattr(model.feature_info, "info", model.feature_info)
        indices = list(out_indices)
        if not indices or indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= len(levels):
            raise ValueError(f"out_indices is {out_indices}; allowed: ascending stages from 0 to {len(levels) - 1}")
        self.out_indices = indices
        self.channels = [levels[i]["num_chs"] for i in indices]
        self.reductions = [levels[i]["reduction"] for i in indices]
        norm = None if output_norm is False else _declared_norm(model)
        if norm is None and output_norm:
            raise NotImplementedError(
                f"output_norm: {type(model).__name__} declares no norm of its stages' outputs; allowed: "
                "output_norm=False"
            )
        self.norms = nn.ModuleDict({} if norm is None else self._make_norms(model, norm.eps))
        whole = set(model.state_dict())
        model.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        self.model = model
        self._removed = whole - set(model.state_dict())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, in_chans, H, W) -> one (B, C, h, w) for each of `out_indices`."""
        maps = self.model.forward_intermediates(
            x, self.out_indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if not self.norms:
            return list(maps)
        return [norm(x) for norm, x in zip(self.norms.values(), maps, strict=True)]

    def is_removed(self, name: str) -> bool:
        """Whether a parameter of the whole model is one that no output needs."""
        classifiers = (getattr(self.model, "pretrained_cfg", None) or {}).get("classifier") or "head"
        classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
        return name in self._removed or name.startswith(tuple(c.split(".")[0] + "." for c in classifiers))

    def has_own_names(self, names: Sequence[str]) -> bool:
        """Whether all these are names of the whole model."""
        known = self.model.state_dict().keys()
        return all(name in known or self.is_removed(name) for name in names)

    def _make_norms(self, model: nn.Module, eps: float) -> dict[str, nn.Module]:
        like = next(model.parameters())
        return {
            str(i): LayerNorm2d(channels, eps=eps, device=like.device, dtype=like.dtype)
            for i, channels in zip(self.out_indices, self.channels, strict=True)
        }


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
    norm = _declared_norm(backbone.model)
    official_norm = re.compile(re.escape(norm.key if norm else "").replace(r"\{\}", r"(\d+)") + r"\.(\w+)")
    matches = {key: official_norm.fullmatch(key) for key in state_dict}
    rest = {key: value for key, value in state_dict.items() if not matches[key]}
    convert = getattr(_family(backbone.model), "checkpoint_filter_fn", None)
    if convert is not None and not backbone.has_own_names(rest):
        rest = convert(rest, backbone.model)
    weights = {f"model.{key}": value for key, value in rest.items() if not backbone.is_removed(key)}
    norms = {f"norms.{m[1]}.{m[2]}": state_dict[key] for key, m in matches.items() if m and m[1] in backbone.norms}
    own_norms = {f"norms.{key}": value for key, value in backbone.norms.state_dict().items()}
    return weights | (norms or own_norms)


def _family(model: nn.Module) -> Any:
    """The module that defines the model's class, with its constants and key mapping."""
    return sys.modules[type(model).__module__]


def _declared_norm(model: nn.Module) -> OutputNorm | None:
    family = _family(model)
    if hasattr(family, "DENSE_NORM_EPS"):
        return OutputNorm(family.DENSE_NORM_KEY, family.DENSE_NORM_EPS)
    return _TIMM_NORMS.get(family.__name__)
