"""Training detectors and segmenters by the command, on a few made-up images."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmcv", reason="needs onedl-mmcv: pip install vitrail[mm]")
pytest.importorskip("mmdet", reason="needs onedl-mmdetection: pip install vitrail[mm]")
pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")

import timm
from _killed_training import train_until_killed
from _processes import run_job
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from vitrail.models.mm.checkpoint import read_checkpoint
from vitrail.tools._common.configs import packaged_configs
from vitrail.tools.test import main as measure_run
from vitrail.tools.train import main

_spec = importlib.util.spec_from_file_location("_vitrail_test_runs", Path(__file__).parent / "_runs.py")
_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_runs)

SEGMENTER = "camvid/upernet_biformer_n"
DETECTOR = "coco_sample/mask_rcnn_davit_t"


def _write_segmentation_data(root: Path) -> Path:
    """Four images whose left half is sky and whose right half is road."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("img_dir", "ann_dir"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            mask = np.zeros((48, 64), np.uint8)
            mask[:, 32:] = 3
            image = generator.integers(0, 60, (48, 64, 3)) + 180 * (mask == 3)[..., None]
            Image.fromarray(image.astype(np.uint8)).save(root / "img_dir" / split / f"{i}.jpg")
            Image.fromarray(mask).save(root / "ann_dir" / split / f"{i}.png")
    return root


def _write_detection_data(root: Path) -> Path:
    (root / "images/train").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i in range(4):
        x, y = 10 + 5 * i, 8
        image = np.full((64, 96, 3), 30, np.uint8)
        image[y : y + 40, x : x + 40] = (200, 40, 40)
        Image.fromarray(image).save(root / f"images/train/{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 96})
        corners = [x, y, x + 40, y, x + 40, y + 40, x, y + 40]
        annotations.append(
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [x, y, 40, 40], "area": 1600, "iscrowd": 0}
            | {"segmentation": [corners]}
        )
    names = ["person", "bicycle"]  # the data set looks for its 80 names; others have no images
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return root


def _options(root: Path, **changes: Any) -> list[str]:
    base = {"data_root": root, "train_dataloader.num_workers": 0, "val_dataloader.num_workers": 0}
    return [f"{key}={value}" for key, value in {**base, "train_dataloader.batch_size": 2, **changes}.items()]


def _segmenter_options(root: Path, **changes: Any) -> list[str]:
    small = {
        "model.decode_head.channels": 16,
        "model.auxiliary_head.channels": 8,
        "model.data_preprocessor.size": "(32,32)",
        "train_dataloader.dataset.pipeline.2.scale": "(64,48)",
        "train_dataloader.dataset.pipeline.3.crop_size": "(32,32)",
        "train_cfg.max_iters": 6,
        "train_cfg.val_interval": 3,
        "default_hooks.checkpoint.interval": 2,
    }
    return _options(root, **{**small, **changes})


# A step of the whole Mask R-CNN takes minutes in bfloat16 on a CPU.
_DETECTOR_WIDTHS = [
    *(f"model.{part}" for part in ("neck.out_channels", "rpn_head.in_channels", "rpn_head.feat_channels")),
    *(f"model.roi_head.{kind}_roi_extractor.out_channels" for kind in ("bbox", "mask")),
    *(f"model.roi_head.bbox_head.{name}" for name in ("in_channels", "fc_out_channels")),
    *(f"model.roi_head.mask_head.{name}" for name in ("in_channels", "conv_out_channels")),
]
_DETECTOR_REGIONS = [
    *(f"model.train_cfg.{part}.sampler.num" for part in ("rpn", "rcnn")),
    *(f"model.{part}.max_per_img" for part in ("train_cfg.rpn_proposal", "test_cfg.rpn", "test_cfg.rcnn")),
]


def _detector_options(root: Path, **changes: Any) -> list[str]:
    small = {
        "model.backbone.depths": "(1,1,1,1)",
        "model.backbone.dims": "(32,32,64,64)",
        "model.backbone.num_heads": "(1,1,2,2)",
        "model.neck.in_channels": "[32,32,64,64]",
        **dict.fromkeys(_DETECTOR_WIDTHS, 32),
        **dict.fromkeys(_DETECTOR_REGIONS, 16),
        "train_dataloader.dataset.pipeline.2.scale": "(96,64)",
        "val_dataloader.dataset.pipeline.1.scale": "(96,64)",
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 2,
    }
    return _options(root, **{**small, **changes})


def _train(config: str, folder: Path, *options: str, changes: list[str]) -> int:
    return main([config, "--work-dir", str(folder), "--device", "cpu", *options, "--cfg-options", *changes])


