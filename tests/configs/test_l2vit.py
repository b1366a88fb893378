"""The ImageNet recipes of L2ViT are the author's."""

from __future__ import annotations

import pytest
import torch

from vitrail.models.mm.runner import complete_config, optimizer_config
from vitrail.tools._common.configs import packaged_configs, read_config


@pytest.mark.parametrize(("name", "drop_path"), [("l2vit_t", 0.1), ("l2vit_s", 0.2), ("l2vit_b", 0.3)])
def test_imagenet_recipe(name: str, drop_path: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.models.mm.runner.get_dist_info", lambda: (0, 8))
    config = complete_config(read_config(packaged_configs()[f"imagenet/{name}"]))
    assert config.model.backbone.to_dict() == {"name": name, "num_classes": 1000, "drop_path_rate": drop_path}
    optimizer = optimizer_config(config, torch.device("cpu"), None)["optimizer"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (pytest.approx(4e-3), 0.05)
    assert 8 * config.train_dataloader.batch_size == 4096
    assert config.train_cfg.max_epochs == 300
    (average,) = (hook for hook in config.custom_hooks if hook.type == "EMAHook")
    assert average.momentum == pytest.approx(1e-4)
