"""VWFormer's configs: backbone and head fit, heads have the published sizes and a loss, data pass the pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")

import mmseg.datasets  # noqa: F401 -- registers data sets and transforms
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import DATASETS
from mmseg.registry import MODELS as MMSEG_MODELS
from mmseg.structures import SegDataSample

from vitrail.layers.varying_window import VaryingWindowAttention
from vitrail.models.mm import backbone, optim, vwformer  # noqa: F401 -- they register their parts
from vitrail.tools._common.configs import packaged_configs

CONFIGS = {name: path for name, path in packaged_configs().items() if re.match("(ade20k|cityscapes)/vwformer_", name)}
# name: parameters of the head, of the pixel decoder in the forms for masks (published where the source counts them)
PARAMETERS = {
    "ade20k/vwformer_convnext_t": 7_624_726,
    "ade20k/vwformer_convnext_s": 7_624_726,
    "ade20k/vwformer_convnext_b": 7_855_638,
    "ade20k/vwformer_convnext_l": 8_317_462,
    "ade20k/vwformer_convnext_xl": 8_779_286,
    "ade20k/vwformer_swin_b": 7_855_638,
    "ade20k/vwformer_swin_l": 8_317_462,
    "cityscapes/vwformer_convnext_t": 7_032_259,
    "cityscapes/vwformer_convnext_s": 7_032_259,
    "cityscapes/vwformer_convnext_b": 7_263_171,
    "cityscapes/vwformer_convnext_l": 7_724_995,
    "cityscapes/vwformer_convnext_xl": 8_186_819,
    "ade20k/vwformer_maskformer_swin_t": 7_397_976,
    "ade20k/vwformer_maskformer_swin_s": 7_397_976,
    "ade20k/vwformer_maskformer_swin_b": 7_628_888,
    "ade20k/vwformer_maskformer_swin_l": 8_090_712,
    "ade20k/vwformer_mask2former_swin_t": 7_743_576,
    "ade20k/vwformer_mask2former_swin_s": 7_743_576,
    "ade20k/vwformer_mask2former_swin_b": 8_089_176,
    "ade20k/vwformer_mask2former_swin_l": 8_780_376,
}


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS[name], import_custom_modules=False)


def of_masks(name: str) -> bool:
    return "_mask" in name


def form_of(name: str) -> str:
    return next((form for form in ("mask2former", "maskformer") if form in name), name.split("/")[0])


def test_the_expected_configs_are_packaged() -> None:
    assert CONFIGS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_backbone_and_head_fit(name: str) -> None:
    config = read(name).model
    with torch.device("meta"):
        backbone = MODELS.build(config.backbone)
    assert backbone.pretrained
    assert timm.get_pretrained_cfg(backbone.name).hf_hub_id
    assert list(config.decode_head.in_channels) == backbone.channels
    assert backbone.reductions == [4, 8, 16, 32]


@pytest.mark.parametrize("name", PARAMETERS)
def test_head_has_the_published_size(name: str) -> None:
    head = read(name).model.decode_head
    with torch.device("meta"), DefaultScope.overwrite_default_scope("mmseg"):
        if of_masks(name):
            widths = {key: head[key] for key in ("in_channels", "feat_channels", "out_channels")}
            counted = MODELS.build({**head.pixel_decoder, **widths}).decoder
        else:
            counted = MODELS.build(head)
    assert sum(p.numel() for p in counted.parameters()) == PARAMETERS[name]
    assert head.num_classes == (19 if name.startswith("cityscapes") else 150)
    attentions = [module for module in counted.modules() if isinstance(module, VaryingWindowAttention)]
    heads = 8 if name == "ade20k/vwformer_maskformer_swin_b" else 16 if form_of(name) != "ade20k" else 1
    with_shortcut = {"ade20k": "convnext|swin_b", "maskformer": "swin_t"}.get(form_of(name), "none")
    assert [layer.ratio for layer in attentions] == [2, 4, 8]
    assert {layer.num_heads for layer in attentions} == {heads}
    assert {layer.shortcut for layer in attentions} == {bool(re.search(with_shortcut, name))}


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.endswith("_t")])
def test_segmenter_has_a_loss_and_predicts(name: str) -> None:
    if of_masks(name):
        pytest.importorskip("mmdet", reason="needs onedl-mmdetection: pip install vitrail[mm]")
    config = read(name)
    with DefaultScope.overwrite_default_scope("mmseg"):
        segmenter = MMSEG_MODELS.build(config.model).train()
    images = torch.randn(2, 3, 64, 96)
    samples = [_sample(64, 96) for _ in range(2)]
    losses = segmenter.loss(images, samples)
    total = sum(value for key, value in losses.items() if "loss" in key)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmenter.parameters())
    with torch.no_grad():
        (first, _) = segmenter.eval().predict(images, samples)
    assert first.pred_sem_seg.data.shape == (1, 64, 96)


def _sample(height: int, width: int) -> SegDataSample:
    sample = SegDataSample(
        metainfo=dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (height, width))
    )
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, height, width)))
    return sample


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("ade20k") and name[-1] in "tb"])
def test_real_images_pass_the_pipelines(name: str, data_dir: Path) -> None:
    config = read(name)
    crop = 512 if name.endswith("_t") else 640
    with DefaultScope.overwrite_default_scope("mmseg"):
        train, val = (_dataset(config[f"{split}_dataloader"].dataset, data_dir) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    packed = train[0]
    assert packed["inputs"].shape == (3, crop, crop)
    assert config.model.data_preprocessor["size"] == (crop, crop)
    labels = packed["data_samples"].gt_sem_seg.data.unique().tolist()
    assert set(labels) <= {*range(150), 255}
    assert len(labels) > 2
    height, width = val[0]["inputs"].shape[1:]
    assert min(height, width) >= crop
    assert of_masks(name) or height % 64 == width % 64 == 0


def _dataset(config: Any, data_dir: Path) -> Any:
    return DATASETS.build({**config, "data_root": str(data_dir / "ade20k_sample")})


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe(name: str) -> None:
    config = read(name)
    with DefaultScope.overwrite_default_scope("mmseg"):
        for split in ("train", "val"):
            Compose(config[f"{split}_dataloader"].dataset.pipeline)
    optimizer = config.optim_wrapper.optimizer
    maskformer = "/vwformer_maskformer" in name
    assert (optimizer.lr, optimizer.weight_decay) == ((6e-5, 0.01) if maskformer else (1e-4, 0.05))
    assert config.model.backbone.drop_path_rate == (0.4 if "convnext" in name else 0.3)
    assert config.train_cfg.max_iters == 160_000
    assert 4 * config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == 16
    assert "auxiliary_head" not in config.model


@pytest.mark.parametrize(
    ("name", "least", "rates"),
    [
        ("ade20k/vwformer_convnext_t", 1e-4 * 0.9**5, 6),  # stem, four stages, head
        ("ade20k/vwformer_swin_b", 1e-4 * 0.85**13, 26),  # stem, 24 blocks, head; 12 groups of the authors' and theirs
        ("ade20k/vwformer_maskformer_swin_t", 6e-5, 1),
        ("ade20k/vwformer_mask2former_swin_t", 1e-5, 2),
    ],
)
def test_learning_rates_fall_towards_the_image(name: str, least: float, rates: int) -> None:
    config = read(name)
    with torch.device("meta"), DefaultScope.overwrite_default_scope("mmseg"):
        segmenter = MMSEG_MODELS.build(config.model)
        optimizer = build_optim_wrapper(segmenter, config.optim_wrapper).optimizer
    given = sorted({group["lr"] for group in optimizer.param_groups})
    assert given[0] == pytest.approx(least, rel=0.05)
    assert given[-1] == config.optim_wrapper.optimizer.lr
    assert len(given) == rates
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in segmenter.parameters())


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.endswith("_t")])
def test_schedule_warms_up_and_ends_at_zero(name: str) -> None:
    config = read(name)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedulers = [PARAM_SCHEDULERS.build({**part, "optimizer": optimizer}) for part in config.param_scheduler]
    optimizer.step()
    rates = {}
    for iteration in range(config.train_cfg.max_iters):
        rates[iteration] = optimizer.param_groups[0]["lr"]
        for scheduler in schedulers:
            scheduler.step()
    assert (rates[0] < 1e-5) == ("mask2former" not in name)
    assert rates[1500] == pytest.approx(1.0, abs=0.02)
    assert rates[80_000] == pytest.approx(0.5, abs=0.05)
    assert rates[159_999] < 1e-4


@pytest.mark.parametrize("name", PARAMETERS)
def test_config_is_flat_and_cites_its_source(name: str) -> None:
    text = CONFIGS[name].read_text()
    assert "Source" in text
    (bases,) = re.findall(r"^_base_ = (.+)$", text, re.MULTILINE)
    for base in re.findall(r'"([^"]+)"', bases):
        base_text = (CONFIGS[name].parent / base).read_text()
        assert "_base_" not in base_text
        assert "Source" in base_text
