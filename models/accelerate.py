"""Runs this package's operators inside models that people already have: `vitrail.accelerate(model)`.

Each replacement is a subclass of the module it stands for and overrides what it computes, not what it holds. Swapping
a module's class for it therefore leaves parameters, buffers, hooks and checkpoints as they are, and can be undone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import timm.layers
from timm.models import davit
from timm.models.maxxvit import AttentionCl, PartitionAttentionCl
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS
from vitrail.kernels.channel_attention import channel_attention, channel_attention_packed
from vitrail.kernels.depthwise_conv import depthwise_conv
from vitrail.kernels.depthwise_conv.op import FUSED_SIZES
from vitrail.kernels.mlp.op import MOST_CHANNELS
from vitrail.kernels.relative_position_bias import relative_position_bias
from vitrail.kernels.window_attention import window_attention, window_attention_packed
from vitrail.kernels.window_attention.op import MAX_WINDOW
from vitrail.layers.mlp import Mlp
from vitrail.layers.norm import LayerNorm, LayerNorm2d, TimmLayerNorm
from vitrail.layers.stem import MOST_IMAGE_CHANNELS, ImageConv2d
from vitrail.layers.window import may_be_padded, padding_key_value

__all__ = ["Acceleration", "accelerate", "register_acceleration"]


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did; printing it gives a table with a line for all modules whose names differ in numbers alone.

    Attributes:
        replaced: Name of the class that each replaced module had, by the module's qualified name.
        kept: Why a module of a replaceable class, or one that looks like attention, was left as it is, by the module's
            qualified name.
    """

    replaced: Mapping[str, str]
    kept: Mapping[str, str]
    _originals: dict[nn.Module, type[nn.Module]] = field(repr=False)

    def undo(self) -> None:
        """Gives every replaced module its own class back."""
        for module, original in self._originals.items():
            module.__class__ = original
        self._originals.clear()

    def __str__(self) -> str:
        rows = [(name, f"{kind}: fused") for name, kind in self.replaced.items()]
        rows += [(name, f"kept: {reason}") for name, reason in self.kept.items()]
        if not rows:
            return "nothing found that could be replaced"
        alike = Counter((re.sub(r"\b\d+\b", "*", name), what) for name, what in rows)
        width, digits = max(len(name) for name, _ in alike), len(str(max(alike.values())))
        lines = [f"{name.ljust(width)}  {count:{digits}} x {what}" for (name, what), count in alike.items()]
        return "\n".join([*lines, f"{len(self.replaced)} modules replaced, {len(self.kept)} kept"])


@dataclass(frozen=True)
class _Replacement:
    fused: type[nn.Module]
    objection: Callable[[nn.Module], str | None]
    inside: tuple[type[nn.Module], ...]


_REPLACEMENTS: dict[type[nn.Module], _Replacement] = {}


def register_acceleration(
    original: type[nn.Module],
    fused: type[nn.Module],
    objection: Callable[[nn.Module], str | None] = lambda _: None,
    inside: tuple[type[nn.Module], ...] = (nn.Module,),
) -> None:
    """Teaches `accelerate` one more module class.

    Args:
        original: The exact class of the modules to replace; subclasses of it stay as they are.
        fused: A subclass of `original` that needs no further state, whose methods compute the same function.
        objection: Returns why one instance cannot be replaced, or None if it can.
        inside: Classes of the modules that hold those to replace; what others hold is not meant.

    Raises:
        TypeError: `fused` is not a proper subclass of `original`.
    """
    if fused is original or not issubclass(fused, original):
        raise TypeError(f"fused is {fused.__name__}; allowed: a subclass of {original.__name__}")
    _REPLACEMENTS[original] = _Replacement(fused, objection, inside)


