"""NAT, DiNAT and DiNAT_s: every token attends to the tokens nearest to it, at growing distances.

Papers: Hassani, Walton, Li, Li, Shi, "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143; Hassani, Shi,
"Dilated Neighborhood Attention Transformer", arXiv 2209.15001. Upstream:
github.com/SHI-Labs/Neighborhood-Attention-Transformer at d334f5bb (MIT), with the attention module of NATTEN 0.14.6,
the last that computes maps smaller than kernel x dilation as the released weights expect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerScale, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.layers.conv import Conv2d
from vitrail.layers.mlp import Mlp
from vitrail.layers.neighborhood import NeighborhoodAttention
from vitrail.layers.norm import LayerNorm, LayerNorm2d
from vitrail.layers.stem import ImageConv2d
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_drop_path, check_stages
from vitrail.models._registry import imagenet_cfg, shipped_cfgs
from vitrail.models._weights import build_model_with_cfg
from vitrail.models.vsa import PatchEmbed, PatchMerging

__all__ = ["NAT"]

DENSE_NORM_KEY = "norm{}"  # the output norm of a stage in the authors' detectors and segmenters
DENSE_NORM_EPS = 1e-5
_NORM_EPS = 1e-5
_FRAMES = ("convolutions", "patches")


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, then LayerNorm: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4), rounded up."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = ImageConv2d(in_chans, dim // 2, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.conv2 = Conv2d(dim // 2, dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=_NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.conv1(x)))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2, then LayerNorm: (B, dim_in, H, W) -> (B, dim_out, H / 2, W / 2), rounded up."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.reduction = Conv2d(dim_in, dim_out, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim_out, eps=_NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class NATBlock(nn.Module):
    """Neighborhood attention, then MLP, each a residual branch, on (B, H, W, C).

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        kernel_size: Height and width of a neighborhood in tokens.
        dilation: Distance of its tokens.
        mlp_ratio: Width of the MLP in multiples of C.
        qkv_bias: Add a bias to q, k and v.
        rel_pos_bias: Learn a bias on the logits for each head and each distance.
        layer_scale: First value of the factors on both branches; None for no factors.
        drop_path: Chance to skip a residual branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int],
        mlp_ratio: float,
        qkv_bias: bool,
        rel_pos_bias: bool,
        layer_scale: float | None,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.attn = NeighborhoodAttention(
            dim, num_heads, kernel_size, dilation, qkv_bias=qkv_bias, rel_pos_bias=rel_pos_bias, **factory
        )
        self.norm2 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class NAT(HierarchicalBackbone):
    """The Neighborhood Attention Transformer and its dilated forms, for images of any height and width.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        num_heads: Attention heads of each stage.
        kernel_size: Height and width of a neighborhood in tokens.
        dilations: Dilations of each stage's blocks, repeated until all its blocks have one. No weight depends on
            them: the authors use other ones for detection and segmentation.
        mlp_ratio: Width of the MLPs in multiples of the channels.
        qkv_bias: Add a bias to q, k and v.
        rel_pos_bias: Learn a bias on the logits for each head and each distance, as all released models do.
        layer_scale: First value of the factors on the residual branches; None for no factors.
        frame: "convolutions" for NAT's overlapping stem and downsampling, "patches" for Swin's, which DiNAT_s has.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance to skip the residual branches of the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A count, size, rate or form is out of range, or the per-stage lists do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 4, 6, 5),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: Sequence[Sequence[int]] = ((1,), (1,), (1,), (1,)),
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        layer_scale: float | None = None,
        frame: str = "convolutions",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages(depths, dims, num_heads=num_heads, dilations=dilations)
        check_drop_path(drop_path_rate)
        if frame not in _FRAMES:
            raise ValueError(f"frame is {frame!r}; allowed: {', '.join(_FRAMES)}")
        for pattern, depth in zip(dilations, depths, strict=True):
            if not 1 <= len(pattern) <= depth:
                raise ValueError(f"dilations has {tuple(pattern)} for {depth} blocks; allowed: 1 to {depth} entries")
        super().__init__(in_chans, num_classes, dims, [4 * 2**i for i in range(len(dims))], drop_rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        in_patches = frame == "patches"
        self.stem = (
            PatchEmbed(in_chans, dims[0], 4, **factory) if in_patches else ConvStem(in_chans, dims[0], **factory)
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        downsample_layer = PatchMerging if in_patches else ConvDownsample
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample = downsample_layer(dims[i - 1], dim, **factory) if i > 0 else nn.Identity()
            blocks = [
                NATBlock(
                    dim,
                    num_heads[i],
                    kernel_size,
                    dilations[i][block % len(dilations[i])],
                    mlp_ratio,
                    qkv_bias,
                    rel_pos_bias,
                    layer_scale,
                    next(rates),
                    **factory,
                )
                for block in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=_NORM_EPS, **factory)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: linear layers and biases of positions normal with deviation 0.02, the rest as
        PyTorch and timm do.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.LayerNorm, LayerScale)):
                module.reset_parameters()
            elif isinstance(module, NeighborhoodAttention) and module.rpb is not None:
                nn.init.trunc_normal_(module.rpb, std=0.02)
            elif isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}


_OFFICIAL_KEYS = (
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^(?:levels|layers)\.(\d+)\.", r"stages.\1."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_TRANSFORMERS_KEYS = (
    (r"^(?:di)?nat\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turns a checkpoint of the authors, or of Hugging Face's transformers, into this model's; own names pass.

    The authors keep the downsampling at the end of the stage before.

    Args:
        state_dict: Weights, alone or under "state_dict" or "model".
        model: The model that will load it.
    """
    weights = dict(unwrap(state_dict))
    if any(".attention.self." in key for key in weights):
        weights = _from_transformers(weights)
    weights = {re.sub(r"^(?:levels|layers)\.(\d+)\.downsample\.", _next_stage, key): x for key, x in weights.items()}
    return rename_keys(weights, _OFFICIAL_KEYS)


