"""Gated-SwinRMT: gated retention inside shifted windows, built on RMT. Unofficial: a reading of the paper's abstract.

Paper: Maity, Mondal, Roy, "Gated-SwinRMT: Unifying Swin Windowed Attention with Retentive Manhattan Decay via
Input-Dependent Gating", 2026, arXiv 2604.06014. Only the abstract and the first lines of the introduction could be
read, and no code was found. What they leave open we filled in from RMT, Swin and SWAT; nobody has checked it against
the paper's body. Depths, widths, heads and window are ours. Every open choice is an argument of the model or, through
`attention_options`, of `vitrail.layers.gated_retention`, with the reading that we recommend as its default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerScale
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.gated_retention import GatedRetention, SwatRetention
from vitrail.layers.norm import LayerNorm, LayerNorm2d
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_stages
from vitrail.models._registry import imagenet_cfg, shipped_cfgs
from vitrail.models._weights import build_model_with_cfg
from vitrail.models.rmt import (
    ConvFeedForward,
    ProjectionHead,
    check_rates,
    conv_downsample,
    conv_stem,
    fuse_projections,
    init_weights,
)

__all__ = ["GatedSwinRMT"]

_NORM_EPS = 1e-6
_ATTENTIONS = {"swat": SwatRetention, "retention": GatedRetention}


class GatedSwinRMTBlock(nn.Module):
    """Positional convolution, gated retention, feed-forward, each a residual branch, on (B, H, W, C).

    Args:
        dim: Channels C.
        attn: Attention from the normalised map and the map itself, (B, H, W, C) each, to (B, H, W, C).
        mlp_ratio: Width of the feed-forward in multiples of C.
        layer_scale: Initial scale of the last two branches; None for no scale.
        drop_path: Chance to skip a residual branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos = DepthwiseConv2d(dim, 3, skip=True, **factory)
        self.norm1 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.norm2 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.ffn = ConvFeedForward(dim, int(dim * mlp_ratio), **factory)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), x)))
        return x + self.drop_path2(self.ls2(self.ffn(self.norm2(x))))


class GatedSwinRMT(HierarchicalBackbone):
    """Vision transformer with gated retention in shifted windows, for images of any height and width.

    A reading of the paper's abstract, not a port: see the module.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        attention: "swat" (sigmoid, gated values) or "retention" (softmax, gated output).
        depths: Blocks of each stage; windows of every second block are shifted by half.
        dims: Channels of each stage.
        num_heads: Heads of each stage.
        window_size: Window height and width in tokens; smaller maps are attended whole.
        initial_value: Decay of each stage's first head, `ln(1 - 2^-initial_value)` a step.
        heads_range: Spread of the decays over each stage's heads.
        decomposed: Stages that attend along rows, then columns, in place of the whole window at once.
        mlp_ratios: Width of each stage's feed-forwards in multiples of its channels.
        layer_scale: Initial scale of the residual branches, None for none.
        attention_options: More arguments of the attention layer: the choices that the abstract leaves open, such as
            `{"gate_target": "output"}`; see `SwatRetention` and `GatedRetention`.
        projection: Channels that RMT's head pools; None for a norm, pooling and the classifier.
        stem_stride: Stride of the convolutional stem, 2 or 4.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance to skip the residual branches of the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: `attention_options` has a name that the attention layer does not take.
        ValueError: A count, size or rate is out of range, a choice is unknown, or the lists differ in length.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        attention: str = "swat",
        depths: Sequence[int] = (2, 2, 22, 4),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (4, 8, 12, 24),
        window_size: int | Sequence[int] = 7,
        initial_value: float = 2.0,
        heads_range: Sequence[float] = (4, 4, 6, 6),
        decomposed: Sequence[bool] = (True, True, True, True),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        layer_scale: float | None = 1e-6,
        attention_options: Mapping[str, Any] | None = None,
        projection: int | None = None,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if attention not in _ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; allowed: {', '.join(_ATTENTIONS)}")
        check_stages(
            depths=depths,
            dims=dims,
            num_heads=num_heads,
            heads_range=heads_range,
            decomposed=decomposed,
            mlp_ratios=mlp_ratios,
        )
        check_rates(stem_stride, drop_path_rate)
        super().__init__(in_chans, num_classes, dims, [stem_stride * 2**i for i in range(len(dims))], drop_rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = conv_stem(in_chans, dims[0], stem_stride, **factory)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        window = to_pair("GatedSwinRMT", "window_size", window_size, 1)
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = []
            for block in range(depth):
                attn = _ATTENTIONS[attention](
                    dim,
                    num_heads[i],
                    window,
                    _shift(window, block),
                    initial_value=initial_value,
                    heads_range=heads_range[i],
                    decomposed=decomposed[i],
                    **(attention_options or {}),
                    **factory,
                )
                blocks.append(GatedSwinRMTBlock(dim, attn, mlp_ratios[i], layer_scale, next(rates), **factory))
            downsample = conv_downsample(dims[i - 1], dim, **factory) if i > 0 else nn.Identity()
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        if projection is None:
            self.norm: nn.Module = LayerNorm2d(dims[-1], eps=_NORM_EPS, **factory)
            self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        else:
            self.norm = nn.Identity()  # the head normalises what it projected
            self.head = ProjectionHead(dims[-1], projection, num_classes, global_pool, drop_rate, **factory)
            self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: linear layers normal with deviation 0.02, the rest as PyTorch does."""
        init_weights(self)
        for module in self.modules():
            if isinstance(module, GatedRetention):
                module.reset_gate_bias()

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, window_size: int | Sequence[int] | None = None
    ) -> None:
        """Changes the window and its shift; the image may have any size at any time.

        Args:
            img_size: Accepted for timm's interface; no parameter depends on it.
            window_size: New window height and width in tokens.

        Raises:
            ValueError: `window_size` is not positive.
        """
        if window_size is None:
            return
        window = to_pair("set_input_size", "window_size", window_size, 1)
        for stage in self.stages:
            for index, block in enumerate(stage.blocks):
                block.attn.window_size, block.attn.shift_size = window, _shift(window, index)


