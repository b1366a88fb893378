"""Predictions of all three tasks by the command, and what it says of files it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitrail.models.mm.checkpoint import save_weights
from vitrail.tools import predict
from vitrail.tools._common.configs import packaged_configs, read_config
from vitrail.tools.predict import main

SEGMENTER = "camvid/upernet_biformer_n"
DETECTOR = "coco_sample/mask_rcnn_davit_t"
SMALL_DETECTOR = [
    "model.backbone.depths=(1,1,1,1)",
    "model.backbone.dims=(32,32,64,64)",
    "model.backbone.num_heads=(1,1,2,2)",
    "model.neck.in_channels=[32,32,64,64]",
    *(f"model.{part}=32" for part in ("neck.out_channels", "rpn_head.in_channels", "rpn_head.feat_channels")),
    *(f"model.roi_head.{kind}_roi_extractor.out_channels=32" for kind in ("bbox", "mask")),
    *(f"model.roi_head.bbox_head.{name}=32" for name in ("in_channels", "fc_out_channels")),
    *(f"model.roi_head.mask_head.{name}=32" for name in ("in_channels", "conv_out_channels")),
    "model.test_cfg.rpn.max_per_img=50",
    "val_dataloader.dataset.pipeline.1.scale=(96,64)",
]


def _write_images(folder: Path, *names: str, size: tuple[int, int] = (64, 48)) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / name)
    return folder


def _predict(config: str, weights: Path, images: Path, output: Path, *options: str) -> int:
    return main([config, str(weights), str(images), "-o", str(output), "--device", "cpu", *options])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config of ten classes, and weights for it."""
    folder = tmp_path_factory.mktemp("classifier")
    text = packaged_configs()["cifar10/biformer_n"]
    config = folder / "tiny.py"
    config.write_text(
        f'_base_ = "{text}"\nmodel = dict(backbone=dict(_delete_=True, name="test_vit", num_classes=10, img_size=32))\n'
    )
    torch.manual_seed(0)
    save_weights(timm.create_model("test_vit", num_classes=10, img_size=32), folder / "model.safetensors")
    return config, folder / "model.safetensors"


def _dense_weights(name: str, path: Path, changes: list[str]) -> Path:
    from vitrail.models.mm.dense_runner import build_model, complete_dense_config

    torch.manual_seed(0)
    save_weights(build_model(complete_dense_config(read_config(packaged_configs()[name], changes))), path)
    return path