def _next_stage(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) + 1}.downsample."


def _from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' layout: one projection to q, k and v, and a vector for each branch's layer scale."""
    read: dict[str, Tensor] = {}
    for key, value in rename_keys(weights, _TRANSFORMERS_KEYS).items():
        if key.endswith(".layer_scale_parameters"):
            prefix = key.removesuffix("layer_scale_parameters")
            read |= {f"{prefix}gamma1": value[0], f"{prefix}gamma2": value[1]}
        else:
            read[key] = value
    for key in [key for key in read if ".attn.query." in key]:
        parts = [read.pop(key.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        read[key.replace(".query.", ".qkv.")] = torch.cat(parts)
    return read


def _widths(dim: int) -> dict[str, Any]:
    """Channels and heads of the four stages; heads are 32 channels wide."""
    return {"dims": tuple(dim * 2**i for i in range(4)), "num_heads": tuple(dim // 32 * 2**i for i in range(4))}


_MINI: dict[str, Any] = {"depths": (3, 4, 6, 5), **_widths(64)}
_TINY: dict[str, Any] = {"depths": (3, 4, 18, 5), **_widths(64)}
_SMALL: dict[str, Any] = {"depths": (3, 4, 18, 5), **_widths(96), "mlp_ratio": 2.0}
_BASE: dict[str, Any] = {"depths": (3, 4, 18, 5), **_widths(128), "mlp_ratio": 2.0, "layer_scale": 1e-5}
_LARGE: dict[str, Any] = {"depths": (3, 4, 18, 5), **_widths(192), "mlp_ratio": 2.0}
_DILATED: dict[str, Any] = {"dilations": ((1, 8, 1), (1, 4), (1, 2), (1,))}
_SWIN_LIKE: dict[str, Any] = {"dilations": ((1, 8), (1, 4), (1, 2), (1,)), "mlp_ratio": 4.0, "frame": "patches"}
_VARIANTS: dict[str, dict[str, Any]] = {
    "nat_mini": _MINI,
    "nat_t": _TINY,
    "nat_s": {**_SMALL, "layer_scale": 1e-5},
    "nat_b": _BASE,
    "dinat_mini": {**_MINI, **_DILATED},
    "dinat_t": {**_TINY, **_DILATED},
    "dinat_s": {**_SMALL, **_DILATED},  # without NAT's layer scale
    "dinat_b": {**_BASE, **_DILATED},
    "dinat_l": {**_LARGE, **_DILATED},
    "dinat_l_384": {**_LARGE, "dilations": ((1, 13, 1), (1, 6), (1, 3), (1,))},
    "dinat_l_k11_384": {**_LARGE, **_DILATED, "kernel_size": 11},
    "dinat_n": {
        "depths": (1, 2, 2, 1),
        "dims": (32, 64, 128, 256),
        "num_heads": (2, 4, 8, 16),
        "kernel_size": 3,
        "dilations": ((1,), (1, 2), (1,), (1,)),
        "mlp_ratio": 3.0,
    },
    "dinats_t": {**_SWIN_LIKE, "depths": (2, 2, 6, 2), **_widths(96)},
    "dinats_s": {**_SWIN_LIKE, "depths": (2, 2, 18, 2), **_widths(96)},
    "dinats_b": {**_SWIN_LIKE, "depths": (2, 2, 18, 2), **_widths(128)},
    "dinats_l": {**_SWIN_LIKE, "depths": (2, 2, 18, 2), **_widths(192)},
    "dinats_l_384": {
        **_SWIN_LIKE,
        "depths": (2, 2, 18, 2),
        **_widths(192),
        "dilations": ((1, 13), (1, 6), (1, 3), (1,)),
    },
}


def _cfg(file: str = "", paper: str = "2209.15001", **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "url": f"https://shi-labs.com/projects/{file}" if file else "",
            "first_conv": "stem.conv1",
            "crop_pct": 0.875,
            "license": "mit",
            "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
            "paper_ids": f"arXiv:{paper}",
            **kwargs,
        }
    )


_NAT = "nat/checkpoints/CLS"
_DINAT = "dinat/checkpoints/imagenet1k"
_AT_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_PATCHES: dict[str, Any] = {"first_conv": "stem.conv"}
default_cfgs = generate_default_cfgs(
    {
        "nat_mini.shi_in1k": _cfg(f"{_NAT}/nat_mini.pth", "2204.07143"),
        "nat_t.shi_in1k": _cfg(f"{_NAT}/nat_tiny.pth", "2204.07143"),
        "nat_s.shi_in1k": _cfg(f"{_NAT}/nat_small.pth", "2204.07143"),
        "nat_b.shi_in1k": _cfg(f"{_NAT}/nat_base.pth", "2204.07143"),
        "dinat_mini.shi_in1k": _cfg(f"{_DINAT}/dinat_mini_in1k_224.pth"),
        "dinat_t.shi_in1k": _cfg(f"{_DINAT}/dinat_tiny_in1k_224.pth"),
        "dinat_s.shi_in1k": _cfg(f"{_DINAT}/dinat_small_in1k_224.pth"),
        "dinat_b.shi_in1k": _cfg(f"{_DINAT}/dinat_base_in1k_224.pth"),
        "dinat_l.shi_in22k_ft_in1k": _cfg(f"{_DINAT}/dinat_large_in22k_in1k_224.pth"),
        "dinat_l_384.shi_in22k_ft_in1k": _cfg(f"{_DINAT}/dinat_large_in22k_in1k_384.pth", **_AT_384),
        "dinat_l_k11_384.shi_in22k_ft_in1k": _cfg(f"{_DINAT}/dinat_large_in22k_in1k_384_11x11.pth", **_AT_384),
        **shipped_cfgs(_cfg, "dinat_n", "digits", pool_size=(1, 1)),
        "dinats_t.shi_in1k": _cfg(f"{_DINAT}/dinat_s_tiny_in1k_224.pth", **_PATCHES),
        "dinats_s.shi_in1k": _cfg(f"{_DINAT}/dinat_s_small_in1k_224.pth", **_PATCHES),
        "dinats_b.shi_in1k": _cfg(f"{_DINAT}/dinat_s_base_in1k_224.pth", **_PATCHES),
        "dinats_l.shi_in22k_ft_in1k": _cfg(f"{_DINAT}/dinat_s_large_in1k_224.pth", **_PATCHES),
        "dinats_l_384.shi_in22k_ft_in1k": _cfg(f"{_DINAT}/dinat_s_large_in1k_384.pth", **_PATCHES, **_AT_384),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> NAT:
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini: 20.0M parameters, 2.7 GMACs at 224."""
    return _create("nat_mini", pretrained, **kwargs)


