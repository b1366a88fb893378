"""ELA networks: ResNet and MobileNetV2 with efficient local attention in every block.

Paper: Xu and Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", arXiv 2403.01123.
Upstream: github.com/Xuwei86/ELA_Code at cd4594d (no licence file, no weights). The networks are timm's own, with the
attention in the slot `se` of their blocks, so that timm's weights load and the attention alone is new.

Where the attention sits follows the author's code. The paper's tables of ResNets do not tell the place; the stage-level
attention of the author's classification ResNet, which nothing in the author's repository runs, is left out.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from vitrail.layers.strip import FORMS, EfficientLocalAttention
from vitrail.models._checkpoint import UntrainedPartWarning, rename_keys, unwrap
from vitrail.models._registry import imagenet_cfg, shipped_cfgs
from vitrail.models._weights import build_model_with_cfg

__all__ = ["ElaBottleneck", "ElaMobileNetV2", "ElaResNet"]


class ElaBottleneck(Bottleneck):
    """timm's bottleneck with the attention between the 3x3 convolution and the last one, on the narrow map.

    Args:
        *args: Of timm's `Bottleneck`.
        attn_layer: Makes the attention from a number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: Of timm's `Bottleneck`.
    """

    def __init__(
        self,
        *args: Any,
        attn_layer: type[nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.se = attn_layer(self.conv2.out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(self.se(x)))
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act3(x + shortcut)


class ElaResNet(ResNet):
    """timm's ResNet with efficient local attention in every block, for images of any height and width.

    Basic blocks have it behind their last normalisation, bottlenecks before their last convolution.

    Args:
        layers: Blocks in each stage.
        bottleneck: Build bottlenecks, not basic blocks.
        form: Form of the attention, "t", "b", "s" or "l".
        skip: Add the attention's input to its output.
        **kwargs: Of timm's `ResNet`: `num_classes`, `in_chans`, `output_stride`, `drop_path_rate`, `stem_type`, ...

    Raises:
        ValueError: `form` is unknown, or its groups do not divide the width of a block.
        TypeError: timm's `ResNet` does not know an argument.
    """

    def __init__(
        self,
        layers: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        form: str = "l",
        skip: bool = True,
        **kwargs: Any,
    ) -> None:
        attention = partial(EfficientLocalAttention, form=form, skip=skip)
        block = ElaBottleneck if bottleneck else BasicBlock
        super().__init__(block, tuple(layers), block_args={"attn_layer": attention}, **kwargs)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Draws all weights anew: 2-D convolutions as timm's `ResNet` does, the rest as PyTorch does.

        Args:
            zero_init_last: Let every block start as its shortcut.
        """
        _reset_parameters(self)
        super().init_weights(zero_init_last)


