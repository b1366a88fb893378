"""VWFormer inside mmsegmentation and mmdetection: decode heads, and pixel decoders of MaskFormer and Mask2Former.

Importing this module registers `VWHead`, `VWMaskFormerPixelDecoder` and `VWMask2FormerPixelDecoder` in mmengine's root
registry, where configs of any scope find them; configs do so by `custom_imports`. The decoders themselves are those of
`vitrail.models.vwformer`. The heads load the authors' checkpoints through any loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Before mmseg, whose heads for masks are mmdet's if that can be imported.
import vitrail.models.mm.ops  # noqa: F401

# isort: split
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from vitrail.models.vwformer import checkpoint_filter_fn, create_decoder

_SYNC_BN = {"type": "SyncBN"}


@MODELS.register_module()
class VWHead(BaseDecodeHead):
    """Decode head of VWFormer: varying window attention, then a pixel-wise classifier at stride 4.

    Args:
        in_channels: Channels of the backbone's maps at strides 4, 8, 16 and 32.
        channels: Channels that the classifier sees.
        form: "ade20k" or "cityscapes", see `vitrail.models.vwformer.FORMS`.
        decoder: Arguments of `VWDecoder` that differ from the form's.
        in_index: The backbone's outputs to take, of strides 4, 8, 16 and 32.
        norm_cfg: {"type": "SyncBN"}, statistics of all processes, or {"type": "BN"}.
        **kwargs: Arguments of mmsegmentation's decode heads, among them `num_classes`.

    Raises:
        ValueError: An argument is not one of those allowed.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        *,
        form: str = "ade20k",
        decoder: Mapping[str, Any] | None = None,
        in_index: Sequence[int] = (0, 1, 2, 3),
        norm_cfg: Mapping[str, Any] = _SYNC_BN,
        **kwargs: Any,
    ) -> None:
        if form not in ("ade20k", "cityscapes"):
            raise ValueError(f"form is {form!r}; allowed: 'ade20k', 'cityscapes'")
        super().__init__(
            list(in_channels),
            channels,
            in_index=list(in_index),
            input_transform="multiple_select",
            norm_cfg=dict(norm_cfg),
            **kwargs,
        )
        made = create_decoder(form, in_channels, out_channels=channels, **(decoder or {}))
        self.decoder = _with_norms(made, norm_cfg)
        self.register_load_state_dict_pre_hook(_accept_official)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's maps -> logits (B, num_classes, H, W) at stride 4."""
        return self.cls_seg(self.decoder(self._transform_inputs(inputs)))


class _PixelDecoder(BaseModule):
    """What the two pixel decoders share.

    Args:
        in_channels: Channels of the backbone's maps at strides 4, 8, 16 and 32.
        feat_channels: Channels of the maps for the transformer.
        out_channels: Channels of the mask features.
        form: The decoder's form.
        decoder: Arguments of `VWDecoder` that differ from the form's.
        norm_cfg: {"type": "SyncBN"} or {"type": "BN"}, of the batch norms that these forms have.
        init_cfg: mmengine's initialisation, after the decoder's own.

    Raises:
        ValueError: An argument is not one of those allowed.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        feat_channels: int,
        out_channels: int,
        form: str,
        decoder: Mapping[str, Any] | None,
        norm_cfg: Mapping[str, Any],
        init_cfg: Any,
    ) -> None:
        super().__init__(init_cfg)
        made = create_decoder(form, in_channels, out_channels=out_channels, **(decoder or {}))
        self.decoder = _with_norms(made, norm_cfg)
        self.register_load_state_dict_pre_hook(_accept_official)


@MODELS.register_module()
class VWMaskFormerPixelDecoder(_PixelDecoder):
    """Pixel decoder of `MaskFormerHead`: mask features, and the map at stride 32 for the transformer.

    See `_PixelDecoder` for the arguments, of which the head sets the first three. The official decoder leaves the
    projection for the transformer to that; here it is `memory_proj`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        feat_channels: int,
        out_channels: int,
        decoder: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _SYNC_BN,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(in_channels, feat_channels, out_channels, "maskformer", decoder, norm_cfg, init_cfg)
        self.memory_proj = nn.Conv2d(in_channels[-1], feat_channels, 1)

    def forward(self, feats: Sequence[Tensor], batch_img_metas: Sequence[dict] = ()) -> tuple[Tensor, Tensor]:
        """Maps at strides 4 to 32 -> mask features at stride 4, memory at stride 32."""
        return self.decoder(feats), self.memory_proj(feats[-1])


@MODELS.register_module()
class VWMask2FormerPixelDecoder(_PixelDecoder):
    """Pixel decoder of `Mask2FormerHead`: mask features, and the maps at strides 32, 16 and 8 for the transformer.

    See `_PixelDecoder` for the other arguments, of which the head sets the first three.

    Args:
        encoder: Without effect: there is no encoder, but the head reads the number of maps, 3, under
            `encoder.layer_cfg.self_attn_cfg.num_levels`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        feat_channels: int,
        out_channels: int,
        decoder: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _SYNC_BN,
        encoder: Any = None,
        init_cfg: Any = None,
    ) -> None:
        if feat_channels != out_channels:
            raise ValueError(f"feat_channels is {feat_channels}, out_channels {out_channels}; they must agree")
        super().__init__(in_channels, feat_channels, out_channels, "mask2former", decoder, norm_cfg, init_cfg)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps at strides 4 to 32 -> mask features at stride 4; projected maps at strides 32, 16 and 8."""
        return self.decoder(feats)


def _with_norms(decoder: nn.Module, norm_cfg: Mapping[str, Any]) -> nn.Module:
    if norm_cfg not in ({"type": "SyncBN"}, {"type": "BN"}):
        raise ValueError(f"norm_cfg is {dict(norm_cfg)}; allowed: {{'type': 'SyncBN'}}, {{'type': 'BN'}}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(decoder) if norm_cfg["type"] == "SyncBN" else decoder


def _accept_official(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the authors' weights under `prefix` in place, before they are loaded."""
    own = ("decoder.", "conv_seg.", "memory_proj.")
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    official = {name: state_dict[prefix + name] for name in names if not name.startswith(own)}
    if not official or any(name.startswith("decoder.") for name in names):
        return
    for name in official:
        del state_dict[prefix + name]
    for name, value in checkpoint_filter_fn(official, module.decoder).items():
        state_dict[f"{prefix}decoder.{name}"] = value
