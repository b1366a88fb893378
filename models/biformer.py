"""BiFormer: every region of the map attends to the few regions that fit it best.

Paper: Zhu, Wang, Ke, Zhang, Lau, "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023,
arXiv 2303.08810. Upstream: github.com/rayleizhu/BiFormer at 1697bbbe (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, register_notrace_module, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.layers.conv import Conv2d
from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.mlp import Mlp
from vitrail.layers.norm import LayerNorm
from vitrail.layers.routing import FullAttention, RoutingAttention
from vitrail.layers.stem import ImageConv2d
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_drop_path
from vitrail.models._registry import imagenet_cfg, shipped_cfgs
from vitrail.models._weights import build_model_with_cfg

__all__ = ["BiFormer"]

DENSE_NORM_KEY = "extra_norms.{}"  # the output norm of a stage in the authors' detectors and segmenters
DENSE_NORM_EPS = 1e-6
_FULL = -2  # the code of full attention in a list of topk


class BiFormerBlock(nn.Module):
    """Positional convolution, attention, MLP, each a residual branch, on (B, H, W, C).

    Args:
        dim: Channels C.
        attn: Attention from (B, H, W, C) to (B, H, W, C).
        mlp_ratio: Width of the MLP in multiples of C.
        pos_embed: Begin with the depth-wise 3x3 positional convolution.
        drop_path: Chance to skip a residual branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        pos_embed: bool,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv2d(dim, 3, skip=True, device=device, dtype=dtype) if pos_embed else nn.Identity()
        self.norm1 = LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), device=device, dtype=dtype)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class BiFormer(HierarchicalBackbone):
    """Vision transformer with bi-level routing attention, for images of any height and width.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        head_dim: Width of a head of the routing attention.
        n_win: Rows and columns of the region grid; 16 in the authors' detectors, 8 in their segmenters.
        topk: Routed regions in each stage; -2 for full attention (8 heads).
        mlp_ratio: Width of the MLPs in multiples of the channels.
        swin_layout: Patch stem and transitions and no positional convolution, as in `biformer_stl`.
        stem_stride: Stride of the convolutional stem, 2 or 4.
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
        depths: Sequence[int] = (4, 4, 18, 4),
        dims: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        n_win: int = 7,
        topk: Sequence[int] = (1, 4, 16, _FULL),
        mlp_ratio: float = 3.0,
        swin_layout: bool = False,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not len(depths) == len(dims) == len(topk) > 0:
            raise ValueError(f"depths {depths}, dims {dims} and topk {topk} must have one entry a stage")
        if any(k != _FULL and dim % head_dim for dim, k in zip(dims, topk, strict=True)):
            raise ValueError(f"head_dim is {head_dim}; allowed: divisors of the dims of all routed stages, {dims}")
        if stem_stride not in (2, 4):
            raise ValueError(f"stem_stride is {stem_stride}; allowed: 2 or 4")
        check_drop_path(drop_path_rate)
        super().__init__(in_chans, num_classes, dims, [stem_stride * 2**i for i in range(len(dims))], drop_rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = (
            _PatchStem(in_chans, dims[0], **factory)
            if swin_layout
            else _ConvStem(in_chans, dims[0], stem_stride, **factory)
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for index, (depth, dim, k) in enumerate(zip(depths, dims, topk, strict=True)):
            blocks = []
            for _ in range(depth):
                if k == _FULL:
                    attn: nn.Module = FullAttention(dim, 8, **factory)
                else:
                    attn = RoutingAttention(dim, dim // head_dim, n_win, k, **factory)
                blocks.append(BiFormerBlock(dim, attn, mlp_ratio, not swin_layout, next(rates), **factory))
            downsample: nn.Module = nn.Identity()
            if index > 0:
                downsample = (_patch_merge if swin_layout else _conv_merge)(dims[index - 1], dim, **factory)
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(dims[-1], **factory)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: linear layers normal with deviation 0.02, the rest as PyTorch does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
                module.reset_parameters()


class _ConvStem(nn.Sequential):
    """Two 3x3 convolutions; at stride 2 the second keeps the size."""

    def __init__(self, in_chans: int, dim: int, stride: int, **factory: Any) -> None:
        super().__init__(
            ImageConv2d(in_chans, dim // 2, 3, 2, 1, **factory),
            nn.BatchNorm2d(dim // 2, **factory),
            nn.GELU(),
            Conv2d(dim // 2, dim, 3, stride // 2, 1, **factory),
            nn.BatchNorm2d(dim, **factory),
        )


def _conv_merge(dim_in: int, dim_out: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(Conv2d(dim_in, dim_out, 3, 2, 1, **factory), nn.BatchNorm2d(dim_out, **factory))


@register_notrace_module
class _PatchStem(nn.Sequential):
    """Patches of 4 x 4 pixels. Without padding, three halvings need 32 pixels, which only an untraced check can see."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__(ImageConv2d(in_chans, dim, 4, 4, **factory), nn.BatchNorm2d(dim, **factory))

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[2], input.shape[3]
        if height < 32 or width < 32:
            raise ValueError(f"the image is {height} x {width} pixels; allowed: at least 32 in height and width")
        x = input
        for module in self:
            x = module(x)
        return x


