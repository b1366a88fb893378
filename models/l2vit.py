"""L2ViT: blocks of window attention and of linear global attention take turns.

Paper: Zheng, "The Linear Attention Resurrection in Vision Transformer", arXiv 2501.16182.
Upstream: github.com/ChuanyangZheng/L2ViT at fad0341 (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import ClassifierHead, DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.layers.conv import Conv2d
from vitrail.layers.linear import LinearAttention, LocalConcentration
from vitrail.layers.mlp import Mlp
from vitrail.layers.norm import LayerNorm, LayerNorm2d
from vitrail.layers.stem import ImageConv2d
from vitrail.layers.window import WindowAttention
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_drop_path, check_stages, pad_to_multiple
from vitrail.models._registry import imagenet_cfg, shipped_cfgs
from vitrail.models._weights import build_model_with_cfg
from vitrail.models.davit import AttentionBlock, ConvPosEnc, Downsample

__all__ = ["L2ViT"]

DENSE_NORM_KEY = "norm{}"  # the output norm of a stage in the author's detectors and segmenters
DENSE_NORM_EPS = 1e-5
_NORM_EPS = 1e-5
torch.fx.wrap("pad_to_multiple")


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, then LayerNorm: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4), rounded up."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Sequential(
            ImageConv2d(in_chans, dim // 2, 3, 2, 1, **factory),
            nn.BatchNorm2d(dim // 2, **factory),
            nn.ReLU(),
            Conv2d(dim // 2, dim, 3, 2, 1, **factory),
            nn.BatchNorm2d(dim, **factory),
        )
        self.norm = LayerNorm2d(dim, eps=_NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(pad_to_multiple(x, 4)))


class GlobalBlock(nn.Module):
    """Position encoding, linear attention, local concentration, MLP, on (B, H, W, C).

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP in multiples of C.
        drop_path: Chance to skip a residual branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cpe1 = ConvPosEnc(dim, **factory)
        self.norm1 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.attn = LinearAttention(dim, num_heads, **factory)
        self.norm3 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.local_mp = LocalConcentration(dim, **factory)
        self.norm2 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class L2ViT(HierarchicalBackbone):
    """Vision transformer of local and of linear global attention, for images of any height and width.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        depths: Blocks in each stage: the even ones attend inside windows, the odd ones to the whole map.
        dims: Channels of each stage.
        num_heads: Attention heads of each stage.
        window_size: Window height and width in tokens.
        mlp_ratio: Width of the MLPs in multiples of the channels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance to skip the residual branches of the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A count, size or rate is out of range, or the per-stage lists differ in length.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages(depths, dims, num_heads=num_heads)
        check_drop_path(drop_path_rate)
        super().__init__(in_chans, num_classes, dims, [4 * 2**i for i in range(len(dims))], drop_rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = Stem(in_chans, dims[0], **factory)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for index, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            blocks: list[nn.Module] = []
            for place in range(depth):
                if place % 2 == 0:
                    window = WindowAttention(dim, heads, window_size, **factory)
                    blocks.append(AttentionBlock(dim, window, mlp_ratio, next(rates), **factory))
                else:
                    blocks.append(GlobalBlock(dim, heads, mlp_ratio, next(rates), **factory))
            downsample = Downsample(dims[index - 1], dim, **factory) if index > 0 else nn.Identity()
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=_NORM_EPS, **factory)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **factory)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: linear layers and convolutions normal with deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                module.reset_parameters()
            elif isinstance(module, LinearAttention):
                module.reset_temperature()

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, window_size: int | Sequence[int] | None = None
    ) -> None:
        """Changes the window; the image may have any size at any time.

        Args:
            img_size: Accepted for timm's interface; no parameter depends on it.
            window_size: New window height and width in tokens.

        Raises:
            ValueError: `window_size` is not positive.
        """
        if window_size is None:
            return
        window = to_pair("set_input_size", "window_size", window_size, 1)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.window_size = window


_OFFICIAL_KEYS = (
    (r"^downsample_layers\.0\.proj\.proj\.", "stem.conv."),
    (r"^downsample_layers\.0\.norm\.", "stem.norm."),
    (r"^downsample_layers\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames the parameters of an official checkpoint; own names pass unchanged.

    Args:
        state_dict: Checkpoint of the author or of this model, alone or under "state_dict" or "model".
        model: The model that will load it.
    """
    return rename_keys(unwrap(state_dict), _OFFICIAL_KEYS)


_BASE = {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_VARIANTS: dict[str, dict[str, Any]] = {
    "l2vit_n": {"depths": (2, 2, 2), "dims": (48, 96, 192), "num_heads": (3, 6, 12), "window_size": 4},
    "l2vit_t": {"depths": (2, 2, 6, 2)},
    "l2vit_s": {"depths": (2, 2, 18, 2)},
    "l2vit_b": _BASE,
    "l2vit_b_384": {**_BASE, "window_size": 12},
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "first_conv": "stem.conv.0",
            "license": "mit",
            "origin_url": "https://github.com/ChuanyangZheng/L2ViT",
            "paper_ids": "arXiv:2501.16182",
            **kwargs,
        }
    )


_RELEASE = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0"
default_cfgs = generate_default_cfgs(
    {
        **shipped_cfgs(_cfg, "l2vit_n", "digits", pool_size=(2, 2)),
        "l2vit_t.in1k": _cfg(url=f"{_RELEASE}/L2ViT-Tiny-checkpoint-best-ema.pth"),
        "l2vit_s.in1k": _cfg(url=f"{_RELEASE}/L2ViT-Small-checkpoint-best-ema.pth"),
        "l2vit_b.in1k": _cfg(url=f"{_RELEASE}/L2ViT-Base-checkpoint-best-ema.pth"),
        "l2vit_b_384": _cfg(
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
            notes=("The author's release holds files named L2ViT-Base-22k-*: download the one for 384 by hand.",),
        ),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> L2ViT:
    arguments = {**_VARIANTS[variant], **kwargs}
    n_stages = len(arguments.get("dims", (96, 192, 384, 768)))
    return build_model_with_cfg(
        L2ViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(n_stages))},
        **arguments,
    )


@register_model
def l2vit_n(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """A small L2ViT of ours for 32-pixel images."""
    return _create("l2vit_n", pretrained, **kwargs)


@register_model
def l2vit_t(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-Tiny: 28.6M parameters, 4.7 GMACs at 224."""
    return _create("l2vit_t", pretrained, **kwargs)


@register_model
def l2vit_s(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-Small: 50.2M parameters, 9.0 GMACs at 224."""
    return _create("l2vit_s", pretrained, **kwargs)


@register_model
def l2vit_b(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-Base: 88.6M parameters, 15.8 GMACs at 224."""
    return _create("l2vit_b", pretrained, **kwargs)


@register_model
def l2vit_b_384(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-Base with window 12 for 384: 88.6M parameters, 47.3 GMACs at 384."""
    return _create("l2vit_b_384", pretrained, **kwargs)