def test_top5_of_a_folder_and_every_bad_file_named(
    classifier: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = classifier
    images = _write_images(tmp_path / "in", "a.jpg", "a.png", "sub/b.jpg", ".hidden/c.jpg")
    (images / "broken.jpg").write_bytes(b"not an image")
    (images / "empty.png").touch()
    (images / "notes.txt").write_text("x")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name{i}\n" for i in range(10)))
    out = tmp_path / "out"
    options = ("--batch-size", "2", "--classes", str(names))
    assert _predict(str(config), weights, images, out, *options) == 1
    shown = capsys.readouterr()
    assert "2 of 5 images cannot be read" in shown.err
    assert "broken.jpg" in shown.err
    assert "empty.png (the file is empty)" in shown.err
    assert "3 images predicted" in shown.out
    assert "left out 1 files that are not named like images: notes.txt" in shown.out
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {"results.json"} | {f"{n}.{s}" for n in ("a.jpg", "a.png", "sub/b") for s in ("png", "json")}
    facts = json.loads((out / "results.json").read_text())
    assert facts["images"] == 3
    assert sorted(Path(name).name for name in facts["unreadable"]) == ["broken.jpg", "empty.png"]
    assert facts["not_images"] == ["notes.txt"]

    model = timm.create_model("test_vit", num_classes=10, img_size=32, checkpoint_path=str(weights)).eval()
    from timm.data import create_transform

    transform = create_transform(**read_config(config).val_dataloader.dataset.transform.to_dict())
    with torch.no_grad():
        logits = model(transform(Image.open(images / "sub/b.jpg"))[None])
    scores, labels = logits[0].softmax(0).topk(5)
    rows = json.loads((out / "sub/b.json").read_text())["classes"]
    assert [row["label"] for row in rows] == labels.tolist()
    assert [row["class"] for row in rows] == [f"name{i}" for i in labels]
    assert [row["score"] for row in rows] == pytest.approx(scores.tolist(), rel=1e-4)


def test_wrong_calls_are_one_line(
    classifier: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = classifier
    images = _write_images(tmp_path / "in", "a.png")
    (tmp_path / "none").mkdir()
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    out = tmp_path / "out"
    for source, target, options, status, message in (
        (tmp_path / "absent", out, (), 2, "absent does not exist"),
        (tmp_path / "none", out, (), 2, "holds no images"),
        (images, images / "out", (), 2, "is in the folder of the images"),
        (images / "a.png", images, (), 2, "would overwrite the image"),
        (images, tmp_path / "three.txt", (), 2, "three.txt is a file"),
        (images, tmp_path / "three.txt" / "out", (), 2, "three.txt is a file"),
        (images, out, ("--batch-size", "0"), 2, "--batch-size is 0"),
        (images, out, ("--score-threshold", "2"), 2, "--score-threshold is 2"),
        (images, out, ("--classes", str(tmp_path / "three.txt")), 1, "names for 3 classes, the model tells 10 apart"),
        (images, out, ("--classes", str(tmp_path / "absent.txt")), 1, "No such file"),
    ):
        assert _predict(str(config), weights, source, target, *options) == status
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert _predict(str(config), tmp_path / "w.safetensors", images, out) == 1
    assert "w.safetensors does not exist" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_that_is_cut_off_leaves_no_results_of_an_earlier_one(
    classifier: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = classifier
    images, out = _write_images(tmp_path / "in", "a.png", "b.png"), tmp_path / "out"
    assert _predict(str(config), weights, images, out) == 0
    whole = (out / "results.json").read_text()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "_write", interrupt)
        assert _predict(str(config), weights, images, out) == 130
    assert not (out / "results.json").exists()
    assert _predict(str(config), weights, images, out) == 0
    assert (out / "results.json").read_text() == whole


def test_segmentation_labels_every_pixel(tmp_path: Path) -> None:
    pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")
    weights = _dense_weights(SEGMENTER, tmp_path / "w.safetensors", [])
    images = _write_images(tmp_path / "in", "a.png", size=(70, 45))
    _write_images(tmp_path / "in", "b.png", "c.png")
    out = tmp_path / "out"
    assert _predict(SEGMENTER, weights, images, out, "--batch-size", "2") == 0
    for name, size in (("a", (70, 45)), ("b", (64, 48)), ("c", (64, 48))):
        labels = Image.open(out / f"{name}_labels.png")
        assert labels.size == size
        rows = json.loads((out / f"{name}.json").read_text())["classes"]
        counts = np.bincount(np.asarray(labels).ravel(), minlength=11)
        assert {row["label"]: row["pixels"] for row in rows} == {i: c for i, c in enumerate(counts) if c}
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert {row["class"] for row in rows} <= set(read_config(packaged_configs()[SEGMENTER]).metainfo.classes)
    alone = tmp_path / "alone"
    assert _predict(SEGMENTER, weights, images / "c.png", alone) == 0
    assert (alone / "c.json").read_text() == (out / "c.json").read_text().replace(str(out), str(alone))


def test_detections_have_boxes_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmdet", reason="needs onedl-mmdetection: pip install vitrail[mm]")
    from pycocotools import mask as coco

    weights = _dense_weights(DETECTOR, tmp_path / "w.safetensors", SMALL_DETECTOR)
    images, out = _write_images(tmp_path / "in", "a.png"), tmp_path / "out"
    options = ("--score-threshold", "0", "--cfg-options", *SMALL_DETECTOR)
    options += ("model.test_cfg.rcnn.score_thr=0.0", "model.test_cfg.rcnn.max_per_img=7")
    assert _predict(DETECTOR, weights, images, out, *options) == 0
    rows = json.loads((out / "a.json").read_text())["objects"]
    assert len(rows) == 7
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for row in rows:
        left, top, right, bottom = row["box"]
        assert 0 <= left <= right <= 64
        assert 0 <= top <= bottom <= 48
        assert coco.decode(row["mask"]).shape == (48, 64)
    options = ("--score-threshold", "1", "--cfg-options", *SMALL_DETECTOR)
    assert _predict(DETECTOR, weights, images, out, *options) == 0
    assert json.loads((out / "a.json").read_text())["objects"] == []
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    assert _predict(DETECTOR, weights, images, out, "--classes", str(names), *options) == 1
    assert "num_classes=80, the data have 2 classes" in capsys.readouterr().err