@register_model
def nat_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny: 27.9M parameters, 4.3 GMACs at 224."""
    return _create("nat_t", pretrained, **kwargs)


@register_model
def nat_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small: 50.7M parameters, 7.8 GMACs at 224."""
    return _create("nat_s", pretrained, **kwargs)


@register_model
def nat_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base: 89.8M parameters, 13.7 GMACs at 224."""
    return _create("nat_b", pretrained, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini: 20.0M parameters, 2.7 GMACs at 224."""
    return _create("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny: 27.9M parameters, 4.3 GMACs at 224."""
    return _create("dinat_t", pretrained, **kwargs)


@register_model
def dinat_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small: 50.7M parameters, 7.8 GMACs at 224."""
    return _create("dinat_s", pretrained, **kwargs)


@register_model
def dinat_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base: 89.8M parameters, 13.7 GMACs at 224."""
    return _create("dinat_b", pretrained, **kwargs)


@register_model
def dinat_l(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large: 200.9M parameters, 30.5 GMACs at 224."""
    return _create("dinat_l", pretrained, **kwargs)


@register_model
def dinat_l_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for 384 pixels: 200.9M parameters, 89.5 GMACs at 384."""
    return _create("dinat_l_384", pretrained, **kwargs)


@register_model
def dinat_l_k11_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with kernel 11 for 384 pixels: 201.1M parameters, 92.1 GMACs at 384."""
    return _create("dinat_l_k11_384", pretrained, **kwargs)


@register_model
def dinat_n(pretrained: bool = False, **kwargs: Any) -> NAT:
    """A small DiNAT of ours with 3x3 neighborhoods, for 32-pixel images."""
    return _create("dinat_n", pretrained, **kwargs)


@register_model
def dinats_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Tiny: 28.3M parameters, 4.5 GMACs at 224."""
    return _create("dinats_t", pretrained, **kwargs)


@register_model
def dinats_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Small: 49.6M parameters, 8.7 GMACs at 224."""
    return _create("dinats_s", pretrained, **kwargs)


@register_model
def dinats_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Base: 87.8M parameters, 15.4 GMACs at 224."""
    return _create("dinats_b", pretrained, **kwargs)


@register_model
def dinats_l(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large: 196.5M parameters, 34.5 GMACs at 224."""
    return _create("dinats_l", pretrained, **kwargs)


@register_model
def dinats_l_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large for 384 pixels: 196.5M parameters, 101.3 GMACs at 384."""
    return _create("dinats_l_384", pretrained, **kwargs)
