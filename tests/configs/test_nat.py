"""The ImageNet recipes of NAT, DiNAT and DiNAT_s."""

from __future__ import annotations

import pytest
import torch

from vitrail.models.mm.runner import complete_config, optimizer_config
from vitrail.tools._common.configs import packaged_configs, read_config

DROP_PATH = {"mini": 0.2, "t": 0.2, "s": 0.3, "b": 0.5}
NAMES = [f"{family}_{size}" for family in ("nat", "dinat", "dinats") for size in DROP_PATH]
NAMES.remove("dinats_mini")


@pytest.mark.parametrize("name", NAMES)
def test_imagenet_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.models.mm.runner.get_dist_info", lambda: (0, 8))
    config = complete_config(read_config(packaged_configs()[f"imagenet/{name}"]))
    backbone = {"name": name, "num_classes": 1000, "drop_path_rate": DROP_PATH[name.rpartition("_")[2]]}
    assert config.model.backbone.to_dict() == backbone
    optimizer = optimizer_config(config, torch.device("cpu"), None)["optimizer"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (pytest.approx(1e-3), 0.05)
    assert config.train_dataloader.batch_size == 128
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    assert config.train_cfg.max_epochs == 310
    warm_up, cosine = config.param_scheduler
    assert (warm_up.end, warm_up.start_factor * 1e-3) == (20, pytest.approx(1e-6))
    assert (cosine.end, cosine.eta_min) == (300, 5e-6)
    assert not [hook for hook in config.get("custom_hooks", []) if hook.type == "EMAHook"]
