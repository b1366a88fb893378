"""ViTAEv2 with varied-size window attention (VSA) in every cell.

Paper: Zhang, Xu, Zhang, Tao, "VSA: Learning Varied-Size Window Attention in Vision Transformers", ECCV 2022,
arXiv 2204.08446; the cells are those of ViTAEv2 (arXiv 2202.10108). Upstream:
github.com/ViTAE-Transformer/ViTAE-VSA at 75dc9867 (no licence seen).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import ClassifierHead, DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.layers.conv import Conv2d
from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.mlp import Mlp
from vitrail.layers.norm import LayerNorm
from vitrail.layers.varied_window import VariedWindowAttention
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._hierarchical import HierarchicalBackbone, Stage, check_drop_path, check_stages, pad_to_multiple
from vitrail.models._registry import imagenet_cfg
from vitrail.models._weights import build_model_with_cfg
from vitrail.models.vsa import read_attention

__all__ = ["VSAViTAE"]

torch.fx.wrap("pad_to_multiple")
_STRIDES = (4, 2, 2, 2)
_KERNELS = (7, 3, 3, 3)
_DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))


class PyramidReduction(nn.Module):
    """Strided convolutions of several dilations side by side, each with GELU: (B, C, H, W) -> (B, n * dim, H', W')."""

    def __init__(
        self,
        dim_in: int,
        dim: int,
        kernel_size: int,
        stride: int,
        dilations: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for dilation in dilations:
            padding = math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2)
            conv = Conv2d(dim_in, dim, kernel_size, stride, padding, dilation, device=device, dtype=dtype)
            self.convs.append(conv)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.act(conv(x)) for conv in self.convs], 1)


def _parallel_convs(
    dims: Sequence[int], strides: Sequence[int], groups: int, factory: Mapping[str, Any]
) -> nn.Sequential:
    """The branch of locality beside the attention: 3x3 convolutions with batch norm and SiLU between them."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(strides):
        layers.append(Conv2d(dims[i], dims[i + 1], 3, stride, 1, groups=groups, **factory))
        if i < len(strides) - 1:
            layers += [nn.BatchNorm2d(dims[i + 1], **factory), nn.SiLU()]
    return nn.Sequential(*layers)


