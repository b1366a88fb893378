"""The ImageNet recipes of VSA: as published where a script is, and on equal terms for the plain twins."""

from __future__ import annotations

import pytest
import torch

from vitrail.models.mm.runner import complete_config, optimizer_config
from vitrail.tools._common.configs import packaged_configs, read_config

# name: (drop path, weight decay, processes, epochs, images for each process)
RECIPES = {
    "vsa_swin_t": (0.2, 0.05, 8, 300, 128),
    "vsa_swin_s": (0.3, 0.05, 8, 300, 128),
    "vsa_swin_b": (0.5, 0.05, 8, 300, 128),
    "swin_t": (0.2, 0.05, 8, 300, 128),
    "swin_s": (0.3, 0.05, 8, 300, 128),
    "swin_b": (0.5, 0.05, 8, 300, 128),
    "vsa_vitae_s": (0.1, 0.05, 8, 310, 128),
    "vsa_vitae_48m": (0.25, 0.055, 16, 310, 64),
    "vsa_vitae_b": (0.3, 0.055, 16, 310, 64),
}


@pytest.mark.parametrize("name", RECIPES)
def test_imagenet_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_path, weight_decay, processes, epochs, images = RECIPES[name]
    monkeypatch.setattr("vitrail.models.mm.runner.get_dist_info", lambda: (0, processes))
    config = complete_config(read_config(packaged_configs()[f"imagenet/{name}"]))
    backbone = {"name": name, "num_classes": 1000, "drop_path_rate": drop_path}
    assert config.model.backbone.to_dict() == backbone
    optimizer = optimizer_config(config, torch.device("cpu"), None)["optimizer"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (pytest.approx(1e-3), weight_decay)
    assert config.train_dataloader.batch_size == images
    assert config.train_cfg.max_epochs == epochs
    (average,) = (hook for hook in config.custom_hooks if hook.type == "EMAHook")
    if "vitae" in name:
        # The authors' decay is for 512 images and raised to the power of the batch's multiple.
        assert average.momentum == pytest.approx(1 - 0.99996**2, rel=1e-3)
        assert not config.optim_wrapper.get("clip_grad")
        assert config.val_dataloader.dataset.transform.crop_pct == 0.9
    else:
        assert average.momentum == pytest.approx(1 - 0.99996)
        assert config.optim_wrapper.clip_grad.max_norm == 5.0
        assert config.val_dataloader.dataset.transform.crop_pct == 0.875  # 224 of 256 pixels


def test_twins_train_on_equal_terms() -> None:
    for size in "tsb":
        ours, twin = (read_config(packaged_configs()[f"imagenet/{name}_{size}"]) for name in ("vsa_swin", "swin"))
        assert twin.model.backbone.name == f"swin_{size}"
        twin.model.backbone.name = ours.model.backbone.name
        assert ours.to_dict() == twin.to_dict()
