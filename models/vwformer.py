"""VWFormer: a decoder that looks at one map through windows of several sizes.

Paper: Yan, Wu, Zhang, "Multi-Scale Representations by Varying Window Attention for Semantic Segmentation", ICLR 2024,
arXiv 2404.16573. Upstream: github.com/yan-hao-tian/VW at 9bc1891.

The decoder takes four maps at strides 4, 8, 16 and 32 of any backbone and returns one at stride 4. It knows no
framework; `vitrail.models.mm.vwformer` makes decode heads and pixel decoders of it. The authors published four forms,
which `FORMS` holds as data.

All 1x1 convolutions behind a concatenation are computed on its parts, before these are enlarged: convolution and
interpolation commute, so the numbers stay the same, and most of the work happens on small maps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.varying_window import VaryingWindowAttention
from vitrail.models._checkpoint import rename_keys, unwrap

__all__ = ["FORMS", "VWDecoder", "VWMultiScaleDecoder", "checkpoint_filter_fn", "create_decoder"]

FORMS: dict[str, dict[str, Any]] = {
    # Decode head for ADE20K.
    "ade20k": {"num_heads": 1, "shortcut": True, "attn_norm": True, "plain_projections": True, "mode": "bilinear"},
    # Decode head for Cityscapes.
    "cityscapes": {"num_heads": 16, "image_pool": False},
    # Pixel decoders of MaskFormer and Mask2Former.
    "maskformer": {"num_heads": 16, "shortcut": True, "group_norm": True, "out_channels": 256},
    "mask2former": {"num_heads": 16, "group_norm": True, "out_channels": 256},
}

_RATIOS = (2, 4, 8)
_GROUPS = 32


class ConvNormAct(nn.Module):
    """1x1 convolution, norm, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        norm: The norm; None leaves it to the caller, who hands one over.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: nn.Module | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.norm = norm

    def forward(self, x: Tensor, tied_norm: nn.Module | None = None) -> Tensor:
        return _norm_act(self.conv(x), self.norm, tied_norm)


class MergeConv(nn.Module):
    """1x1 convolution, norm and ReLU of maps that are enlarged to one size and concatenated.

    Each map has its own slice of the convolution, applied before the map is enlarged.

    Args:
        in_channels: Channels of each map.
        out_channels: Channels of the output.
        norm: The norm; None leaves it to the caller, who hands one over.
        mode: Interpolation, "bilinear" or "nearest".
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        norm: nn.Module | None,
        mode: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(n, out_channels, 1, bias=False, device=device, dtype=dtype) for n in in_channels
        )
        self.norm = norm
        self.mode = mode

    def forward(self, maps: Sequence[Tensor], tied_norm: nn.Module | None = None) -> Tensor:
        """One (B, C_i, H_i, W_i) for each of `in_channels` -> (B, C, H, W) of the last one's size."""
        *others, last = (conv(x) for conv, x in zip(self.convs, maps, strict=True))
        for x in others:
            last = last + _enlarge(x, last, self.mode)
        return _norm_act(last, self.norm, tied_norm)


def _norm_act(x: Tensor, norm: nn.Module | None, tied_norm: nn.Module | None) -> Tensor:
    norm = tied_norm if norm is None else norm
    return F.relu(x if norm is None else norm(x))


def _enlarge(x: Tensor, like: Tensor, mode: str) -> Tensor:
    """Interpolates a map to the size of another; one pixel is left to broadcasting."""
    if x.shape[2:] in (like.shape[2:], (1, 1)):
        return x
    return F.interpolate(x, like.shape[2:], mode=mode, align_corners=False if mode == "bilinear" else None)


