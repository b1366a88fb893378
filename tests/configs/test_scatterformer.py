"""The configs of detectors for scans: sizes, ranges, schedules, and real data through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitrail.models.mm.dense_runner import build_dataset, build_model, complete_dense_config
from vitrail.tools._common.configs import packaged_configs, read_config

NAMES = [
    "kitti/scatterformer_kitti",
    "kitti/scatterformer_sample",
    "nuscenes/scatterformer_nuscenes",
    "waymo/scatterformer_waymo",
]


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name: str) -> None:
    config = read_config(packaged_configs()[name])
    with torch.device("meta"):
        model = build_model(config)
    for loader in (config.train_dataloader, config.val_dataloader):
        assert tuple(loader.dataset.classes) == model.bbox_head.classes
        assert tuple(loader.dataset.point_range) == model.bbox_head.point_range
    counts = (config.train_dataloader.dataset.get("objects") or {}).get("counts", {})
    assert set(counts) <= set(model.bbox_head.classes)
    assert model.backbone.num_features == model.bbox_head.shared[0].in_channels
    assert config.param_scheduler[-1].end == config.param_scheduler[1].end == config.train_cfg.max_epochs
    assert "Source of the recipe" in packaged_configs()[name].read_text()


def test_waymo_has_the_published_size() -> None:
    with torch.device("meta"):
        model = build_model(read_config(packaged_configs()["waymo/scatterformer_waymo"]))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sizes["neck"] == 7_751_680
    assert sizes["bbox_head"] == 302_732
    assert sizes["backbone"] == 4_640 + 4_241_856


@pytest.mark.parametrize("name", ["kitti/scatterformer_kitti", "waymo/scatterformer_waymo"])
def test_one_cycle(name: str) -> None:
    from mmengine.registry import PARAM_SCHEDULERS

    config = read_config(packaged_configs()[name])
    settings = dict(config.optim_wrapper.optimizer)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], settings["lr"], settings["betas"])
    length, epochs = 10, config.train_cfg.max_epochs
    schedulers = []
    for part in config.param_scheduler:
        part = {key: value for key, value in part.items() if key != "convert_to_iter_based"}
        kind = PARAM_SCHEDULERS.get(part.pop("type"))
        schedulers.append(kind.build_iter_from_epoch(optimizer, epoch_length=length, **part))
    rates, momenta = [], []
    for _ in range(length * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    top = config.param_scheduler[0].eta_min
    assert settings["lr"] == pytest.approx(top / 100)
    assert rates[0] == pytest.approx(top / 100)
    assert max(rates) == pytest.approx(top, rel=0.01)
    assert rates.index(max(rates)) / len(rates) == pytest.approx(0.1, abs=0.01)
    assert rates[-1] < top / 1e4
    assert momenta[0] == 0.95
    assert min(momenta) == pytest.approx(0.85, abs=1e-3)
    assert momenta.index(min(momenta)) / len(momenta) == pytest.approx(0.1, abs=0.02)
    assert momenta[-1] == pytest.approx(0.95, abs=1e-3)


def test_the_sample_scans_go_through(data_dir: Path) -> None:
    config = read_config(packaged_configs()["kitti/scatterformer_sample"])
    config.merge_from_dict({"data_root": str(data_dir / "pointclouds/kitti")})
    config = complete_dense_config(config)
    dataset = build_dataset(config, "val_dataloader")
    assert len(dataset) == 4
    labels = torch.cat([dataset[i]["data_samples"]["labels"] for i in range(4)])
    ignored = torch.cat([dataset[i]["data_samples"]["ignored"] for i in range(4)])
    assert ((labels == 0) & ~ignored).sum() == 8  # the cars of the goal
    assert len(build_dataset(config, "train_dataloader")) == 80
