"""DaViT: blocks of window attention and of channel attention take turns.

Paper: Ding, Xiao, Codella, Luo, Wang, Yuan, "DaViT: Dual Attention Vision Transformers", ECCV 2022, arXiv 2204.03645.
Upstream: github.com/dingmyu/davit at fc79470d (MIT); timm's `davit_*` compute the same function, and the parameters
here carry timm's names, so that weights of either load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers import DropPath, NormMlpClassifierHead, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.layers.channel import ChannelAttention
from vitrail.layers.conv import Conv2d
from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.mlp import Mlp
from vitrail.layers.norm import LayerNorm, LayerNorm2d
from vitrail.layers.stem import ImageConv2d
from vitrail.layers.window import WindowAttention
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_drop_path, check_stages, pad_to_multiple
from vitrail.models._registry import imagenet_cfg
from vitrail.models._weights import build_model_with_cfg

__all__ = ["DaViT"]

DENSE_NORM_KEY = "norm{}"  # the output norm of a stage in the authors' detectors and segmenters
DENSE_NORM_EPS = 1e-5
torch.fx.wrap("pad_to_multiple")
_NORM_EPS = 1e-5


class Stem(nn.Module):
    """Overlapping 7x7 convolution of stride 4, then LayerNorm: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4)."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = ImageConv2d(in_chans, dim, 7, stride=4, padding=3, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=_NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(pad_to_multiple(x, 4)))


class Downsample(nn.Module):
    """LayerNorm, then a 2x2 convolution of stride 2: (B, dim_in, H, W) -> (B, dim_out, H / 2, W / 2), rounded up.

    The map is padded behind the norm, so that the padding is true zeros.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim_in, eps=_NORM_EPS, device=device, dtype=dtype)
        self.conv = Conv2d(dim_in, dim_out, 2, stride=2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad_to_multiple(self.norm(x), 2))


class ConvPosEnc(nn.Module):
    """Conditional position encoding: adds a depth-wise 3x3 convolution of the map to itself, on (B, H, W, C)."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.proj = DepthwiseConv2d(dim, 3, skip=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class AttentionBlock(nn.Module):
    """Position encoding, attention, position encoding, MLP, on (B, H, W, C).

    Spatial and channel blocks differ in the attention alone.

    Args:
        dim: Channels C.
        attn: Attention from (B, H, W, C) to (B, H, W, C).
        mlp_ratio: Width of the MLP in multiples of C.
        drop_path: Chance to skip a residual branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cpe1 = ConvPosEnc(dim, device=device, dtype=dtype)
        self.norm1 = LayerNorm(dim, eps=_NORM_EPS, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2 = ConvPosEnc(dim, device=device, dtype=dtype)
        self.norm2 = LayerNorm(dim, eps=_NORM_EPS, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), device=device, dtype=dtype)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class DaViT(HierarchicalBackbone):
    """Dual attention vision transformer, for images of any height and width.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        depths: Pairs of a spatial and a channel block in each stage.
        dims: Channels of each stage.
        num_heads: Heads of the window attention and groups of the channel attention in each stage.
        window_size: Window height and width in tokens.
        mlp_ratio: Width of the MLPs in multiples of the channels.
        qkv_bias: Add a bias to q, k and v.
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
        depths: Sequence[int] = (1, 1, 3, 1),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
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
        rates = iter(torch.linspace(0, drop_path_rate, 2 * sum(depths), device="cpu").tolist())
        stages = []
        for index, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            pairs = []
            for _ in range(depth):
                window = WindowAttention(dim, heads, window_size, qkv_bias=qkv_bias, **factory)
                channel = ChannelAttention(dim, heads, qkv_bias=qkv_bias, **factory)
                blocks = [AttentionBlock(dim, attn, mlp_ratio, next(rates), **factory) for attn in (window, channel)]
                pairs.append(nn.Sequential(*blocks))
            downsample = Downsample(dims[index - 1], dim, **factory) if index > 0 else nn.Identity()
            stages.append(Stage(downsample, pairs))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()  # the head normalises what it pooled
        self.head = NormMlpClassifierHead(
            dims[-1],
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=_NORM_EPS),
            **factory,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: linear layers normal with deviation 0.02, the rest as PyTorch does."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

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
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.(\d+)\.(\d+)\.cpe\.0\.", r"stages.\1.blocks.\2.\3.cpe1."),
    (r"^main_blocks\.(\d+)\.(\d+)\.(\d+)\.cpe\.1\.", r"stages.\1.blocks.\2.\3.cpe2."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames the parameters of an official checkpoint; own names (which are timm's) pass unchanged.

    Args:
        state_dict: Checkpoint of the authors, of timm or of this model, alone or under "state_dict" or "model".
        model: The model that will load it.
    """
    return rename_keys(unwrap(state_dict), _OFFICIAL_KEYS)


_VARIANTS: dict[str, dict[str, Any]] = {
    "davit_t": {"depths": (1, 1, 3, 1), "dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)},
    "davit_s": {"depths": (1, 1, 9, 1), "dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)},
    "davit_b": {"depths": (1, 1, 9, 1), "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)},
    "davit_l": {
        "depths": (1, 1, 9, 1),
        "dims": (192, 384, 768, 1536),
        "num_heads": (6, 12, 24, 48),
        "window_size": 12,
    },
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "first_conv": "stem.conv",
            "license": "apache-2.0",
            "origin_url": "https://github.com/dingmyu/davit",
            "paper_ids": "arXiv:2204.03645",
            **kwargs,
        }
    )


default_cfgs = generate_default_cfgs(
    {
        "davit_t.msft_in1k": _cfg(hf_hub_id="timm/davit_tiny.msft_in1k"),
        "davit_s.msft_in1k": _cfg(hf_hub_id="timm/davit_small.msft_in1k"),
        "davit_b.msft_in1k": _cfg(hf_hub_id="timm/davit_base.msft_in1k"),
        "davit_l": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DaViT:
    return build_model_with_cfg(
        DaViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def davit_t(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-Tiny: 28.4M parameters, 4.5 GMACs at 224."""
    return _create("davit_t", pretrained, **kwargs)


@register_model
def davit_s(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-Small: 49.7M parameters, 8.8 GMACs at 224."""
    return _create("davit_s", pretrained, **kwargs)


@register_model
def davit_b(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-Base: 88.0M parameters, 15.5 GMACs at 224."""
    return _create("davit_b", pretrained, **kwargs)


@register_model
def davit_l(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-Large with window 12 for 384: 196.8M parameters, 103 GMACs at 384."""
    return _create("davit_l", pretrained, **kwargs)
