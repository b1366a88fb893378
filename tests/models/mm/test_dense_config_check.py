"""Wrong values of a segmenter's config are named before a run begins."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from vitrail.models.mm import dense_config_check as check
from vitrail.models.mm.dense_runner import build_model, complete_dense_config, is_dense, load_dense_weights
from vitrail.tools._common.cli import UsageError
from vitrail.tools._common.configs import packaged_configs, read_config

NAME = "camvid/upernet_biformer_n"


@functools.cache
def _plain() -> Config:
    return read_config(packaged_configs()[NAME])


def _config(changes: dict[str, Any]) -> Config:
    config = _plain().copy()
    config.merge_from_dict(changes)
    return complete_dense_config(config)


@pytest.mark.parametrize(
    "name", ["camvid/upernet_biformer_n", "coco/mask_rcnn_davit_t_1x", "kitti/scatterformer_kitti"]
)
def test_packaged_configs_pass(name: str) -> None:
    check.check_settings(complete_dense_config(read_config(packaged_configs()[name])))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_cfg.max_iters", "abc", r"train_cfg\.max_iters is 'abc'; allowed: integers of at least 1"),
        ("train_cfg.max_iters", 0, r"train_cfg\.max_iters is 0"),
        ("train_cfg.max_iters", 1.5, r"train_cfg\.max_iters is 1\.5"),
        ("train_cfg.val_interval", 0, r"train_cfg\.val_interval is 0"),
        ("train_cfg.max_itres", 3, r"train_cfg: .*'max_itres'"),
        ("train_cfg.type", "IterLoop", r"train_cfg: type 'IterLoop' does not exist"),
        ("default_hooks.checkpoint.interval", 0, r"default_hooks\.checkpoint\.interval is 0"),
        ("default_hooks.logger.interval", "abc", r"default_hooks\.logger\.interval is 'abc'"),
        ("randomness.seed", "abc", r"randomness\.seed is 'abc'"),
        ("train_dataloader.batch_size", "abc", r"train_dataloader\.batch_size is 'abc'"),
        ("train_dataloader.batch_size", 0, r"train_dataloader\.batch_size is 0; allowed: integers of at least 1"),
        ("val_dataloader.num_workers", 2.5, r"val_dataloader\.num_workers is 2\.5; allowed: integers of at least 0"),
        ("val_evaluator.iou_metrics", ["mIou"], r"val_evaluator\.iou_metrics has 'mIou'; allowed: mIoU, mDice"),
        ("model.data_preprocessor.size", "abc", r"size is 'abc'; allowed: \(height, width\)"),
        ("model.data_preprocessor.size", (256, 128), r"crop_size \(256, 256\), which does not fit .* \(256, 128\)"),
        ("model.decode_head.ignore_index", 255, r"ignore_index is 255, but masks are padded with .*seg_pad_val=11"),
    ],
)
def test_numbers_out_of_range(key: str, value: Any, message: str) -> None:
    with DefaultScope.overwrite_default_scope("mmseg"), pytest.raises(ValueError, match=message):
        check.check_settings(_config({key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim_wrapper.optimizer.lr": "abc"}, r"optim_wrapper: '<=' not supported .*'float' and 'str'"),
        ({"optim_wrapper.optimizer.lr": -1}, r"optim_wrapper: Invalid learning rate: -1"),
        ({"optim_wrapper.optimizer.learning_rate": 1}, r"optim_wrapper: .*'learning_rate'"),
        ({"optim_wrapper.optimizer.type": "Adamw"}, r"optim_wrapper: optimizer type 'Adamw' does not exist"),
        ({"optim_wrapper.clip": 1}, r"optim_wrapper: .*'clip'"),
        ({"optim_wrapper.clip_grad.norm": 1}, r"optim_wrapper: .*'norm'"),
        ({"param_scheduler.0.end": -3}, r"param_scheduler\.0: end should be larger than begin"),
        ({"param_scheduler.1.ende": 3}, r"param_scheduler\.1: .*'ende'"),
        ({"param_scheduler.0.type": "Linear"}, r"param_scheduler\.0: Linear is not in the .* registry\.$"),
        ({"default_hooks.logger.every": 3}, r"default_hooks\.logger: .*'every'"),
        ({"custom_hooks": [{"type": "NoHook"}]}, r"custom_hooks\.0: NoHook is not in"),
        ({"val_evaluator.type": "IoU"}, r"val_evaluator: IoU is not in"),
    ],
)
def test_parts_that_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    import mmseg.evaluation  # noqa: F401 -- registers the metric

    config, model = _config(changes), nn.Conv2d(1, 1, 1)
    with DefaultScope.overwrite_default_scope("mmseg"), pytest.raises(ValueError, match=message):
        check.check_builds(config, config.to_dict()["optim_wrapper"], model)


def test_parts_of_the_packaged_config_are_built() -> None:
    import mmseg.evaluation  # noqa: F401 -- registers the metric

    config = _config({})
    with DefaultScope.overwrite_default_scope("mmseg"):
        check.check_builds(config, config.to_dict()["optim_wrapper"], nn.Conv2d(1, 1, 1))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_channels_and_weights_must_fit() -> None:
    with torch.device("meta"):
        model = build_model(_config({}))
        check.check_channels(model)
        wrong = build_model(_config({"model.auxiliary_head.in_channels": 64}))
    with pytest.raises(ValueError, match=r"auxiliary_head\.in_channels is \[64\], the backbone's maps have \[128\]"):
        check.check_channels(wrong)
    weights = dict(model.state_dict())
    shape = tuple(weights["decode_head.conv_seg.weight"].shape)
    weights["decode_head.conv_seg.weight"] = torch.empty(7, *shape[1:], device="meta")
    with pytest.raises(
        ValueError, match=r"size mismatch for decode_head\.conv_seg\.weight: .* is \[7, .*model's \[11,"
    ):
        load_dense_weights(model, weights, "w.pth")
    with pytest.raises(ValueError, match=r"Missing keys \S+, \S+ and \d+ more; Unexpected keys x$"):
        load_dense_weights(model, {"x": torch.zeros(1)}, "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth holds no weights"):
        load_dense_weights(model, {}, "w.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trian_cfg.max_iters=3", r"unknown part of a config 'trian_cfg'; nearest names: train_cfg"),
        ("crop_size=(64,64)", r"crop_size is a variable of the config file, which has been read"),
        ("train_dataloader.dataset.pipeline.20.scale=1", r"pipeline\.20\.scale=1: Index 20"),
        ("model.backbone.name.x=1", r"model\.backbone\.name\.x=1"),
        ("no_equals", r"key=value"),
    ],
)
def test_changes_that_would_change_nothing(change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_config(packaged_configs()[NAME], ["model.backbone.drop_path_rate=0.2", change])


def test_other_libraries_and_parts_that_are_no_parts() -> None:
    with pytest.raises(ValueError, match="default_scope is 'mmsegg'; allowed: mmdet, mmseg"):
        is_dense({"default_scope": "mmsegg"})
    assert not is_dense({})
    with pytest.raises(ValueError, match="the config's model is 3; expected a dict"):
        _config({"model": 3})