class VWDecoder(nn.Module):
    """Decoder of varying window attention, for maps of any size.

    The maps at strides 8 to 32 become one of stride 8. It passes through a 1x1 convolution, the mean over the image
    and an attention for each ratio, side by side; their merged map is joined with the one at stride 4.

    Args:
        in_channels: Channels of the maps at strides 4, 8, 16 and 32.
        out_channels: Channels of the output.
        dim: Channels inside, a multiple of 64.
        low_channels: Channels to which the map at stride 4 is reduced.
        num_heads: Heads of each attention.
        shortcut: Add its input to each attention's result.
        attn_norm: End each attention with a batch norm, instead of a bias.
        image_pool: Have the branch of the image's mean. With batch norm it cannot be trained on a single image, a
            restriction of the norm that synchronised batch norm lifts.
        plain_projections: Project the maps by a convolution with a bias, without norm and activation.
        group_norm: Group norms in place of most batch norms; seven convolutions share one, as the authors have it.
        mode: Interpolation of the maps at strides 16 and 32 to stride 8, "bilinear" or "nearest".
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `in_channels` is not four positive numbers, or `mode`, `dim`, `num_heads` are not allowed.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 512,
        dim: int = 512,
        low_channels: int = 48,
        num_heads: int = 1,
        shortcut: bool = False,
        attn_norm: bool = False,
        image_pool: bool = True,
        plain_projections: bool = False,
        group_norm: bool = False,
        mode: str = "nearest",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_decoder(in_channels, out_channels, low_channels, mode)
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def batch_norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, **factory)

        def norm() -> nn.Module | None:
            return None if group_norm else batch_norm(dim)

        def project(n: int, width: int, norm: nn.Module | None) -> nn.Module:
            if plain_projections:
                return nn.Conv2d(n, width, 1, **factory)
            return ConvNormAct(n, width, norm, **factory)

        self.in_channels = list(in_channels)
        self.out_channels = out_channels
        self.tied_norm = nn.GroupNorm(_GROUPS, dim, **factory) if group_norm else None
        self.project1 = project(in_channels[0], low_channels, batch_norm(low_channels))
        self.project2, self.project3, self.project4 = (project(n, dim, norm()) for n in in_channels[1:])
        self.fuse = MergeConv((dim, dim, dim), dim, norm(), mode, **factory)
        self.short_path = ConvNormAct(dim, dim, norm(), **factory)
        self.image_pool = ConvNormAct(dim, dim, norm(), **factory) if image_pool else None
        self.attentions = nn.ModuleList(
            VaryingWindowAttention(
                dim,
                ratio,
                num_heads,
                reduce_bias=group_norm,
                out_norm=attn_norm,
                shortcut=shortcut,
                **factory,
            )
            for ratio in _RATIOS
        )
        n_branches = 1 + int(image_pool) + len(_RATIOS)
        self.merge = MergeConv((dim,) * n_branches, dim, norm(), mode, **factory)
        out_norm = nn.GroupNorm(_GROUPS, out_channels, **factory) if group_norm else batch_norm(out_channels)
        self.refine = MergeConv((dim, low_channels), out_channels, out_norm, "bilinear", **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew: convolutions Kaiming normal, plain projections and norms as PyTorch does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
                if module.bias is None:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.reset_parameters()
        for attention in self.attentions:
            attention.init_weights()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, C_i, H_i, W_i) at strides 4, 8, 16, 32 -> (B, out_channels, H_1, W_1)."""
        c1, c2, c3, c4 = (x.contiguous(memory_format=torch.channels_last) for x in maps)
        levels = [self._project(self.project4, c4), self._project(self.project3, c3), self._project(self.project2, c2)]
        x = self.fuse(levels, self.tied_norm)
        branches = [self.short_path(x, self.tied_norm)]
        if self.image_pool is not None:
            branches.append(self.image_pool(x.mean((2, 3), keepdim=True), self.tied_norm))
        branches += [attention(x) for attention in self.attentions]
        x = self.merge(branches, self.tied_norm)
        return self.refine([x, self.project1(c1)])

    def _project(self, project: nn.Module, x: Tensor) -> Tensor:
        return project(x, self.tied_norm) if isinstance(project, ConvNormAct) else project(x)


