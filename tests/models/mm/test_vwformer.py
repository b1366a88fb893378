"""VWFormer's heads inside mmsegmentation: loss and prediction, official checkpoints, pixel decoders of mask heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _golden import load_case
from torch import Tensor, nn

pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")

from mmengine.config import ConfigDict
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import PixelData
from mmseg.registry import MODELS as MMSEG_MODELS
from mmseg.structures import SegDataSample

from vitrail.models.mm.vwformer import VWHead, VWMask2FormerPixelDecoder, VWMaskFormerPixelDecoder
from vitrail.models.vwformer import create_decoder

CHANNELS = (8, 12, 16, 20)
SMALL = {"dim": 64, "low_channels": 8}
HEAD = {"type": "VWHead", "in_channels": CHANNELS, "channels": 64, "num_classes": 5, "decoder": SMALL}


class Strides(nn.Module):
    """The least backbone: one convolution for each stride."""

    def __init__(self) -> None:
        super().__init__()
        strides = (4, 8, 16, 32)
        self.convs = nn.ModuleList(
            nn.Conv2d(3, n, 3, stride=s, padding=1) for n, s in zip(CHANNELS, strides, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [conv(x) for conv in self.convs]


def build_segmenter(head: dict[str, Any]) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmseg"):
        segmenter = MMSEG_MODELS.build(
            {
                "type": "EncoderDecoder",
                "backbone": {"type": Strides},
                "decode_head": head,
                "train_cfg": {},
                "test_cfg": ConfigDict(mode="whole"),
            }
        )
    segmenter.init_weights()
    return segmenter


def samples(height: int, width: int) -> list[SegDataSample]:
    made = []
    for _ in range(2):
        shape = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (height, width))
        sample = SegDataSample(metainfo=shape)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, height, width)))
        made.append(sample)
    return made


@pytest.mark.parametrize("form", ["ade20k", "cityscapes"])
@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_trains_and_predicts_at_any_size(form: str, norm: str) -> None:
    segmenter = build_segmenter({**HEAD, "form": form, "norm_cfg": {"type": norm}}).train()
    norms = {type(m) for m in segmenter.decode_head.modules() if "BatchNorm" in type(m).__name__}
    assert norms == {nn.SyncBatchNorm if norm == "SyncBN" else nn.BatchNorm2d}
    images, truth = torch.randn(2, 3, 70, 100), samples(70, 100)
    losses = segmenter.loss(images, truth)
    assert losses["decode.loss_ce"].item() == pytest.approx(torch.tensor(5.0).log().item(), abs=0.3)
    losses["decode.loss_ce"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmenter.parameters())
    with torch.no_grad():
        predicted = segmenter.eval().predict(images, truth)
    assert predicted[0].pred_sem_seg.data.shape == (1, 70, 100)


def test_weights_are_those_of_the_recipe() -> None:
    head = build_segmenter(HEAD).decode_head
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not any(layer.norm.weight.any() for layer in head.decoder.attentions)


def test_decoder_is_the_framework_free_one() -> None:
    head = VWHead(CHANNELS, 64, num_classes=5, decoder=SMALL, dropout_ratio=0).eval()
    decoder = create_decoder("ade20k", CHANNELS, out_channels=64, **SMALL).eval()
    decoder.load_state_dict(head.decoder.state_dict())
    maps = [torch.randn(1, n, 64 // s, 96 // s) for n, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]
    with torch.no_grad():
        assert torch.equal(head(maps), head.conv_seg(decoder(maps)))
        assert torch.equal(head([*maps, torch.ones(1)]), head(maps))


@pytest.mark.parametrize("loader", ["torch", "mmengine"])
def test_official_checkpoint_loads_into_a_head(golden_dir: Path, loader: str) -> None:
    case = load_case(golden_dir, "vwformer_cityhead_convnext_t")
    channels = case.info["constructor"]["in_channels"]
    head = VWHead(channels, num_classes=19, form="cityscapes", norm_cfg={"type": "BN"}).eval()
    holder = nn.ModuleDict({"decode_head": head})
    counters = {key: torch.tensor(0) for key in case.info["skipped"]}
    checkpoint = {f"decode_head.{key}": value.float() for key, value in (case.weights | counters).items()}
    if loader == "torch":
        holder.load_state_dict(checkpoint)
    else:
        load_state_dict(holder, checkpoint, strict=True)
    with torch.no_grad():
        logits = head([case.inputs[f"feat{i}"].float() for i in range(4)])
    error = (logits[:, ::7, ::3, ::3] - case.expected["logits"]).abs().max()
    assert error < 3 * case.info["float32_max_abs_diff"]["logits"]


def test_own_checkpoint_loads_into_a_head() -> None:
    source, target = (VWHead(CHANNELS, 64, num_classes=5, decoder=SMALL) for _ in range(2))
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"Missing.*decoder\.merge\.convs\.0\.weight"):
        target.load_state_dict({k: v for k, v in source.state_dict().items() if "merge" not in k})


@pytest.mark.parametrize("height", [64, 75])
def test_pixel_decoders_keep_their_contract(height: int) -> None:
    maps = [torch.randn(1, n, -(-height // s), -(-96 // s)) for n, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]
    maskformer = MODELS.build(
        {"type": "VWMaskFormerPixelDecoder", "decoder": SMALL, "in_channels": CHANNELS}
        | {"feat_channels": 24, "out_channels": 64}
    ).eval()
    features, memory = maskformer(maps, [{}])
    assert features.shape == (1, 64, *maps[0].shape[2:])
    assert memory.shape == (1, 24, *maps[3].shape[2:])
    mask2former = MODELS.build(
        {"type": "VWMask2FormerPixelDecoder", "decoder": SMALL, "in_channels": CHANNELS}
        | {"feat_channels": 64, "out_channels": 64, "encoder": {"layer_cfg": {}}}
    ).eval()
    features, memories = mask2former(maps)
    assert features.shape == (1, 64, *maps[0].shape[2:])
    assert [x.shape for x in memories] == [(1, 64, *x.shape[2:]) for x in maps[:0:-1]]


@pytest.mark.parametrize("name", ["maskformer", "mask2former"])
def test_official_checkpoint_loads_into_a_pixel_decoder(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, f"vwformer_pixel_decoder_{name}_swin_t")
    kind = VWMask2FormerPixelDecoder if name == "mask2former" else VWMaskFormerPixelDecoder
    decoder = revert_sync_batchnorm(kind((96, 192, 384, 768), 256, 256)).eval()
    missing, unexpected = decoder.load_state_dict({k: v.float() for k, v in case.weights.items()}, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") or key.startswith("memory_proj.") for key in missing)
    with torch.no_grad():
        features, _ = decoder([case.inputs[f"feat{i}"].float() for i in range(4)])
    error = (features[:, ::7, ::3, ::3] - case.expected["mask_features"]).abs().max()
    assert error < 3 * case.info["float32_max_abs_diff"]["mask_features"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"form": "mask2former"}, "form is 'mask2former'"),
        ({"norm_cfg": {"type": "LN"}}, "norm_cfg is {'type': 'LN'}"),
        ({"in_channels": (8, 16)}, r"in_channels is \[8, 16\]"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    arguments = {"in_channels": CHANNELS, "in_index": range(len(kwargs.get("in_channels", CHANNELS))), **kwargs}
    with pytest.raises(ValueError, match=message):
        VWHead(channels=64, num_classes=5, decoder=SMALL, **arguments)


def test_mask2former_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match="feat_channels is 32, out_channels 64"):
        VWMask2FormerPixelDecoder(CHANNELS, 32, 64)