def accelerate(model: nn.Module) -> Acceleration:
    """Replaces the attention of timm's Swin, Swin-S3, DaViT and MaxViT (and registered classes) by fused operators.

    So are, in these models and all others, layer normalisations (quicker in training), timm's MLPs of up to 256
    channels (192 in training), the position encodings of DaViT and the convolutions that make patches of images.

    The model is changed in place. Its parameters, their names and its outputs stay the same, up to rounding in its
    dtype. Where the fused kernels cannot run (on a CPU, say) the replacements use the operators' references.
    Call it before `torch.compile`.

    Args:
        model: Any module.

    Returns:
        The report; `undo()` on it restores the model.

    Examples:
        >>> model = timm.create_model("swin_tiny_patch4_window7_224").cuda().half()
        >>> print(vitrail.accelerate(model))
    """
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    originals: dict[nn.Module, type[nn.Module]] = {}
    handled: tuple[str, ...] = ()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        original = type(module)
        replacement = _REPLACEMENTS.get(original)
        if replacement is None:
            if isinstance(getattr(module, "qkv", None), nn.Linear) and not name.startswith(handled or ("\0",)):
                kept[name] = f"no replacement is registered for {original.__module__}.{original.__name__}"
            continue
        if not isinstance(modules[name.rpartition(".")[0]], replacement.inside):
            continue
        objection = replacement.objection(module)
        if objection is None:
            replaced[name] = original.__name__
            originals[module] = original
        else:
            kept[name] = objection
        handled = (*handled, f"{name}.")
    for module in originals:
        module.__class__ = _REPLACEMENTS[type(module)].fused
    return Acceleration(MappingProxyType(replaced), MappingProxyType(kept), originals)


def _objection(head_dim: int, window: tuple[int, int], dropout: float) -> str | None:
    if head_dim not in FUSED_HEAD_DIMS:
        return f"its heads have {head_dim} channels; fused: {FUSED_HEAD_DIMS}"
    if window[0] * window[1] > MAX_WINDOW:
        return f"its windows {tuple(window)} have more than {MAX_WINDOW} tokens"
    if dropout > 0:
        return f"it drops attention weights (attn_drop {dropout}), which the fused kernels do not"
    return None


class FusedSwinBlock(SwinTransformerBlock):
    """timm's Swin block with fused window attention on the whole map: no roll, pad, partition or mask tensor.

    timm hides other regions' keys by subtracting 100 from their logits; here they do not take part at all.
    """

    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
        pad_k, pad_v = padding_key_value(attn.qkv.bias, qkv, may_be_padded(qkv, self.window_size))
        y = window_attention_packed(
            qkv,
            window_size=self.window_size,
            shift_size=self.shift_size,
            bias=relative_position_bias(attn.relative_position_bias_table, self.window_size),
            pad_k=pad_k,
            pad_v=pad_v,
            scale=attn.scale,
            roll_first=True,
        )
        return attn.proj_drop(attn.proj(y.flatten(3)))


