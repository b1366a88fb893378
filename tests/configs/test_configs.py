"""Every config of a classifier builds: model, optimizer groups, schedule and transforms; only the data are made up."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from mmengine.registry import PARAM_SCHEDULERS
from PIL import Image
from timm.data import Mixup, create_transform

import vitrail  # noqa: F401 -- registers the models
from vitrail.models.mm.optim import TimmOptimWrapperConstructor
from vitrail.models.mm.runner import complete_config, optimizer_config
from vitrail.models.mm.samplers import RepeatedSampler
from vitrail.tools._common.configs import packaged_configs, read_config

# These have tests of their own.
DENSE = ("ade20k/", "camvid/", "cityscapes/", "coco/", "coco_sample/", "kitti/", "nuscenes/", "waymo/")
NAMES = sorted(name for name in packaged_configs() if not name.startswith(DENSE))
STEPS_PER_EPOCH = 4
EXPONENTIAL = {"imagenet/mobilenetv2_ela_l"}  # no warm-up, a tenth of the rate at the end
LAST_RATE = {"imagenet/l2vit_t": 1e-6, "imagenet/l2vit_s": 1e-6, "imagenet/l2vit_b": 1e-6}  # the others: 1e-5

# name: (classes, pixels, drop path, learning rate at 8 processes, epochs)
IMAGENET = {
    "biformer_t": (224, 0.1, 1e-3, 300),
    "biformer_s": (224, 0.15, 1e-3, 300),
    "biformer_b": (224, 0.4, 1e-3, 300),
    "biformer_stl": (224, 0.1, 1e-3, 300),
    "davit_t": (224, 0.1, 1e-3, 310),
    "davit_s": (224, 0.2, 1e-3, 310),
    "davit_b": (224, 0.4, 1e-3, 310),
    "davit_l": (384, 0.4, 2.5e-4, 310),
}


def _config(name: str) -> Any:
    return complete_config(read_config(packaged_configs()[name]))


def test_the_expected_configs_are_packaged() -> None:
    expected = {f"imagenet/{name}" for name in IMAGENET}
    assert expected | {"digits/biformer_n", "cifar10/biformer_n", "imagenette/biformer_n"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_model_and_optimizer_build(name: str) -> None:
    config = _config(name)
    arguments = config.model.backbone.to_dict()
    entry = arguments.pop("name")
    if not timm.is_model(entry):
        pytest.fail(f"{entry} is not registered")
    with torch.device("meta"):
        model = timm.create_model(entry, **arguments)
    wrapper = optimizer_config(config, torch.device("cpu"), None)
    holder = type("Holder", (), {"backbone": model})
    optimizer = TimmOptimWrapperConstructor(wrapper).build_optimizer(holder)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    spared = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    exempt = getattr(model, "no_weight_decay", set)()
    sparable = {id(p) for name, p in model.named_parameters() if p.ndim <= 1 or name in exempt}
    assert all(id(parameter) in sparable for group in spared for parameter in group["params"])
    assert bool(spared) == config.optim_wrapper.optimizer.get("filter_bias_and_bn", True)


@pytest.mark.parametrize("name", NAMES)
def test_schedule_warms_up_and_ends_low(name: str) -> None:
    config = _config(name)
    parameter = torch.nn.Parameter(torch.zeros(1))
    base = config.optim_wrapper.optimizer.lr
    optimizer = torch.optim.AdamW([parameter], lr=base)
    schedulers = [
        PARAM_SCHEDULERS.build(
            {**part, "optimizer": optimizer, "epoch_length": STEPS_PER_EPOCH},
        )
        if not part.get("convert_to_iter_based")
        else PARAM_SCHEDULERS.get(part["type"]).build_iter_from_epoch(
            optimizer=optimizer, epoch_length=STEPS_PER_EPOCH,
            **{key: value for key, value in part.items() if key not in ("type", "convert_to_iter_based")},
        )
        for part in config.param_scheduler.copy()
    ]  # fmt: skip
    rates = []
    for _ in range(config.train_cfg.max_epochs * STEPS_PER_EPOCH):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for part, scheduler in zip(config.param_scheduler, schedulers, strict=True):
            if part.get("convert_to_iter_based") or len(rates) % STEPS_PER_EPOCH == 0:
                scheduler.step()
    assert max(rates) == pytest.approx(base, rel=0.02)
    if name in EXPONENTIAL:
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(0.1 * base, rel=0.02)
        return
    assert rates[0] < 0.05 * base
    assert rates[-1] == pytest.approx(LAST_RATE.get(name, 1e-5), rel=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_transforms_and_mixing_build(name: str) -> None:
    config = _config(name)
    picture = Image.new("RGB", (400, 320), (120, 60, 30))
    train = create_transform(**config.train_dataloader.dataset.transform.to_dict())(picture)
    val = create_transform(**config.val_dataloader.dataset.transform.to_dict())(picture)
    assert train.shape == val.shape
    if config.model.get("mixup"):
        images, targets = Mixup(num_classes=10, **config.model.mixup)(torch.stack([train, val]), torch.tensor([1, 2]))
        assert images.shape[0] == 2
        assert torch.allclose(targets.sum(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.models.mm.runner.get_dist_info", lambda: (0, 8))
    config = _config(f"imagenet/{name}")
    pixels, drop_path, rate, epochs = IMAGENET[name]
    assert config.model.backbone.to_dict() == {"name": name, "num_classes": 1000, "drop_path_rate": drop_path}
    assert config.train_dataloader.dataset.transform.input_size == pixels
    assert config.train_cfg.max_epochs == epochs
    optimizer = optimizer_config(config, torch.device("cpu"), None)["optimizer"]
    assert optimizer["lr"] == pytest.approx(rate)
    assert optimizer["weight_decay"] == 0.05
    repeated = config.train_dataloader.sampler.type == RepeatedSampler.__name__
    averaged = any(hook.type == "EMAHook" for hook in config.custom_hooks)
    assert repeated == averaged == name.startswith("biformer")
    assert bool(config.optim_wrapper.get("clip_grad")) == name.startswith("davit")
    assert config.train_dataloader.dataset.source.root == "data/imagenet"


@pytest.mark.parametrize("name", NAMES)
def test_config_is_flat_and_cites_its_source(name: str) -> None:
    text = packaged_configs()[name].read_text()
    assert "Source" in text
    base = re.search(r'^_base_ = "(.+)"$', text, re.MULTILINE)
    assert base is None or "_base_" not in (packaged_configs()[name].parent / base[1]).read_text()