def _patch_merge(dim_in: int, dim_out: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(dim_in, **factory), Conv2d(dim_in, dim_out, 2, 2, **factory))


_OFFICIAL_KEYS = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.wo\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames the parameters of an official checkpoint; own names pass unchanged.

    Args:
        state_dict: Checkpoint of the authors or of this model, alone or under "state_dict" or "model".
        model: The model that will load it.

    Raises:
        ValueError: The checkpoint is of the authors' NCHW rewrite, which pads differently.
    """
    state_dict = unwrap(state_dict)
    if any("qkv_linear" in key for key in state_dict):
        raise ValueError(
            "the checkpoint is of the NCHW form of BiFormer (it has 'qkv_linear' keys), which pads its maps "
            "differently and is not provided; allowed: the released tiny, small, base and STL layouts"
        )
    return rename_keys(state_dict, _OFFICIAL_KEYS)


_WIDE = (96, 192, 384, 768)
_VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_t": {"depths": (2, 2, 8, 2)},
    "biformer_s": {"depths": (4, 4, 18, 4)},
    "biformer_b": {"depths": (4, 4, 18, 4), "dims": _WIDE},
    "biformer_stl": {"depths": (2, 2, 6, 2), "dims": _WIDE, "mlp_ratio": 4.0, "swin_layout": True},
    "biformer_n": {
        "depths": (1, 1, 2, 1),
        "dims": (32, 64, 128, 256),
        "n_win": 4,
        "topk": (1, 2, 4, _FULL),
        "stem_stride": 2,
    },
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "first_conv": "stem.0",
            "license": "mit",
            "origin_url": "https://github.com/rayleizhu/BiFormer",
            "paper_ids": "arXiv:2303.08810",
            "notes": (
                "The authors keep their files on OneDrive (links in their README), where a program is refused: "
                "download one in a browser.",
            ),
            **kwargs,
        }
    )


default_cfgs = generate_default_cfgs(
    {
        "biformer_t": _cfg(),
        "biformer_s": _cfg(),
        "biformer_b": _cfg(),
        "biformer_stl": _cfg(),
        **shipped_cfgs(_cfg, "biformer_n", "cifar10", "digits", pool_size=(2, 2), notes=None),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    return build_model_with_cfg(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def biformer_t(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-Tiny: 13.1M parameters, 2.2 GMACs at 224."""
    return _create("biformer_t", pretrained, **kwargs)


@register_model
def biformer_s(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-Small: 25.5M parameters, 4.5 GMACs at 224."""
    return _create("biformer_s", pretrained, **kwargs)


@register_model
def biformer_b(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-Base: 56.8M parameters, 9.8 GMACs at 224."""
    return _create("biformer_b", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer in Swin-Tiny's layout: 28.4M parameters, 4.6 GMACs at 224."""
    return _create("biformer_stl", pretrained, **kwargs)


@register_model
def biformer_n(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """A small BiFormer of ours for 32-pixel images."""
    return _create("biformer_n", pretrained, **kwargs)
