"""The ImageNet recipe of MobileNetV2 with ELA is the author's script with its defaults."""

from __future__ import annotations

import pytest
import timm
import torch

import vitrail  # noqa: F401 -- registers the models
from vitrail.models.mm.optim import TimmOptimWrapperConstructor
from vitrail.models.mm.runner import complete_config, optimizer_config
from vitrail.tools._common.configs import packaged_configs, read_config


def test_imagenet_recipe_is_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.models.mm.runner.get_dist_info", lambda: (0, 2))
    config = complete_config(read_config(packaged_configs()["imagenet/mobilenetv2_ela_l"]))
    model = timm.create_model("mobilenetv2_ela_l", device="meta")
    holder = type("Holder", (), {"backbone": model})
    wrapper = optimizer_config(config, torch.device("cpu"), None)
    optimizer = TimmOptimWrapperConstructor(wrapper).build_optimizer(holder)
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.9, 1e-4, False)
    assert config.train_dataloader.batch_size == 128
    assert config.train_cfg.max_epochs == 200
    assert config.model.backbone.to_dict() == {"name": "mobilenetv2_ela_l", "num_classes": 1000, "drop_rate": 0.1}
    assert not config.model.get("mixup")
    assert not config.model.get("label_smoothing")