def test_segmenter_trains_and_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_segmentation_data(tmp_path / "data"), tmp_path / "run"
    fast = {"param_scheduler.0.end": 2, "param_scheduler.1.begin": 2, "train_cfg.max_iters": 12}
    assert _train(SEGMENTER, folder, changes=_segmenter_options(root, **fast)) == 0
    text = capsys.readouterr().out
    for part in ("EncoderDecoder on biformer_n", "iteration 12/12", "mIoU", "images/s", "4 training and 4 held-out"):
        assert part in text
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["iterations"] for row in metrics["curve"]] == [3, 6, 9, 12]
    assert metrics["curve"][-1]["train_loss"] < metrics["curve"][0]["train_loss"]
    assert metrics["held_out"]["mIoU"] == metrics["curve"][-1]["mIoU"]
    assert metrics["best"] == max(row["mIoU"] for row in metrics["curve"])
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    weights = read_checkpoint(folder / "model.safetensors")
    last = read_checkpoint(folder / "last.pth")
    assert last["meta"]["iter"] == 12
    assert all(torch.equal(weights[key], value) for key, value in last["state_dict"].items())
    backbone = timm.create_model("biformer_n", num_classes=0)
    inner = {k.removeprefix("backbone.model."): v for k, v in weights.items() if k.startswith("backbone.model.")}
    missing, unexpected = backbone.load_state_dict(inner, strict=False)
    assert not unexpected
    assert all(key.startswith("norm.") for key in missing)
    assert not list(folder.glob(".*.tmp"))
    assert {path.name for path in folder.glob("*.pth")} == {"last.pth", "best.pth"}