class ElaMobileNetV2(EfficientNet):
    """timm's MobileNetV2 with efficient local attention before the projection of every expanding block.

    For images of any height and width.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        form: Form of the attention, "b", "s" or "l"; the groups of "t" do not divide the standard widths.
        skip: Add the attention's input to its output.
        channel_multiplier: Factor on all widths.
        output_stride: 32, or 16 or 8 for dilated convolutions in place of the last strides.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance to skip a block's residual branch; it grows linearly from 0 at the first block.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `form` is unknown, or its groups do not divide the width of a block.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        form: str = "l",
        skip: bool = False,
        channel_multiplier: float = 1.0,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        round_width = partial(round_channels, multiplier=channel_multiplier)
        super().__init__(
            decode_arch_def([[stage] for stage in _MOBILENET_STAGES]),
            num_classes=num_classes,
            num_features=max(1280, round_width(1280)),
            in_chans=in_chans,
            stem_size=32,
            output_stride=output_stride,
            act_layer=nn.ReLU6,
            round_chs_fn=round_width,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=global_pool,
            device=device,
            dtype=dtype,
        )
        for block in self.modules():
            if isinstance(block, InvertedResidual):
                block.se = EfficientLocalAttention(block.conv_dw.out_channels, form, skip, device=device, dtype=dtype)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew as the author does.

        2-D convolutions and the classifier are normal, the rest is as PyTorch draws it.
        """
        _reset_parameters(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


def _reset_parameters(model: nn.Module) -> None:
    """Draws the parameters of all of PyTorch's layers as PyTorch does."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()


_MOBILENET_STAGES = (
    "ds_r1_k3_s1_c16",
    "ir_r2_k3_s2_e6_c24",
    "ir_r3_k3_s2_e6_c32",
    "ir_r4_k3_s2_e6_c64",
    "ir_r3_k3_s1_e6_c96",
    "ir_r3_k3_s2_e6_c160",
    "ir_r1_k3_s1_e6_c320",
)
_OFFICIAL_RESNET_KEYS = ((r"^(layer\d+\.\d+)\.feat[01]\.", r"\1.se."),)
_OFFICIAL_STEM_AND_HEAD_KEYS = (
    (r"^features\.0\.0\.", "conv_stem."),
    (r"^features\.0\.1\.", "bn1."),
    (r"^conv\.0\.", "conv_head."),
    (r"^conv\.1\.", "bn2."),
    (r"^classifier\.1\.", "classifier."),
)
_OFFICIAL_FIRST_BLOCK = {0: "conv_dw", 1: "bn1", 3: "conv_pw", 4: "bn2"}
_OFFICIAL_BLOCK = {0: "conv_pw", 1: "bn1", 3: "conv_dw", 4: "bn2", 6: "se", 7: "conv_pwl", 8: "bn3"}


def _official_mobilenet_keys(model: ElaMobileNetV2) -> list[tuple[str, str]]:
    """The author counts all blocks through and numbers the layers inside a block; timm counts by stage and names."""
    rules = list(_OFFICIAL_STEM_AND_HEAD_KEYS)
    paths = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    for number, path in enumerate(paths, start=1):
        names = _OFFICIAL_FIRST_BLOCK if number == 1 else _OFFICIAL_BLOCK
        rules += [(rf"^features\.{number}\.conv\.{i}\.", f"{path}.{name}.") for i, name in names.items()]
    return rules


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Fits a checkpoint of the author, of timm's plain network or of this model to `model`.

    A checkpoint without any attention parameters gets those of `model`: what timm trained, with the attention as it
    was initialised, to be fine-tuned; an `UntrainedPartWarning` says so.

    Args:
        state_dict: The checkpoint, alone or under "state_dict" or "model".
        model: The model that will load it.

    Raises:
        ValueError: The checkpoint has some of the attention parameters but not all.
    """
    rules = _official_mobilenet_keys(model) if isinstance(model, ElaMobileNetV2) else _OFFICIAL_RESNET_KEYS
    weights = rename_keys(unwrap(state_dict), rules)
    attention = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, EfficientLocalAttention)
        for key, value in module.state_dict().items()
    }
    missing = [key for key in attention if key not in weights]
    if not missing:
        return weights
    if len(missing) < len(attention):
        raise ValueError(
            f"the checkpoint has {len(attention) - len(missing)} of {len(attention)} parameters of the efficient "
            f"local attention; all or none are allowed, the first that is missing is {missing[0]}"
        )
    message = "the checkpoint has no efficient local attention; its parameters stay as initialised"
    warnings.warn(message, UntrainedPartWarning, stacklevel=2)
    return {**weights, **attention}


_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (2, 2, 2, 2), "bottleneck": False},
    "resnet34": {"layers": (3, 4, 6, 3), "bottleneck": False},
    "resnet50": {"layers": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"layers": (3, 4, 23, 3), "bottleneck": True},
}
_MOBILENET_FORMS = ("b", "s", "l")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "first_conv": "conv1",
            "classifier": "fc",
            "origin_url": "https://github.com/Xuwei86/ELA_Code",
            "paper_ids": "arXiv:2403.01123",
            **kwargs,
        }
    )


def _default_cfgs() -> dict[str, dict[str, Any]]:
    """For every variant: no weights by default, and timm's weights of the plain network to start fine-tuning from."""
    # The asterisk makes a tag the default only behind those with weights.
    cfgs = {}
    for backbone, form in itertools.product(_RESNETS, FORMS):
        cfgs[f"{backbone}_ela_{form}.start_a1_in1k"] = _cfg(
            hf_hub_id=f"timm/{backbone}.a1_in1k",
            license="apache-2.0",
            interpolation="bicubic",
            crop_pct=0.95,
            test_input_size=(3, 288, 288),
            test_crop_pct=1.0,
        )
        cfgs[f"{backbone}_ela_{form}.untrained*"] = _cfg()
    mobilenet_cfg = partial(_cfg, first_conv="conv_stem", classifier="classifier")
    for form in _MOBILENET_FORMS:
        cfgs[f"mobilenetv2_ela_{form}.start_ra_in1k"] = mobilenet_cfg(
            hf_hub_id="timm/mobilenetv2_100.ra_in1k", license="apache-2.0", interpolation="bicubic"
        )
        cfgs[f"mobilenetv2_ela_{form}.untrained*"] = mobilenet_cfg()
    return {**cfgs, **shipped_cfgs(mobilenet_cfg, "mobilenetv2_ela_b", "digits", pool_size=(1, 1))}


default_cfgs = generate_default_cfgs(_default_cfgs())


