"""Swin with varied-size window attention (VSA), and its plain twins with Swin's own shifted windows.

Paper: Zhang, Xu, Zhang, Tao, "VSA: Learning Varied-Size Window Attention in Vision Transformers", ECCV 2022,
arXiv 2204.08446. The authors published no Swin-based model then; what is computed here is the class of their later
repository, github.com/ViTAE-Transformer/QFormer at 8aabe08e (MIT), for which no weights are public.
The twins compute Swin (Liu et al., ICCV 2021, arXiv 2103.14030) and load timm's and the authors' weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import ClassifierHead, DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.mlp import Mlp
from vitrail.layers.norm import LayerNorm, LayerNorm2d
from vitrail.layers.stem import ImageConv2d
from vitrail.layers.varied_window import VariedWindowAttention
from vitrail.layers.window import WindowAttention
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_drop_path, check_stages, pad_to_multiple
from vitrail.models._registry import imagenet_cfg, shipped_cfgs
from vitrail.models._weights import build_model_with_cfg

__all__ = ["VSASwin"]

DENSE_NORM_KEY = "norm{}"  # the output norm of a stage in Swin's detectors and segmenters
DENSE_NORM_EPS = 1e-5
_NORM_EPS = 1e-5
_ATTENTIONS = ("varied", "shifted")
torch.fx.wrap("pad_to_multiple")


class PatchEmbed(nn.Module):
    """Convolution of patches, then LayerNorm: (B, in_chans, H, W) -> (B, dim, H / size, W / size), rounded up."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv = ImageConv2d(in_chans, dim, patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=_NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(pad_to_multiple(x, self.patch_size)))


