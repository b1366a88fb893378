"""Any model of this package or of timm as a backbone of mmdetection and mmsegmentation.

Importing this module registers `VitrailBackbone` in mmengine's root registry, where configs of any scope find it:

    custom_imports = dict(imports=["vitrail.models.mm.backbone"], allow_failed_imports=False)
    model = dict(type="EncoderDecoder", backbone=dict(type="VitrailBackbone", name="davit_t", pretrained=True), ...)
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import PatchEmbed
from timm.models import group_parameters
from torch import Tensor, nn

from vitrail.models._checkpoint import unwrap
from vitrail.models._dense import DenseBackbone, checkpoint_filter_fn
from vitrail.models.mm.checkpoint import CheckpointError, load_strictly, read_checkpoint
from vitrail.models.mm.parallel import checkpoint_blocks

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What timm's models of a fixed image size call the permission to take others; each is tried.
_SIZE_ARGUMENTS: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


@MODELS.register_module()
class VitrailBackbone(DenseBackbone, BaseModule):
    """The maps of a model's stages, for images of any height and width.

    Weights are read by `init_weights`, which mmengine calls before a training and not before a test. Checkpoints of
    whole detectors and segmenters may hold the backbone under the authors' names.

    Args:
        name: An entry point, `timm.create_model`'s first argument.
        pretrained: Start from the weights that timm fetches for `name`.
        checkpoint: Start from this file: `.safetensors` or `torch.save`, of a classifier, of a dense backbone or of a
            whole detector or segmenter, under our names, timm's or the authors'.
        out_indices: Entries of the model's `feature_info` to return; many convolutional networks of timm count their
            stem as 0.
        output_norm: Give every output a LayerNorm; None for where the family's authors do.
        frozen_stages: Freezes the stem (0), and this many stages; -1 freezes nothing. Stages are the groups of the
            model's `group_matcher`, which for plain transformers are the blocks. Frozen stages stay in eval mode.
        norm_eval: Keep batch norms in eval mode, so that running statistics stay; their weights are trained.
        with_cp: Gradient checkpointing: less memory, more compute.
        drop_path_rate: Chance to skip a residual branch; None for the model's own.
        size_divisor: For models that need images of a multiple of this: zeros are added at the bottom and right, and
            what lies beyond the image is cut off the maps.
        init_cfg: `dict(type="Pretrained", checkpoint=...)` means `checkpoint`.
        **kwargs: Of the entry point.

    Raises:
        ValueError: The name or an argument is unknown or out of range, or two sources of weights are given.
        NotImplementedError: The model lacks what an argument asks for.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        output_norm: bool | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        size_divisor: int = 1,
        init_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        checkpoint = _only_checkpoint(pretrained, checkpoint, init_cfg)
        if size_divisor < 1:
            raise ValueError(f"size_divisor is {size_divisor}; allowed: at least 1")
        arguments = dict(kwargs) if drop_path_rate is None else {**kwargs, "drop_path_rate": drop_path_rate}
        super().__init__(_create(name, arguments), out_indices, output_norm)
        self.name, self.pretrained, self.checkpoint = name, pretrained, checkpoint
        self.norm_eval = norm_eval
        self.size_divisor = size_divisor
        self._arguments = arguments
        if with_cp:
            checkpoint_blocks(self.model, "with_cp")
        self._always_eval = list(self._freeze(frozen_stages))
        self.register_load_state_dict_pre_hook(_accept_official)
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, in_chans, H, W) -> one (B, C, h, w) for each of `out_indices`."""
        height, width = x.shape[2:]
        pad_h, pad_w = -height % self.size_divisor, -width % self.size_divisor
        if not pad_h and not pad_w:
            return tuple(super().forward(x))
        maps = super().forward(F.pad(x, (0, pad_w, 0, pad_h)))
        return tuple(m[:, :, : -(-height // r), : -(-width // r)] for m, r in zip(maps, self.reductions, strict=True))

    def train(self, mode: bool = True) -> VitrailBackbone:
        """Sets the mode; frozen stages, and batch norms under `norm_eval`, stay in eval mode."""
        super().train(mode)
        for module in self._always_eval:
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BATCH_NORMS):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Reads the starting weights, once; the rest stays as the model made it.

        Raises:
            OSError: The file is missing, or nothing can be fetched.
            ValueError: The weights do not fit, or timm knows none.
        """
        if self.is_init:
            return
        if self.checkpoint is not None:
            self.load_weights(self.checkpoint)
        elif self.pretrained:
            self._load(_fetch(self.name, self._arguments), f"of timm's {self.name}")
        self.is_init = True

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Loads a file as the argument `checkpoint` describes.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is damaged, holds objects, or does not fit.
        """
        content = unwrap(read_checkpoint(path))
        weights = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
        inner = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
        self._load(inner or weights, path)

    def _load(self, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
        counters = {key: value for key, value in self.state_dict().items() if key.endswith("num_batches_tracked")}
        try:
            weights = checkpoint_filter_fn(weights, self)
        except (KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {source} is not one of {self.name}: {error}") from error
        load_strictly(self, counters | weights, source)

    def _freeze(self, frozen_stages: int) -> Iterator[nn.Module]:
        """Freezes parameters; yields the largest modules that hold frozen ones alone."""
        if frozen_stages < 0:
            return
        if not hasattr(self.model, "group_matcher"):
            raise NotImplementedError(f"frozen_stages: {self.name} has no group_matcher")
        groups = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        last = max(groups.values())
        if frozen_stages > last:
            raise ValueError(f"frozen_stages is {frozen_stages}; allowed for {self.name}: -1 to {last}")
        for key, parameter in self.model.named_parameters():
            if groups[key] <= frozen_stages:
                parameter.requires_grad_(False)
        yield from _frozen_modules(self.model)


def _only_checkpoint(
    pretrained: bool, checkpoint: str | os.PathLike[str] | None, init_cfg: Mapping[str, Any] | None
) -> str | os.PathLike[str] | None:
    if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}):
        raise ValueError(f"init_cfg is {dict(init_cfg)}; allowed: dict(type='Pretrained', checkpoint=FILE)")
    given = [pretrained, checkpoint is not None, init_cfg is not None]
    if sum(map(bool, given)) > 1:
        raise ValueError("give one source of weights: pretrained=True, checkpoint or init_cfg")
    return init_cfg["checkpoint"] if init_cfg else checkpoint


def _create(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        raise ValueError(f"backbone name is {name!r}, which timm does not know; near: {', '.join(near) or 'none'}")
    for size_arguments in _SIZE_ARGUMENTS:
        try:
            model = timm.create_model(name, num_classes=0, **{**size_arguments, **arguments})
        except TypeError as error:
            if not any(argument in str(error) for argument in size_arguments):
                raise ValueError(f"backbone {name!r}: {error}") from error
        else:
            break
    for module in model.modules():
        if isinstance(module, PatchEmbed):
            module.dynamic_img_pad = True
    return model


def _fetch(name: str, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **arguments).state_dict()
    except RuntimeError as error:
        raise ValueError(f"pretrained weights of {name}: {error}; give checkpoint=FILE") from error


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
    else:
        for child in module.children():
            yield from _frozen_modules(child)


def _accept_official(module: VitrailBackbone, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the authors' weights under `prefix` in place, before they are loaded."""
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    if not names or any(name.startswith("model.") for name in names):
        return
    official = {name: state_dict.pop(prefix + name) for name in names}
    for name, value in checkpoint_filter_fn(official, module).items():
        state_dict[prefix + name] = value
