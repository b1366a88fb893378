"""RMT: attention that decays with the Manhattan distance, axis by axis on large maps.

Paper: Fan, Huang, Chen, Liu, He, "RMT: Retentive Networks Meet Vision Transformers", CVPR 2024, arXiv 2309.11523.
Upstream: github.com/qhfan/RMT at 32ea2141.
"""

# No `from __future__ import annotations`: torch.fx copies annotations as they are, and TorchScript, which compiles
# traced models, knows types but not their names.
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerScale, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.layers.conv import Conv2d
from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.norm import LayerNorm
from vitrail.layers.retention import Retention, RetentionPosition
from vitrail.layers.stem import ImageConv2d
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_drop_path, check_stages
from vitrail.models._registry import imagenet_cfg, shipped_cfgs
from vitrail.models._weights import build_model_with_cfg

__all__ = ["RMT"]

DENSE_NORM_KEY = "extra_norms.{}"  # the output norm of a stage in the authors' detectors and segmenters
DENSE_NORM_EPS = 1e-5
_NORM_EPS = 1e-6


def conv_stem(in_chans: int, dim: int, stride: int, **factory: Any) -> nn.Sequential:
    """Four 3x3 convolutions: (B, in_chans, H, W) -> (B, dim, H / stride, W / stride), rounded up; stride is 2 or 4."""
    half = dim // 2
    return nn.Sequential(
        ImageConv2d(in_chans, half, 3, 2, 1, **factory),
        nn.BatchNorm2d(half, **factory),
        nn.GELU(),
        Conv2d(half, half, 3, 1, 1, **factory),
        nn.BatchNorm2d(half, **factory),
        nn.GELU(),
        Conv2d(half, dim, 3, stride // 2, 1, **factory),
        nn.BatchNorm2d(dim, **factory),
        nn.GELU(),
        Conv2d(dim, dim, 3, 1, 1, **factory),
        nn.BatchNorm2d(dim, **factory),
    )


def conv_downsample(dim_in: int, dim_out: int, **factory: Any) -> nn.Sequential:
    """3x3 convolution and norm: (B, dim_in, H, W) -> (B, dim_out, H / 2, W / 2), rounded up."""
    return nn.Sequential(Conv2d(dim_in, dim_out, 3, 2, 1, **factory), nn.BatchNorm2d(dim_out, **factory))


class ConvFeedForward(nn.Module):
    """MLP on (B, H, W, C) whose hidden map a depth-wise 3x3 convolution is added to.

    Args:
        dim: Channels C.
        hidden_dim: Channels of the hidden map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv2d(hidden_dim, 3, skip=True, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(self.dwconv(x))


class RMTBlock(nn.Module):
    """Positional convolution, retention, feed-forward, each a residual branch, on (B, H, W, C).

    Args:
        dim: Channels C.
        num_heads: Heads of the retention.
        decomposed: Attend along rows, then along columns.
        mlp_ratio: Width of the feed-forward in multiples of C.
        layer_scale: Initial scale of the last two branches; None for no scale.
        drop_path: Chance to skip a residual branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decomposed: bool,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos = DepthwiseConv2d(dim, 3, skip=True, **factory)
        self.norm1 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.attn = Retention(dim, num_heads, decomposed, **factory)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.norm2 = LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.ffn = ConvFeedForward(dim, int(dim * mlp_ratio), **factory)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor, decay: Tensor) -> Tensor:
        x = self.pos(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), rotation, decay)))
        return x + self.drop_path2(self.ls2(self.ffn(self.norm2(x))))