class ReductionCell(nn.Module):
    """Shrinks a map by convolutions of several dilations and attention, beside plain convolutions.

    (B, dim_in, H, W) -> (B, dim, H / stride, W / stride), rounded up. There is no residual around the attention,
    whose output is wider or narrower than its input.

    Args:
        dim_in: Channels of the input.
        embed_dim: Channels of each dilation's convolution.
        dim: Channels of the output.
        num_heads: Attention heads.
        groups: Groups of the plain convolutions.
        stage: Number of the stage, from 0, which decides kernel size, stride and dilations.
        wide_pcm: Plain convolutions of twice the output's channels, in place of `embed_dim`.
        attention: More arguments of `VariedWindowAttention`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim_in: int,
        embed_dim: int,
        dim: int,
        num_heads: int,
        groups: int,
        stage: int,
        wide_pcm: bool,
        attention: Mapping[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        stride = _STRIDES[stage]
        hidden = 2 * dim if wide_pcm else embed_dim
        halvings = (2, 2, 1) if stride == 4 else (2, 1, 1)
        self.multiple = stride if stride == 4 else 1  # where they halve, all branches round odd sizes up by themselves
        self.prm = PyramidReduction(dim_in, embed_dim, _KERNELS[stage], stride, _DILATIONS[stage], **factory)
        self.pcm = _parallel_convs((dim_in, hidden, hidden, dim), halvings, groups, factory)
        wide = embed_dim * len(_DILATIONS[stage])
        self.pos = DepthwiseConv2d(wide, 7, skip=True, **factory)
        self.norm1 = LayerNorm(wide, eps=1e-5, **factory)
        self.attn = VariedWindowAttention(wide, num_heads, out_dim=dim, **attention, **factory)
        self.norm2 = LayerNorm(dim, eps=1e-5, **factory)
        self.mlp = Mlp(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.multiple).contiguous(memory_format=torch.channels_last)
        y = self.prm(x).permute(0, 2, 3, 1)  # (B, H', W', wide)
        y = self.attn(self.norm1(self.pos(y))) + self.pcm(x).permute(0, 2, 3, 1)
        y = y + self.mlp(self.norm2(y))
        return y.permute(0, 3, 1, 2)


class NormalCell(nn.Module):
    """Attention beside plain convolutions, then an MLP, each a residual branch, on (B, H, W, C).

    The positional convolution acts inside the attention's branch only.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        groups: Groups of the plain convolutions.
        mlp_ratio: Width of the MLP and of the first plain convolution in multiples of C.
        drop_path: Chance to skip a residual branch in training.
        attention: More arguments of `VariedWindowAttention`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int,
        mlp_ratio: float,
        drop_path: float,
        attention: Mapping[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.pos = DepthwiseConv2d(dim, 7, skip=True, **factory)
        self.norm1 = LayerNorm(dim, eps=1e-6, **factory)
        self.attn = VariedWindowAttention(dim, num_heads, **attention, **factory)
        self.pcm = _parallel_convs((dim, hidden, dim, dim), (1, 1, 1), groups, factory)
        self.norm2 = LayerNorm(dim, eps=1e-6, **factory)
        self.mlp = Mlp(dim, hidden, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path3 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.pcm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        attended = self.attn(self.norm1(self.pos(x)))
        x = x + self.drop_path1(attended) + self.drop_path2(convolved)
        return x + self.drop_path3(self.mlp(self.norm2(x)))


class VSAViTAE(HierarchicalBackbone):
    """ViTAEv2 with varied-size windows, for images of any height and width.

    Four stages of strides 4, 8, 16 and 32: a reduction cell and normal cells. There is no final norm. The authors'
    code takes square images of the size it was built for (classification) or multiples of 32 (detection); elsewhere
    zeros are added to the image at the bottom and right up to multiples of 4, and halved sizes are rounded up.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        global_pool: Pooling before the classifier, "" for none.
        depths: Normal cells of each stage.
        dims: Channels of each stage.
        embed_dims: Channels of each dilation's convolution in the reduction cells.
        num_heads: Attention heads of the normal cells of each stage.
        reduction_heads: Attention heads of the reduction cell of each stage.
        groups: Groups of the plain convolutions in the normal cells of each stage.
        reduction_groups: Groups of the plain convolutions in the reduction cell of each stage.
        wide_pcm: Plain convolutions of twice the stage's channels in the reduction cells, in place of `embed_dims`.
        window_size: Window height and width in tokens.
        mlp_ratio: Width of the normal cells' MLPs in multiples of the channels.
        qkv_bias: Add a bias to q, k and v.
        padding: See `VariedWindowAttention`; "center" for the authors' detectors.
        offset_norm: See `VariedWindowAttention`; "floor_swapped" for the authors' detectors.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Largest chance to skip the residual branches of a normal cell, see `drop_path_rates`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A count, size, rate or form is out of range, or a per-stage list has not four entries.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        embed_dims: Sequence[int] = (64, 64, 128, 256),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        reduction_heads: Sequence[int] = (2, 2, 4, 8),
        groups: Sequence[int] = (1, 32, 64, 128),
        reduction_groups: Sequence[int] = (1, 16, 32, 64),
        wide_pcm: bool = False,
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        padding: str = "end",
        offset_norm: str = "padded",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_stages(
            depths=depths,
            dims=dims,
            embed_dims=embed_dims,
            num_heads=num_heads,
            reduction_heads=reduction_heads,
            groups=groups,
            reduction_groups=reduction_groups,
        )
        if len(depths) != len(_STRIDES):
            raise ValueError(f"depths is {tuple(depths)}; allowed: one entry for each of {len(_STRIDES)} stages")
        check_drop_path(drop_path_rate)
        super().__init__(in_chans, num_classes, dims, [4, 8, 16, 32], drop_rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        attention = {
            "window_size": window_size,
            "qkv_bias": qkv_bias,
            "padding": padding,
            "offset_norm": offset_norm,
        }
        self.stem = nn.Identity()  # the first reduction cell takes the image
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            reduction = ReductionCell(
                dims[i - 1] if i > 0 else in_chans,
                embed_dims[i],
                dims[i],
                reduction_heads[i],
                reduction_groups[i],
                i,
                wide_pcm,
                attention,
                **factory,
            )
            cells = [NormalCell(dims[i], num_heads[i], groups[i], mlp_ratio, r, attention, **factory) for r in rates]
            stages.append(Stage(reduction, cells))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: MLPs and classifier normal with deviation 0.02, the rest as PyTorch does.

        Varied windows begin as the ordinary ones, as the paper says; the authors' code draws their predictions too.
        """
        for module in self.modules():
            if isinstance(module, (VariedWindowAttention, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
                module.reset_parameters()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".attn." not in name:
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def drop_path_rates(highest: float, depths: Sequence[int]) -> list[list[float]]:
    """The chance to skip a branch for every normal cell of every stage, as the authors trained.

    A stage's rates are a stretch of the rising line over all cells that begins at the number of cells of the stage
    before, not of all stages before: they do not rise from stage to stage.
    """
    line = torch.linspace(0, highest, sum(depths), device="cpu").tolist()
    starts = [0, *depths[:-1]]
    return [line[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


_OFFICIAL_KEYS = (
    (r"^layers\.(\d+)\.RC\.", r"stages.\1.downsample."),
    (r"^layers\.(\d+)\.NC\.", r"stages.\1.blocks."),
    (r"\.PCM\.", ".pcm."),
    (r"\.PRM\.convs\.(\d+)\.0\.", r".prm.convs.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turns an official checkpoint, of classifier or detector, into this model's layout; own names pass unchanged.

    Args:
        state_dict: Weights, alone or under "state_dict_ema" (preferred, as by the authors), "state_dict" or "model".
        model: The model that will load it.
    """
    averaged = state_dict.get("state_dict_ema", state_dict)
    return rename_keys(read_attention(unwrap(averaged)), _OFFICIAL_KEYS)


_VARIANTS: dict[str, dict[str, Any]] = {
    "vsa_vitae_s": {},
    "vsa_vitae_48m": {
        "depths": (2, 2, 11, 2),
        "dims": (96, 192, 384, 768),
        "embed_dims": (96, 96, 192, 384),
        "num_heads": (3, 6, 12, 24),
        "reduction_heads": (3, 6, 12, 24),
        "wide_pcm": True,
    },
    "vsa_vitae_b": {
        "depths": (2, 2, 12, 2),
        "dims": (128, 256, 512, 1024),
        "embed_dims": (128, 128, 256, 512),
        "num_heads": (4, 8, 16, 32),
        "reduction_heads": (4, 8, 16, 32),
        "wide_pcm": True,
    },
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    first = "stages.0.downsample"
    return imagenet_cfg(
        **{
            "first_conv": (*(f"{first}.prm.convs.{i}" for i in range(len(_DILATIONS[0]))), f"{first}.pcm.0"),
            "origin_url": "https://github.com/ViTAE-Transformer/ViTAE-VSA",
            "paper_ids": "arXiv:2204.08446",
            **kwargs,
        }
    )


_BY_HAND = (
    "The authors keep their file on OneDrive (link in their README), where a program is refused: download it in a "
    "browser.",
)
default_cfgs = generate_default_cfgs(
    {
        "vsa_vitae_s": _cfg(notes=_BY_HAND),
        "vsa_vitae_48m": _cfg(notes=_BY_HAND),
        "vsa_vitae_b": _cfg(notes=("The authors have not published these weights.",)),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VSAViTAE:
    return build_model_with_cfg(
        VSAViTAE,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def vsa_vitae_s(pretrained: bool = False, **kwargs: Any) -> VSAViTAE:
    """ViTAEv2*-S with varied-size windows: 19.8M parameters, 5.7 GMACs at 224."""
    return _create("vsa_vitae_s", pretrained, **kwargs)


@register_model
def vsa_vitae_48m(pretrained: bool = False, **kwargs: Any) -> VSAViTAE:
    """ViTAEv2*-48M with varied-size windows: 51.1M parameters, 15.0 GMACs at 224."""
    return _create("vsa_vitae_48m", pretrained, **kwargs)


@register_model
def vsa_vitae_b(pretrained: bool = False, **kwargs: Any) -> VSAViTAE:
    """ViTAEv2*-B with varied-size windows: 93.7M parameters, 27.1 GMACs at 224."""
    return _create("vsa_vitae_b", pretrained, **kwargs)
