"""What the runner of detectors and segmenters makes of a config, and which weights its models take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

pytest.importorskip("mmcv", reason="needs onedl-mmcv: pip install vitrail[mm]")

from vitrail.models.mm import dense_runner
from vitrail.models.mm.backbone import VitrailBackbone
from vitrail.models.mm.checkpoint import CheckpointError
from vitrail.models.mm.dense_hooks import DenseProgressHook
from vitrail.models.mm.dense_runner import DenseRunner, check_classes, complete_dense_config, load_dense_weights


def _config(**changes: Any) -> Config:
    dataset = {"type": "CocoDataset", "data_root": "data/coco/", "ann_file": "annotations/a.json"}
    loader = {"batch_size": 2, "num_workers": 0, "persistent_workers": True, "dataset": dataset}
    wrapped = {"type": "RepeatDataset", "times": 2, "dataset": dataset}
    config = {
        "default_scope": "mmdet",
        "data_root": "data/coco",
        "model": {"type": "X", "backbone": {"type": "VitrailBackbone", "pretrained": True}},
        "train_dataloader": {**loader, "dataset": wrapped},
        "val_dataloader": {**loader, "num_workers": 2},
        "val_evaluator": [{"type": "CocoMetric", "ann_file": "data/coco/annotations/a.json", "note": "data/coco2"}],
        "optim_wrapper": {"type": "OptimWrapper"},
        "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 12},
    }
    return Config({**config, **changes})


def test_the_root_at_the_top_reaches_data_sets_and_metrics() -> None:
    config = complete_dense_config(_config(data_root="/elsewhere/coco/"))
    assert config.train_dataloader.dataset.dataset.data_root == "/elsewhere/coco/"
    assert config.val_dataloader.dataset.data_root == "/elsewhere/coco/"
    assert config.test_dataloader.dataset.data_root == "/elsewhere/coco/"
    assert config.val_evaluator[0].ann_file == "/elsewhere/coco/annotations/a.json"
    assert config.val_evaluator[0].note == "data/coco2"
    assert complete_dense_config(_config()).val_evaluator[0].ann_file == "data/coco/annotations/a.json"


def test_workers_persist_where_there_are_any() -> None:
    config = complete_dense_config(_config())
    assert [config[name].persistent_workers for name in ("train_dataloader", "val_dataloader")] == [False, True]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"interval": 1, "by_epoch": True, "score": "coco/bbox_mAP"}),
        (
            {"train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 9, "val_interval": 4}},
            {"interval": 4, "by_epoch": False, "score": "coco/bbox_mAP"},
        ),
        (
            {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 3, "save_best": "coco/segm_mAP"}}},
            {"interval": 3, "by_epoch": True, "score": "coco/segm_mAP"},
        ),
        ({"default_scope": "mmseg"}, {"interval": 1, "by_epoch": True, "score": "mIoU"}),
    ],
)
def test_checkpoints_are_ours(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = complete_dense_config(_config(**changes))
    again = complete_dense_config(config)  # as it is written to the work folder
    for completed in (config, again):
        assert completed.default_hooks.checkpoint.to_dict() == {"type": "DenseCheckpointHook", **expected}


def test_starting_weights_are_not_read_on_resumption() -> None:
    assert "pretrained" not in complete_dense_config(_config(), resumes=True).model.backbone
    assert complete_dense_config(_config()).model.backbone.pretrained


def test_lacking_parts_are_named() -> None:
    with pytest.raises(ValueError, match="the config has no model, val_evaluator"):
        complete_dense_config(_config(model={}, val_evaluator=None))


def test_class_counts_of_all_stages_are_checked() -> None:
    model = nn.Module()
    model.roi_head = nn.Module()
    model.roi_head.bbox_head = nn.ModuleList([nn.Module(), nn.Module()])
    model.rpn_head = nn.Module()
    model.rpn_head.num_classes = 1  # object or not
    for stage in model.roi_head.bbox_head:
        stage.num_classes = 2
    check_classes(model, ("cat", "dog"))
    model.roi_head.bbox_head[1].num_classes = 3
    with pytest.raises(
        ValueError, match=r"roi_head\.bbox_head\.1 has num_classes=3, the data have 2 classes: cat, dog"
    ):
        check_classes(model, ("cat", "dog"))


class _Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = VitrailBackbone("biformer_n")
        self.neck = nn.Linear(2, 2)


def test_detectors_load_under_the_names_of_the_backbones_authors() -> None:
    source, target = _Detector(), _Detector()
    weights = source.state_dict()
    official = {key.replace("backbone.model.", "backbone."): value for key, value in weights.items()}
    official = {key.replace("backbone.norms.", "backbone.extra_norms."): value for key, value in official.items()}
    for layout in (weights, official):
        nn.init.zeros_(target.neck.weight)
        load_dense_weights(target, layout, "x.pth")
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    del official["neck.bias"]
    with pytest.raises(CheckpointError, match=r"x\.pth does not fit the model: Missing key.*neck\.bias"):
        load_dense_weights(target, official, "x.pth")


def test_validations_left() -> None:
    def left(done: int, iterative: bool, **lengths: int) -> int:
        runner = SimpleNamespace(is_iterative=iterative, **lengths)
        return DenseRunner.validations_left(runner, done)

    assert [left(done, True, max_iters=10, val_interval=4) for done in (0, 3, 4, 8, 9, 10)] == [3, 3, 2, 1, 1, 0]
    epochs = {"max_iters": 60, "max_epochs": 6, "val_interval": 2}
    assert [left(done, False, **epochs) for done in (0, 19, 20, 59, 60)] == [3, 3, 2, 1, 0]


def test_shown_loss_moves_with_the_newest_ones() -> None:
    hook = DenseProgressHook(console=None, score="mIoU")
    mean = None
    for i in range(400):
        mean = hook._average(mean, 10.0 if i < 200 else 1.0, i)
    assert 1.0 < mean < 1.5
    assert hook._describe_score({"mIoU": 41.234}) == "mIoU 41.23"
    assert hook._describe_score({}) is None


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(dense_runner.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"the config needs mmseg .*pip install 'vitrail\[mm\]'"):
        dense_runner.register_library("mmseg")


def test_the_backbone_stands_in_the_root_registry() -> None:
    assert MODELS.get("VitrailBackbone") is VitrailBackbone