@pytest.mark.slow
def test_killed_run_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_segmentation_data(tmp_path / "data"), tmp_path / "run"
    changes = _segmenter_options(root)
    arguments = [SEGMENTER, "--work-dir", str(folder), "--device", "cpu", "--cfg-options", *changes]
    done = run_job(1, train_until_killed, 5, "vitrail.models.mm.dense_runner", arguments, folder=tmp_path)
    assert done.returncode == -9, done.stderr
    assert read_checkpoint(folder / "last.pth")["meta"]["iter"] == 4
    assert _train(SEGMENTER, folder, changes=changes) == 2
    assert "holds a run: --resume" in capsys.readouterr().err
    assert _train(SEGMENTER, folder, "--resume", changes=changes) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["iterations"] for row in metrics["curve"]] == [3, 6]
    optimizer = read_checkpoint(folder / "last.pth")["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {6}
    assert _train(SEGMENTER, folder, "--resume", changes=changes) == 0  # nothing is left to do


def test_detector_trains_in_mixed_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_detection_data(tmp_path / "data"), tmp_path / "run"
    dtypes: dict[str, set[torch.dtype]] = {"regions": set(), "convolution": set()}

    class Watch(Hook):
        def before_train(self, runner: Any) -> None:
            runner.model.roi_head.bbox_roi_extractor.register_forward_hook(
                lambda _, inputs, out: dtypes["regions"].update({inputs[0][0].dtype, inputs[1].dtype, out.dtype})
            )
            runner.model.backbone.model.stem.conv.register_forward_hook(
                lambda _, __, out: dtypes["convolution"].add(out.dtype)
            )

    HOOKS.register_module(module=Watch, name="WatchDtypes", force=True)
    config = tmp_path / "watched.py"
    config.write_text(f'_base_ = "{packaged_configs()[DETECTOR]}"\ncustom_hooks = [dict(type="WatchDtypes")]\n')
    assert _train(str(config), folder, "--amp", "bf16", changes=_detector_options(root)) == 0
    assert "MaskRCNN on davit_t" in capsys.readouterr().out
    # Validation, without autocast, has float32 everywhere.
    assert dtypes == {"regions": {torch.float32}, "convolution": {torch.bfloat16, torch.float32}}
    assert read_checkpoint(folder / "last.pth")["meta"]["iter"] == 2


def test_weights_of_a_run_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_segmentation_data(tmp_path / "data"), tmp_path / "run"
    assert _train(SEGMENTER, folder, changes=_segmenter_options(root, **{"train_cfg.max_iters": 3})) == 0
    trained = json.loads((folder / "metrics.json").read_text())["held_out"]
    assert measure_run([str(folder), "--device", "cpu"]) == 0
    assert "mIoU" in capsys.readouterr().out
    measured = json.loads((folder / "results.json").read_text())
    assert {name: measured[name] for name in ("mIoU", "mAcc", "aAcc")} == {
        name: trained[name] for name in ("mIoU", "mAcc", "aAcc")
    }
    wrong = ["--checkpoint", str(folder / "wrong.pth")]
    torch.save({"state_dict": {"backbone.model.stem.x": torch.zeros(1)}}, folder / "wrong.pth")
    for arguments, status, message in (
        ([str(folder), *wrong], 1, r"wrong\.pth does not fit the model: Missing key"),
        ([str(folder), "--checkpoint", "absent.pth"], 1, r"absent\.pth does not exist"),
        ([SEGMENTER], 2, "a config alone has no weights"),
        (["digits/biformer_n", *wrong], 2, "use vitrail-validate"),
        ([str(tmp_path)], 2, "not the work folder"),
        ([str(tmp_path / "absent")], 2, "absent does not exist"),
        ([str(folder), "--output", str(tmp_path)], 2, "a folder; expected the name of a file"),
    ):
        assert measure_run([*arguments, "--device", "cpu"]) == status
        assert re.search(message, capsys.readouterr().err)
    Image.fromarray(np.full((40, 64), 3, np.uint8)).save(root / "ann_dir/test/0.png")
    assert measure_run([str(folder), "--device", "cpu"]) == 1
    assert "1 images of another size than their annotations" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert measure_run([str(folder), "--device", "cpu"]) == 2
    assert re.search(r"the training has not ended; --checkpoint \S*last\.pth", capsys.readouterr().err)


def test_problems_are_named_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_segmentation_data(tmp_path / "data"), tmp_path / "run"
    for changes, message in (
        (_segmenter_options(tmp_path / "nowhere"), r"nowhere does not exist .*data_root=FOLDER"),
        (_segmenter_options(root, **{"model.decode_head.num_classes": 7}), r"decode_head has num_classes=7, .* 11"),
        (_segmenter_options(root, **{"model.backbone.name": "biformer_m"}), r"'biformer_m', which timm does not know"),
        (_segmenter_options(root, **{"model.backbone.checkpoint": "x.pth"}), r"starting weights x\.pth do not exist"),
        (_segmenter_options(root, **{"model.decode_head.type": "UperHead"}), r"UperHead"),
        (_segmenter_options(root, **{"train_dataloader.dataset.type": "CamVid"}), r"CamVid"),
        (_segmenter_options(root, **{"model.decode_head.in_channels": "(1,2)"}), r"model: "),
        (
            _segmenter_options(root, **{"model.auxiliary_head.in_channels": 64}),
            r"auxiliary_head\.in_channels is \[64\]",
        ),
        (_segmenter_options(root, **{"train_cfg.max_iters": "many"}), r"train_cfg\.max_iters is 'many'"),
        (_segmenter_options(root, **{"train_dataloader.batchsize": 2}), r"train_dataloader: .*'batchsize'"),
        (_segmenter_options(root, **{"optim_wrapper.optimizer.lr": "x"}), r"optim_wrapper: .*'float' and 'str'"),
        (_segmenter_options(root, **{"model.decode_head.loss_decode.loss_weight": "x"}), r"Loss takes a number"),
        (
            _segmenter_options(root, **{"train_dataloader.dataset.pipeline.3.cat_max_ratio": "x"}),
            r"Crop takes a number",
        ),
        (_segmenter_options(root, **{"default_hooks.logger.ignore_last": "x"}), r"LoggerHook takes a truth value"),
        (_segmenter_options(root, **{"model.test_cfg.mode": "slide"}), r"mode 'slide' and no crop_size, stride"),
        (_segmenter_options(root, load_from="absent.pth"), r"absent\.pth does not exist"),
    ):
        assert _train(SEGMENTER, folder, changes=changes) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert re.search(message, error), error
        assert not folder.exists()


def test_problems_that_show_in_training_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _write_segmentation_data(tmp_path / "data")
    for number, (changes, message) in enumerate(
        (
            ({"train_dataloader.batch_size": 1}, "a process needs 2 images in a batch"),
            (
                {"default_hooks.checkpoint.save_best": "mIOU", "train_cfg.max_iters": 1},
                "'mIOU'; the validation measures",
            ),
        )
    ):
        assert _train(SEGMENTER, tmp_path / f"run{number}", changes=_segmenter_options(root, **changes)) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = _write_segmentation_data(tmp_path / "data"), tmp_path / "run"
    changes = _segmenter_options(root, **{"model.decode_head.loss_decode.loss_weight": 1e39})
    assert _train(SEGMENTER, folder, changes=changes) == 1
    error = capsys.readouterr().err
    assert "the loss is not finite in iteration 1" in error
    assert "decode.loss_ce" in error
    assert not (folder / "last.pth").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("config", [SEGMENTER, DETECTOR])
def test_trains_on_the_gpu(config: str, amp: str | None, tmp_path: Path) -> None:
    if config == SEGMENTER:
        changes = _segmenter_options(_write_segmentation_data(tmp_path / "data"))
    else:
        changes = _detector_options(_write_detection_data(tmp_path / "data"))
    precision = ["--amp", amp] if amp else []
    arguments = [config, "--work-dir", tmp_path / "run", "--device", "cuda", *precision, "--cfg-options", *changes]
    done = _runs.run_python("-m", "vitrail.tools.train", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "metrics.json").is_file()