def _swin_objection(block: SwinTransformerBlock) -> str | None:
    attn = block.attn
    return _objection(attn.qkv.out_features // (3 * attn.num_heads), block.window_size, attn.attn_drop.p)


class FusedDaViTSpatialBlock(davit.SpatialBlock):
    """timm's DaViT window block with fused window attention on the whole map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.cpe1(x).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        x = self.cpe2(x.permute(0, 3, 1, 2))
        if self.mlp is None:
            return x
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)

    def _attend(self, x: Tensor) -> Tensor:
        attn = self.attn
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
        pad_k, pad_v = padding_key_value(attn.qkv.bias, qkv, may_be_padded(qkv, self.window_size))
        y = window_attention_packed(qkv, window_size=self.window_size, pad_k=pad_k, pad_v=pad_v, scale=attn.scale)
        return attn.proj(y.flatten(3))


def _davit_objection(block: davit.SpatialBlock) -> str | None:
    if block.drop_path1 is None:
        return "it has no feed-forward part (ffn=False), for which timm's block has no forward either"
    return _objection(block.dim // block.num_heads, block.window_size, 0.0)


class FusedDaViTChannelAttention(davit.ChannelAttention):
    """timm's DaViT channel attention; the operator takes tokens as a map of one column."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], 1, 3, self.num_heads, -1)
        return self.proj(channel_attention_packed(qkv, scale=self.scale).flatten(2))


class FusedDaViTChannelAttentionV2(davit.ChannelAttentionV2):
    """The same of timm's larger DaViTs, whose scale may follow the number of tokens, and which mixes v."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 1, 3, self.groups, -1).unbind(3)
        if self.dynamic_scale:  # as a factor of the map: a number of the operator would be another graph for every size
            return self.proj(channel_attention(v, q * x.shape[1] ** -0.5, k, scale=1.0).flatten(2))
        return self.proj(channel_attention(v, q, k, scale=self.head_dim**-0.5).flatten(2))


def _channel_objection(attn: davit.ChannelAttention | davit.ChannelAttentionV2) -> str | None:
    groups = attn.groups if isinstance(attn, davit.ChannelAttentionV2) else attn.num_heads
    return _objection(attn.proj.in_features // groups, (1, 1), 0.0)


class FusedDaViTPosEnc(davit.ConvPosEnc):
    """timm's DaViT position encoding: convolution, GELU and sum at once, on a map whose channels lie side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        gelu = isinstance(self.act, nn.GELU)
        y = depthwise_conv(x.permute(0, 2, 3, 1), self.proj.weight, self.proj.bias, skip=True, gelu=gelu)
        return y.permute(0, 3, 1, 2)


def _pos_enc_objection(encoding: davit.ConvPosEnc) -> str | None:
    if type(encoding.proj) is not nn.Conv2d:
        return f"its convolution is a {type(encoding.proj).__name__}"
    size = encoding.proj.kernel_size[0]
    return None if size in FUSED_SIZES else f"its filter has {size} pixels; fused: {FUSED_SIZES}"


class FusedMaxViTAttention(AttentionCl):
    """timm's channels-last MaxViT attention on maps (B, H, W, C), each map or each window of it on its own."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """One window a map, (B, h, w, C) -> (B, h, w, C); `shared_rel_pos` is (1, heads, h * w, h * w)."""
        return self.attend(x, (x.shape[1], x.shape[2]), shared_rel_pos)

    def attend(self, x: Tensor, window: tuple[int, int], shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attends inside windows that tile the map exactly, (B, H, W, C) -> (B, H, W, C)."""
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        if bias is not None:  # with or without a batch axis of one
            bias = bias.reshape(self.num_heads, *bias.shape[-2:])
        layout, axis = ((self.num_heads, 3, self.dim_head), 4) if self.head_first else ((3, self.num_heads, -1), 3)
        q, k, v = self.qkv(x).unflatten(-1, layout).unbind(axis)
        y = window_attention(q, k, v, window_size=window, bias=bias, scale=self.scale)
        return self.proj_drop(self.proj(y.flatten(3)))


def _maxvit_objection(attn: AttentionCl) -> str | None:
    window = getattr(attn.rel_pos, "window_size", (1, 1))
    return _objection(attn.dim_head, window, attn.attn_drop.p)


class FusedMaxViTPartition(PartitionAttentionCl):
    """timm's MaxViT block attention with no partition: the fused attention reads the whole map."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        height, width = self.partition_size
        tiles = x.shape[1] % height == 0 and x.shape[2] % width == 0
        if tiles and isinstance(self.attn, FusedMaxViTAttention):
            return self.attn.attend(x, (height, width))
        return super()._partition_attn(x)


def _partition_objection(block: PartitionAttentionCl) -> str | None:
    return None if block.partition_block else "it partitions into a grid, which timm's code does as before"


def _mlp_objection(mlp: timm.layers.Mlp) -> str | None:
    if not Mlp.is_plain(mlp):
        return "it is more than two linear layers with the exact GELU between them"
    widest = max(mlp.fc1.in_features, mlp.fc2.out_features)
    return None if widest <= MOST_CHANNELS else f"it is {widest} channels wide; fused: up to {MOST_CHANNELS}"


def _patches_objection(conv: nn.Conv2d) -> str | None:
    if conv.in_channels <= MOST_IMAGE_CHANNELS:
        return None
    return f"its images have {conv.in_channels} channels; quicker: up to {MOST_IMAGE_CHANNELS}"


register_acceleration(SwinTransformerBlock, FusedSwinBlock, _swin_objection)
register_acceleration(davit.SpatialBlock, FusedDaViTSpatialBlock, _davit_objection)
register_acceleration(davit.ChannelAttention, FusedDaViTChannelAttention, _channel_objection)
register_acceleration(davit.ChannelAttentionV2, FusedDaViTChannelAttentionV2, _channel_objection)
register_acceleration(davit.ConvPosEnc, FusedDaViTPosEnc, _pos_enc_objection)
register_acceleration(AttentionCl, FusedMaxViTAttention, _maxvit_objection)
register_acceleration(PartitionAttentionCl, FusedMaxViTPartition, _partition_objection)
register_acceleration(timm.layers.Mlp, Mlp, _mlp_objection)
register_acceleration(nn.LayerNorm, LayerNorm)
register_acceleration(timm.layers.LayerNorm, TimmLayerNorm)
register_acceleration(timm.layers.LayerNorm2d, LayerNorm2d)
register_acceleration(nn.Conv2d, ImageConv2d, _patches_objection, inside=(timm.layers.PatchEmbed, davit.Stem))