class VWMultiScaleDecoder(nn.Module):
    """A decoder that also returns its inputs at strides 8 to 32, projected, for Mask2Former.

    Args:
        in_channels: Channels of the maps at strides 4, 8, 16 and 32.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: The other arguments of `VWDecoder`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.decoder = VWDecoder(in_channels, device=device, dtype=dtype, **kwargs)
        width = self.decoder.out_channels
        self.projections = nn.ModuleList(
            ConvNormAct(n, width, nn.GroupNorm(_GROUPS, width, device=device, dtype=dtype), device=device, dtype=dtype)
            for n in in_channels[1:]
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew, see `VWDecoder`."""
        self.decoder.init_weights()
        for projection in self.projections:
            nn.init.kaiming_normal_(projection.conv.weight, mode="fan_out", nonlinearity="relu")
            projection.norm.reset_parameters()

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps at strides 4 to 32 -> mask features at stride 4; projected maps at strides 32, 16 and 8."""
        projected = [projection(x) for projection, x in zip(self.projections, maps[1:], strict=True)]
        return self.decoder(maps), projected[::-1]


def create_decoder(form: str, in_channels: Sequence[int], **kwargs: Any) -> VWDecoder | VWMultiScaleDecoder:
    """The decoder of one of the published forms.

    Args:
        form: One of `FORMS`.
        in_channels: Channels of the backbone's maps at strides 4, 8, 16 and 32.
        **kwargs: Arguments of `VWDecoder` that differ from the form's.

    Raises:
        ValueError: `form` is unknown, or an argument is out of range.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
    decoder = VWMultiScaleDecoder if form == "mask2former" else VWDecoder
    return decoder(in_channels, **{**FORMS[form], **kwargs})


def _check_decoder(in_channels: Sequence[int], out_channels: int, low_channels: int, mode: str) -> None:
    if len(in_channels) != 4 or min(in_channels) < 1:
        raise ValueError(f"in_channels is {list(in_channels)}; allowed: four positive numbers, of strides 4 to 32")
    if min(out_channels, low_channels) < 1:
        raise ValueError(f"out_channels is {out_channels}, low_channels {low_channels}; allowed: at least 1")
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode is {mode!r}; allowed: 'bilinear', 'nearest'")