def _create_resnet(backbone: str, form: str, pretrained: bool, **kwargs: Any) -> ElaResNet:
    return build_model_with_cfg(
        ElaResNet,
        f"{backbone}_ela_{form}",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**_RESNETS[backbone], "form": form, **kwargs},
    )


def _create_mobilenetv2(form: str, pretrained: bool, **kwargs: Any) -> ElaMobileNetV2:
    return build_model_with_cfg(
        ElaMobileNetV2,
        f"mobilenetv2_ela_{form}",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4)},
        **{"form": form, **kwargs},
    )


@register_model
def resnet18_ela_t(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-T: 11.70M parameters, 1.81 GMACs at 224."""
    return _create_resnet("resnet18", "t", pretrained, **kwargs)


@register_model
def resnet18_ela_b(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-B: 11.71M parameters, 1.81 GMACs at 224."""
    return _create_resnet("resnet18", "b", pretrained, **kwargs)


@register_model
def resnet18_ela_s(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-S: 11.77M parameters, 1.82 GMACs at 224."""
    return _create_resnet("resnet18", "s", pretrained, **kwargs)


@register_model
def resnet18_ela_l(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-18 with ELA-L: 11.80M parameters, 1.82 GMACs at 224."""
    return _create_resnet("resnet18", "l", pretrained, **kwargs)


@register_model
def resnet34_ela_t(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-34 with ELA-T: 21.82M parameters, 3.66 GMACs at 224."""
    return _create_resnet("resnet34", "t", pretrained, **kwargs)


@register_model
def resnet34_ela_b(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-34 with ELA-B: 21.83M parameters, 3.66 GMACs at 224."""
    return _create_resnet("resnet34", "b", pretrained, **kwargs)


@register_model
def resnet34_ela_s(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-34 with ELA-S: 21.96M parameters, 3.67 GMACs at 224."""
    return _create_resnet("resnet34", "s", pretrained, **kwargs)


@register_model
def resnet34_ela_l(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-34 with ELA-L: 22.02M parameters, 3.67 GMACs at 224."""
    return _create_resnet("resnet34", "l", pretrained, **kwargs)


@register_model
def resnet50_ela_t(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-T: 25.58M parameters, 4.09 GMACs at 224."""
    return _create_resnet("resnet50", "t", pretrained, **kwargs)


@register_model
def resnet50_ela_b(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-B: 25.59M parameters, 4.09 GMACs at 224."""
    return _create_resnet("resnet50", "b", pretrained, **kwargs)


@register_model
def resnet50_ela_s(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-S: 25.72M parameters, 4.09 GMACs at 224."""
    return _create_resnet("resnet50", "s", pretrained, **kwargs)


@register_model
def resnet50_ela_l(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-50 with ELA-L: 25.78M parameters, 4.10 GMACs at 224."""
    return _create_resnet("resnet50", "l", pretrained, **kwargs)


@register_model
def resnet101_ela_t(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-T: 44.61M parameters, 7.80 GMACs at 224."""
    return _create_resnet("resnet101", "t", pretrained, **kwargs)


@register_model
def resnet101_ela_b(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-B: 44.62M parameters, 7.80 GMACs at 224."""
    return _create_resnet("resnet101", "b", pretrained, **kwargs)


@register_model
def resnet101_ela_s(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-S: 44.89M parameters, 7.81 GMACs at 224."""
    return _create_resnet("resnet101", "s", pretrained, **kwargs)


@register_model
def resnet101_ela_l(pretrained: bool = False, **kwargs: Any) -> ElaResNet:
    """ResNet-101 with ELA-L: 45.02M parameters, 7.81 GMACs at 224."""
    return _create_resnet("resnet101", "l", pretrained, **kwargs)


@register_model
def mobilenetv2_ela_b(pretrained: bool = False, **kwargs: Any) -> ElaMobileNetV2:
    """MobileNetV2 with ELA-B: 3.57M parameters, 0.30 GMACs at 224."""
    return _create_mobilenetv2("b", pretrained, **kwargs)


@register_model
def mobilenetv2_ela_s(pretrained: bool = False, **kwargs: Any) -> ElaMobileNetV2:
    """MobileNetV2 with ELA-S: 3.80M parameters, 0.31 GMACs at 224."""
    return _create_mobilenetv2("s", pretrained, **kwargs)


@register_model
def mobilenetv2_ela_l(pretrained: bool = False, **kwargs: Any) -> ElaMobileNetV2:
    """MobileNetV2 with ELA-L: 3.92M parameters, 0.31 GMACs at 224."""
    return _create_mobilenetv2("l", pretrained, **kwargs)