def _shift(window: tuple[int, int], block: int) -> tuple[int, int]:
    """Half a window in every second block."""
    return (window[0] // 2, window[1] // 2) if block % 2 else (0, 0)


_RENAMED_KEYS = (
    (r"(^|\.)attn\.(v_gate|g_proj)\.", r"\1attn.gate."),
    (r"(^|\.)attn\.out_proj\.", r"\1attn.proj."),
    (r"(^|\.)(pos|lce|dwconv)\.conv\.", r"\1\2."),
    (r"(^|\.)gamma_([12])$", r"\1ls\2.gamma"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turns a checkpoint in RMT's naming of a block's parts into this model's layout; own names pass unchanged.

    There is no official checkpoint. The naming is that of a plain implementation after RMT: one projection each for
    q, k and v, `out_proj`, `v_gate` or `g_proj`, `lce.conv`, `gamma_1`.

    Args:
        state_dict: Checkpoint of such an implementation or of this model, alone or under "state_dict" or "model".
        model: The model that will load it.
    """
    return rename_keys(fuse_projections(unwrap(state_dict)), _RENAMED_KEYS)


_SMALL = {
    "depths": (2, 2, 2, 1),
    "dims": (32, 64, 128, 256),
    "num_heads": (2, 4, 8, 16),
    "window_size": 4,
    "mlp_ratios": (3, 3, 3, 3),
    "layer_scale": None,
    "stem_stride": 2,
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "gated_swinrmt_swat": {"attention": "swat"},
    "gated_swinrmt_retention": {"attention": "retention", "num_heads": (3, 6, 12, 24)},
    "gated_swinrmt_swat_n": {"attention": "swat", **_SMALL},
    "gated_swinrmt_retention_n": {"attention": "retention", **_SMALL},
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "first_conv": "stem.0",
            "crop_pct": 0.875,
            "license": "apache-2.0",
            "paper_ids": "arXiv:2604.06014",
            **kwargs,
        }
    )


default_cfgs = generate_default_cfgs(
    {
        "gated_swinrmt_swat": _cfg(),
        "gated_swinrmt_retention": _cfg(),
        **shipped_cfgs(_cfg, "gated_swinrmt_swat_n", "digits", pool_size=(2, 2)),
        **shipped_cfgs(_cfg, "gated_swinrmt_retention_n", "digits", pool_size=(2, 2)),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GatedSwinRMT:
    return build_model_with_cfg(
        GatedSwinRMT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def gated_swinrmt_swat(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Our reading of Gated-SwinRMT-SWAT, in a size of ours: 78.9M parameters with 100 classes."""
    return _create("gated_swinrmt_swat", pretrained, **kwargs)


@register_model
def gated_swinrmt_retention(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """Our reading of Gated-SwinRMT-Retention, in a size of ours: 78.9M parameters with 100 classes."""
    return _create("gated_swinrmt_retention", pretrained, **kwargs)


@register_model
def gated_swinrmt_swat_n(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """A small SWAT form for 32-pixel images, in a size of ours."""
    return _create("gated_swinrmt_swat_n", pretrained, **kwargs)


@register_model
def gated_swinrmt_retention_n(pretrained: bool = False, **kwargs: Any) -> GatedSwinRMT:
    """A small Retention form for 32-pixel images, in a size of ours."""
    return _create("gated_swinrmt_retention_n", pretrained, **kwargs)