class RMTStage(Stage):
    """A stage whose blocks share the rotation and the decays of its map size, computed once."""

    def __init__(self, downsample: nn.Module, position: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__(downsample, blocks)
        self.blocks = nn.ModuleList(self.blocks)  # TorchScript would compile a Sequential's call with one argument
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
        rotation, decay = self.position(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, rotation, decay)
            else:
                x = block(x, rotation, decay)
        return x.permute(0, 3, 1, 2)


class ProjectionHead(ClassifierHead):
    """Classifier that widens every position, normalises and activates it before the pooling.

    Args:
        in_features: Channels of the map.
        hidden_features: Channels that are pooled.
        num_classes: Width of the classifier; 0 for pooled features.
        pool_type: Pooling, "" for none.
        drop_rate: Dropout before the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_features, num_classes, pool_type, drop_rate, device=device, dtype=dtype)
        self.num_features = hidden_features * self.global_pool.feat_mult()  # timm 1.0.29 does not set it
        self.proj = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(hidden_features, device=device, dtype=dtype)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> logits (B, num_classes), or what the classifier would see."""
        x = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.drop(self.global_pool(self.act(self.norm(x))))
        return x if pre_logits else self.fc(x)


class RMT(HierarchicalBackbone):
    """Vision transformer with Manhattan-decay retention, for images of any height and width.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        num_heads: Heads of each stage; a head's width must be even.
        initial_value: Decay of each stage's first head, `ln(1 - 2^-initial_value)` a step.
        heads_range: Spread of the decays over each stage's heads.
        mlp_ratios: Width of each stage's feed-forwards in multiples of its channels.
        decomposed: Stages that attend along rows, then columns, in place of all positions at once.
        layer_scale: Initial scale of the residual branches of each stage, None for none.
        projection: Channels that the head pools.
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
        depths: Sequence[int] = (3, 4, 18, 4),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        initial_value: float = 2.0,
        heads_range: Sequence[float] = (4, 4, 6, 6),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        decomposed: Sequence[bool] = (True, True, True, False),
        layer_scale: Sequence[float | None] = (None, None, None, None),
        projection: int = 1024,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages(
            depths=depths,
            dims=dims,
            num_heads=num_heads,
            heads_range=heads_range,
            mlp_ratios=mlp_ratios,
            decomposed=decomposed,
            layer_scale=layer_scale,
        )
        check_rates(stem_stride, drop_path_rate)
        super().__init__(in_chans, num_classes, dims, [stem_stride * 2**i for i in range(len(dims))], drop_rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = conv_stem(in_chans, dims[0], stem_stride, **factory)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            downsample = conv_downsample(dims[i - 1], dim, **factory) if i > 0 else nn.Identity()
            blocks = [
                RMTBlock(dim, heads, decomposed[i], mlp_ratios[i], layer_scale[i], next(rates), **factory)
                for _ in range(depth)
            ]
            position = RetentionPosition(heads, dim // heads, initial_value, heads_range[i])
            stages.append(RMTStage(downsample, position, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()  # the head normalises what it projected
        self.head = ProjectionHead(dims[-1], projection, num_classes, global_pool, drop_rate, **factory)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: linear layers normal with deviation 0.02, the rest as PyTorch does."""
        init_weights(self)


@torch.jit.ignore
def init_weights(model: nn.Module) -> None:
    """Draws the weights of RMT and its kin: linear layers normal with deviation 0.02, the rest as PyTorch does."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, LayerScale)):
            module.reset_parameters()


def check_rates(stem_stride: int, drop_path_rate: float) -> None:
    """Raises `ValueError` unless the stem can have the stride and the rate is a chance below 1."""
    if stem_stride not in (2, 4):
        raise ValueError(f"stem_stride is {stem_stride}; allowed: 2 or 4")
    check_drop_path(drop_path_rate)


_OFFICIAL_KEYS = (
    (r"^patch_embed\.proj\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.downsample\.reduction\.", ".downsample.0."),
    (r"\.downsample\.norm\.", ".downsample.1."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.retention\.", ".attn."),
    (r"\.out_proj\.", ".proj."),
    (r"\.(pos|lepe|dwconv)\.conv\.", r".\1."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^(proj|norm)\.", r"head.\1."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turns an official checkpoint into this model's layout; own names pass unchanged.

    The authors keep the downsampling at the end of the stage before, three projections for q, k and v, and the
    derived decays and angles, which are recomputed here.

    Args:
        state_dict: Checkpoint of the authors or of this model, alone or under "state_dict" or "model".
        model: The model that will load it.
    """
    weights = {}
    for key, value in unwrap(state_dict).items():
        if ".Relpos." in key:
            continue
        key = re.sub(r"^layers\.(\d+)\.downsample\.", _next_stage, key)
        weights[key] = value.flatten() if key.endswith(("gamma_1", "gamma_2")) else value
    return fuse_projections(rename_keys(weights, _OFFICIAL_KEYS))


def _next_stage(match: re.Match) -> str:
    return f"stages.{int(match[1]) + 1}.downsample."


def fuse_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins the parameters of every complete set of `q_proj`, `k_proj` and `v_proj` to those of one `qkv`."""
    fused = {}
    for key, value in weights.items():
        match = re.search(r"\.([qkv])_proj\.", key)
        parts = [re.sub(r"\.[qkv]_proj\.", f".{name}_proj.", key) for name in "qkv"]
        if match is None or not all(part in weights for part in parts):
            fused[key] = value
        elif match[1] == "q":
            fused[key.replace(".q_proj.", ".qkv.")] = torch.cat([weights[part] for part in parts])
    return fused


_WIDE = {"depths": (4, 8, 25, 8), "layer_scale": (None, None, 1e-6, 1e-6)}
_VARIANTS: dict[str, dict[str, Any]] = {
    "rmt_t": {"depths": (2, 2, 8, 2), "mlp_ratios": (3, 3, 3, 3), "decomposed": (True, True, False, False)},
    "rmt_s": {},
    "rmt_b": {"dims": (80, 160, 320, 512), "num_heads": (5, 5, 10, 16), "heads_range": (5, 5, 6, 6), **_WIDE},
    "rmt_l": {"dims": (112, 224, 448, 640), "num_heads": (7, 7, 14, 20), "heads_range": (6, 6, 6, 6), **_WIDE},
    "rmt_n": {
        "depths": (2, 2, 2, 1),
        "dims": (32, 64, 128, 256),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratios": (3, 3, 3, 3),
        "projection": 256,
        "stem_stride": 2,
    },
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "first_conv": "stem.0",
            "crop_pct": 0.875,
            "origin_url": "https://github.com/qhfan/RMT",
            "paper_ids": "arXiv:2309.11523",
            "notes": (
                "The authors keep their files on Baidu (links in their README), which wants an account: download "
                "one in a browser.",
            ),
            **kwargs,
        }
    )


default_cfgs = generate_default_cfgs(
    {
        "rmt_t": _cfg(),
        "rmt_s": _cfg(),
        "rmt_b": _cfg(),
        "rmt_l": _cfg(),
        **shipped_cfgs(_cfg, "rmt_n", "digits", pool_size=(2, 2), notes=None),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RMT:
    return build_model_with_cfg(
        RMT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def rmt_t(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-T (the authors' T3): 14.3M parameters, 2.6 GMACs at 224."""
    return _create("rmt_t", pretrained, **kwargs)


@register_model
def rmt_s(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-S: 27.0M parameters, 4.8 GMACs at 224."""
    return _create("rmt_s", pretrained, **kwargs)


@register_model
def rmt_b(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-B (the authors' M2): 54.2M parameters, 10.4 GMACs at 224."""
    return _create("rmt_b", pretrained, **kwargs)


@register_model
def rmt_l(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-L (the authors' L6): 95.5M parameters, 19.5 GMACs at 224."""
    return _create("rmt_l", pretrained, **kwargs)


@register_model
def rmt_n(pretrained: bool = False, **kwargs: Any) -> RMT:
    """A small RMT of ours for 32-pixel images."""
    return _create("rmt_n", pretrained, **kwargs)