class PatchMerging(nn.Module):
    """LayerNorm and linear map of 2x2 neighbours: (B, dim_in, H, W) -> (B, dim_out, H / 2, W / 2), rounded up."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim_in, eps=_NORM_EPS, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim_in, dim_out, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2).permute(0, 2, 3, 1)
        x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3])
        # Swin's order of the neighbours: the upper left, the one below it, the one to its right, the lower right.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class VSABlock(nn.Module):
    """Positional convolution, attention, MLP, each a residual branch, on (B, H, W, C).

    Args:
        dim: Channels C.
        attn: Attention from (B, H, W, C) to (B, H, W, C).
        mlp_ratio: Width of the MLP in multiples of C.
        pos_conv: Begin with the depth-wise 7x7 positional convolution.
        drop_path: Chance to skip a residual branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        pos_conv: bool,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pos = DepthwiseConv2d(dim, 7, skip=True, device=device, dtype=dtype) if pos_conv else nn.Identity()
        self.norm1 = LayerNorm(dim, eps=_NORM_EPS, device=device, dtype=dtype)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=_NORM_EPS, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), device=device, dtype=dtype)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class VSASwin(HierarchicalBackbone):
    """Swin with varied-size or with plain and shifted windows, for images of any height and width.

    Where a map is odd or no multiple of the patch, zeros are added at the bottom and right, as Swin's detectors do.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        num_heads: Attention heads of each stage.
        window_size: Window height and width in tokens.
        mlp_ratio: Width of the MLPs in multiples of the channels.
        qkv_bias: Add a bias to q, k and v.
        attention: "varied" for VSA in every block, "shifted" for Swin's plain and shifted windows in turn.
        shift_stages: Whether a stage's windows shift at all where `attention` is "shifted"; in Swin's classifiers the
            last stage's do not, since its map of 7 x 7 tokens is one window.
        pos_conv: Begin every block with a depth-wise 7x7 positional convolution, as VSA does and Swin does not.
        padding: See `VariedWindowAttention`.
        offset_norm: See `VariedWindowAttention`.
        patch_size: Height and width of a patch in pixels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance to skip the residual branches of the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A count, size, rate or form is out of range, or the per-stage lists differ in length.
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
        qkv_bias: bool = True,
        attention: str = "varied",
        shift_stages: Sequence[bool] = (True, True, True, False),
        pos_conv: bool = True,
        padding: str = "end",
        offset_norm: str = "padded",
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages(depths=depths, dims=dims, num_heads=num_heads, shift_stages=shift_stages)
        if attention not in _ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; allowed: {', '.join(_ATTENTIONS)}")
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; allowed: at least 1")
        check_drop_path(drop_path_rate)
        super().__init__(in_chans, num_classes, dims, [patch_size * 2**i for i in range(len(dims))], drop_rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def make_attention(stage: int, block: int) -> nn.Module:
            arguments: dict[str, Any] = {"window_size": window_size, "qkv_bias": qkv_bias, **factory}
            if attention == "varied":
                arguments |= {"padding": padding, "offset_norm": offset_norm}
                return VariedWindowAttention(dims[stage], num_heads[stage], **arguments)
            layer = WindowAttention(dims[stage], num_heads[stage], rel_pos_bias=True, **arguments)
            if shift_stages[stage] and block % 2 == 1:
                layer.shift_size = (layer.window_size[0] // 2, layer.window_size[1] // 2)
            return layer

        self.stem = PatchEmbed(in_chans, dims[0], patch_size, **factory)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample = PatchMerging(dims[i - 1], dim, **factory) if i > 0 else nn.Identity()
            blocks = [
                VSABlock(dim, make_attention(i, block), mlp_ratio, pos_conv, next(rates), **factory)
                for block in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=_NORM_EPS, **factory)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: linear layers normal with deviation 0.02, the rest as PyTorch does.

        Varied windows begin as the ordinary ones: their predictions are zero.
        """
        for module in self.modules():
            if isinstance(module, (VariedWindowAttention, nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(".transform"):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions, as in Swin's recipe."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}


_OFFICIAL_KEYS = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^layers\.(\d+)\.", r"stages.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turns a checkpoint of the authors of VSA or Swin, or of timm's Swin, into this model's; own names pass unchanged.

    The authors keep the patch merging at the end of the stage before; timm keeps it where it is here.

    Args:
        state_dict: Weights, alone or under "state_dict" or "model".
        model: The model that will load it.
    """
    weights = dict(unwrap(state_dict))
    if "layers.0.downsample.reduction.weight" in weights:
        weights = {re.sub(r"^layers\.(\d+)\.downsample\.", _next_stage, key): x for key, x in weights.items()}
    return rename_keys(read_attention(weights), _OFFICIAL_KEYS)


def _next_stage(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) + 1}.downsample."


def read_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the authors' attention parameters into those of `VariedWindowAttention`, whatever stands before them.

    Derived buffers are left out, 1x1 convolutions become matrices, and the two predictions of the ViTAE-based models
    become one, in the order of the Swin-based: offset x, offset y, scale x, scale y for each head.
    """
    read = {}
    for key, value in weights.items():
        if key.endswith(("relative_position_index", "attn_mask")) or ".attn.sampling_scales." in key:
            continue
        if ".attn.sampling_offsets.2." in key:
            both = [value, weights[key.replace("sampling_offsets", "sampling_scales")]]
            value = torch.cat([x.unflatten(0, (-1, 2)) for x in both], 1).flatten(0, 1)
            key = key.replace("sampling_offsets", "transform")
        if re.search(r"\.attn\.(qkv|proj|transform\.2)\.weight$", key):
            value = value.flatten(1)
        read[key.replace(".attn.transform.2.", ".attn.transform.")] = value
    return read


_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {**_SMALL, "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_PLAIN: dict[str, Any] = {"attention": "shifted", "pos_conv": False}
_VARIANTS: dict[str, dict[str, Any]] = {
    "vsa_swin_t": {},
    "vsa_swin_s": _SMALL,
    "vsa_swin_b": _BASE,
    "vsa_swin_n": {
        "depths": (1, 1, 2, 1),
        "dims": (32, 64, 128, 256),
        "num_heads": (2, 4, 8, 16),
        "window_size": 4,
        "patch_size": 2,
    },
    "swin_t": _PLAIN,
    "swin_s": {**_SMALL, **_PLAIN},
    "swin_b": {**_BASE, **_PLAIN},
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "first_conv": "stem.conv",
            "origin_url": "https://github.com/ViTAE-Transformer/QFormer",
            "paper_ids": "arXiv:2204.08446",
            **kwargs,
        }
    )


def _swin_cfg(timm_name: str) -> dict[str, Any]:
    return _cfg(
        hf_hub_id=f"timm/{timm_name}",
        license="mit",
        origin_url="https://github.com/microsoft/Swin-Transformer",
        paper_ids="arXiv:2103.14030",
    )


_UNPUBLISHED = ("The authors have not published these weights.",)
default_cfgs = generate_default_cfgs(
    {
        "vsa_swin_t": _cfg(crop_pct=0.875, notes=_UNPUBLISHED),
        "vsa_swin_s": _cfg(crop_pct=0.875, notes=_UNPUBLISHED),
        "vsa_swin_b": _cfg(crop_pct=0.875, notes=_UNPUBLISHED),
        **shipped_cfgs(_cfg, "vsa_swin_n", "digits", pool_size=(2, 2)),
        "swin_t.ms_in1k": _swin_cfg("swin_tiny_patch4_window7_224.ms_in1k"),
        "swin_s.ms_in1k": _swin_cfg("swin_small_patch4_window7_224.ms_in1k"),
        "swin_b.ms_in1k": _swin_cfg("swin_base_patch4_window7_224.ms_in1k"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VSASwin:
    return build_model_with_cfg(
        VSASwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def vsa_swin_t(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-T with varied-size windows: 28.8M parameters, 4.6 GMACs at 224."""
    return _create("vsa_swin_t", pretrained, **kwargs)


@register_model
def vsa_swin_s(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-S with varied-size windows: 50.5M parameters, 8.9 GMACs at 224."""
    return _create("vsa_swin_s", pretrained, **kwargs)


@register_model
def vsa_swin_b(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-B with varied-size windows: 89.2M parameters, 15.6 GMACs at 224."""
    return _create("vsa_swin_b", pretrained, **kwargs)


@register_model
def vsa_swin_n(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """A small Swin with varied-size windows of ours for 32-pixel images."""
    return _create("vsa_swin_n", pretrained, **kwargs)


@register_model
def swin_t(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-T, the plain twin of `vsa_swin_t`: 28.3M parameters, 4.5 GMACs at 224."""
    return _create("swin_t", pretrained, **kwargs)


@register_model
def swin_s(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-S, the plain twin of `vsa_swin_s`: 49.6M parameters, 8.7 GMACs at 224."""
    return _create("swin_s", pretrained, **kwargs)


@register_model
def swin_b(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-B, the plain twin of `vsa_swin_b`: 87.8M parameters, 15.4 GMACs at 224."""
    return _create("swin_b", pretrained, **kwargs)