_PREFIXES = ("decode_head.", "sem_seg_head.pixel_decoder.")
_CONVOLUTIONS = r"linear_c\d|linear_fuse|ds\.\d|short_path|image_pool\.1|cat|low_level_fuse|proj\.\d"
_TIED = r"linear_c[234]|linear_fuse|short_path|image_pool\.1|cat"
_OFFICIAL_KEYS = (
    (r"^(attn|ds|cat|short_path|image_pool)_0\.", r"\1."),  # Mask2Former numbers its stages of attention
    (rf"^({_CONVOLUTIONS})\.(weight|bias)$", r"\1.conv.\2"),  # Detectron2's convolutions carry the norm inside
    (r"^(linear_c\d)\.proj\.", r"\1."),
    (r"\.bn\.", ".norm."),
    (r"^attn\.(\d)\.(?:conv_out\.conv|out_proj)\.", r"attentions.\1.proj."),
    (r"^attn\.(\d)\.conv_out\.norm\.", r"attentions.\1.norm."),
    (r"^attn\.(\d)\.theta\.conv\.", r"attentions.\1.q."),
    (r"^ds\.(\d)\.conv\.", r"attentions.\1.reduce."),
    (r"^ds\.(\d)\.norm\.", r"attentions.\1.reduce_norm."),
)
_OWN_KEYS = (
    (r"^linear_c(\d)\.", r"project\1."),
    (r"^linear_fuse\.", "fuse."),
    (r"^image_pool\.1\.", "image_pool."),
    (r"^cat\.", "merge."),
    (r"^low_level_fuse\.", "refine."),
    (r"^proj\.", "projections."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VWDecoder | VWMultiScaleDecoder) -> dict[str, Tensor]:
    """Turns the decoder's part of an official checkpoint into the parameters of `model`; own weights pass unchanged.

    Takes the decode heads of mmsegmentation and the pixel decoders of MaskFormer and Mask2Former, alone or inside a
    whole segmenter's checkpoint; its backbone and its classifier are left out.

    Args:
        state_dict: Weights, alone or under "state_dict" or "model".
        model: The decoder that will load them.

    Raises:
        ValueError: Norms that the decoder shares differ in the checkpoint.
    """
    weights = _decoder_part(unwrap(state_dict))
    decoder, own_prefix = (model.decoder, "decoder.") if isinstance(model, VWMultiScaleDecoder) else (model, "")
    if any(key.startswith(f"{own_prefix}project1.") for key in weights):
        return weights
    weights = rename_keys({key: _as_convolution(value) for key, value in weights.items()}, _OFFICIAL_KEYS)
    if decoder.tied_norm is not None:
        weights = _tie_norms(weights)
    weights = rename_keys(weights, _OWN_KEYS)
    for name in ("fuse", "merge", "refine"):
        _split_convolution(weights, name, getattr(decoder, name))
    for index, attention in enumerate(decoder.attentions):
        _pack_context(weights, index, attention.ratio)
    return {key if key.startswith("projections.") else own_prefix + key: value for key, value in weights.items()}


def _decoder_part(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's weights without a segmenter's prefix, without the classifier."""
    for prefix in _PREFIXES:
        part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        weights = part or weights
    return {key: value for key, value in weights.items() if not key.startswith("conv_seg.")}


def _as_convolution(weight: Tensor) -> Tensor:
    """The weight of a linear layer as that of a 1x1 convolution; anything else unchanged."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight


def _tie_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keeps one copy of the norm that a checkpoint holds under the names of all its convolutions."""
    tied: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = re.sub(rf"^({_TIED})\.norm\.", "tied_norm.", key)
        if name in tied and not torch.equal(tied[name], value):
            raise ValueError(f"state_dict: {key} differs from the other norms that the decoder shares with it")
        tied[name] = value
    return tied


def _split_convolution(weights: dict[str, Tensor], name: str, merge: MergeConv) -> None:
    """Replaces the weight of a convolution of concatenated maps by its slices."""
    weight = weights.pop(f"{name}.conv.weight", None)
    if weight is None:
        return
    widths = [conv.in_channels for conv in merge.convs]
    if weight.shape[1] != sum(widths):
        raise ValueError(f"state_dict: the weight of {name} takes {weight.shape[1]} channels, the decoder's {widths}")
    for index, part in enumerate(weight.split(widths, 1)):
        weights[f"{name}.convs.{index}.weight"] = part.contiguous()


def _pack_context(weights: dict[str, Tensor], index: int, ratio: int) -> None:
    """Turns the projections of queries, keys and values into those of `VaryingWindowAttention`."""
    theirs, ours = f"attn.{index}", f"attentions.{index}"
    for kind in ("weight", "bias"):
        packed = weights.pop(f"{theirs}.in_proj_{kind}", None)
        if packed is not None:
            weights[f"{ours}.q.{kind}"], *context = packed.chunk(3)
        else:
            context = [weights.pop(f"{theirs}.{name}.conv.{kind}", None) for name in ("phi", "g")]
        if all(part is not None for part in context):
            parts = [_over_patches(part, ratio) if kind == "weight" else part for part in context]
            weights[f"{ours}.kv.{kind}"] = torch.cat(parts)


def _over_patches(weight: Tensor, ratio: int) -> Tensor:
    """A 1x1 convolution of (row, column, channel) of a patch as a convolution over the patch's pixels."""
    return weight.reshape(weight.shape[0], ratio, ratio, -1).permute(0, 3, 1, 2).contiguous()
