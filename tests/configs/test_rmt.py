"""The ImageNet recipes of RMT are the authors', and Gated-SwinRMT trains on equal terms."""

from __future__ import annotations

import pytest
import torch

from vitrail.models.mm.runner import complete_config, optimizer_config
from vitrail.models.mm.samplers import RepeatedSampler
from vitrail.tools._common.configs import packaged_configs, read_config

DROP_PATH = {
    "rmt_t": 0.1,
    "rmt_s": 0.15,
    "rmt_b": 0.4,
    "rmt_l": 0.5,
    "gated_swinrmt_swat": 0.2,
    "gated_swinrmt_retention": 0.2,
}


@pytest.mark.parametrize("name", DROP_PATH)
def test_imagenet_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.models.mm.runner.get_dist_info", lambda: (0, 8))
    config = complete_config(read_config(packaged_configs()[f"imagenet/{name}"]))
    backbone = {"name": name, "num_classes": 1000, "drop_path_rate": DROP_PATH[name]}
    assert config.model.backbone.to_dict() == backbone
    optimizer = optimizer_config(config, torch.device("cpu"), None)["optimizer"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (pytest.approx(2e-3), 0.05)
    assert config.train_dataloader.batch_size == 256
    assert config.train_dataloader.sampler.type == RepeatedSampler.__name__
    assert config.train_cfg.max_epochs == 310
    assert not config.optim_wrapper.get("clip_grad")
    (average,) = (hook for hook in config.custom_hooks if hook.type == "EMAHook")
    # The authors' decay is for 512 images and raised to the power of the batch's multiple.
    assert average.momentum == pytest.approx(1 - 0.99996 ** (8 * 256 / 512), rel=1e-3)
    assert config.val_dataloader.dataset.transform.crop_pct == 0.875  # 224 of 256 pixels
