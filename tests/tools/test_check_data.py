"""Faults in data files are named and counted, by the command and before a training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrail.tools._common.configs import packaged_configs
from vitrail.tools.check_data import main
from vitrail.tools.train import main as train

SEGMENTER = "camvid/upernet_biformer_n"
DETECTOR = "coco_sample/mask_rcnn_davit_t"


def _image(path: Path, size: tuple[int, int] = (32, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), 90, np.uint8)).save(path)


def _masks(root: Path) -> Path:
    for split in ("train", "test"):
        for i in range(5):
            _image(root / f"img_dir/{split}/{i}.jpg")
            path = root / f"ann_dir/{split}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.tile(np.arange(12, dtype=np.uint8), (24, 3))[:, :32]).save(path)
    return root


def _table() -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 32, "height": 24} for i in range(3)]
    boxes = [[0, 0, 32, 24], [-0.5, 3, 10, 10], [5, 5, 4, 4]]
    row = {"category_id": 1, "area": 99, "iscrowd": 0, "segmentation": [[0, 0, 4, 0, 4, 4]]}
    rows = [{"id": i, "image_id": i, "bbox": box, **row} for i, box in enumerate(boxes)]
    rows[2] |= {"iscrowd": 1, "segmentation": {"size": [24, 32], "counts": [700, 60, 8]}}
    return {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "person"}]}


def _without(key: str) -> dict[str, Any]:
    table = _table()
    del table["annotations"][1][key]
    return table


def _objects(root: Path, table: dict[str, Any]) -> Path:
    for i in range(3):
        _image(root / f"images/train/{i}.jpg")
    (root / "annotations").mkdir()
    (root / "annotations/instances_train.json").write_text(json.dumps(table))
    return root


def _check(config: str, root: Path, *options: str, changes: tuple[str, ...] = ()) -> int:
    return main([config, *options, "--cfg-options", f"data_root={root}", *changes])


def _needs_libraries() -> None:
    pytest.importorskip("mmdet", reason="needs onedl-mmdetection: pip install vitrail[mm]")
    pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")


def test_faults_of_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _needs_libraries()
    root = _masks(tmp_path / "data")
    assert _check(SEGMENTER, root) == 0
    assert "10 images listed, 10 masks opened, 10 images opened" in capsys.readouterr().out
    # What the data set leaves out is nothing that the loss leaves out.
    other = [f"model.{part}=255" for part in ("decode_head.ignore_index", "data_preprocessor.seg_pad_val")]
    assert _check(SEGMENTER, root, changes=tuple(other)) == 1
    assert re.search(r"5 masks with labels out of range: \S*train/0\.png \(11\)", capsys.readouterr().out)
    folder = root / "ann_dir/train"
    (folder / "0.png").unlink()
    Image.fromarray(np.full((24, 32), 12, np.uint8)).save(folder / "1.png")
    Image.fromarray(np.zeros((24, 31), np.uint8)).save(folder / "2.png")
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(folder / "3.png")
    (folder / "4.png").write_bytes(b"no mask")
    (root / "img_dir/test/0.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(folder / "alone.png")
    Image.fromarray(np.full((24, 32), 11, np.uint8)).save(root / "ann_dir/test/1.png")
    written = tmp_path / "faults.json"
    assert _check(SEGMENTER, root, "--output", str(written)) == 1
    shown = capsys.readouterr()
    assert "6 faults in the data" in shown.err
    for message in (
        r"1 images without a mask: \S*img_dir/train/0\.jpg \(looked for \S*ann_dir/train/0\.png\)",
        r"1 masks with labels out of range: \S*train/1\.png \(12\)",
        r"1 images of another size than their annotations: \S*train/2\.jpg \(32x24 in place of 31x24\)",
        r"1 masks that are not of one channel of numbers: \S*train/3\.png \(mode RGB\)",
        r"1 masks that cannot be read: \S*train/4\.png",
        r"1 images that cannot be read: \S*test/0\.jpg",
        r"note: 1 masks without an image: \S*train/alone\.png",
        r"note: 1 masks in which no pixel has a class: \S*test/1\.png",
    ):
        assert re.search(message, shown.out), message
    assert sum(map(len, json.loads(written.read_text())["faults"].values())) == 6

    # Training looks for the same, before it writes anything.
    arguments = [SEGMENTER, "--work-dir", str(tmp_path / "run"), "--device", "cpu", "--cfg-options"]
    assert (
        train([*arguments, f"data_root={root}", "train_dataloader.num_workers=0", "val_dataloader.num_workers=0"]) == 1
    )
    error = capsys.readouterr().err
    assert "1 masks with labels out of range" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_faults_of_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _needs_libraries()
    assert _check(DETECTOR, _objects(tmp_path / "good", _table())) == 0
    assert "note: 79 classes without a category" in capsys.readouterr().out
    table = _table()
    table["images"].append({"id": 7, "file_name": "absent.jpg", "width": 32, "height": 24})
    table["images"][2]["width"] = 33
    table["categories"].append({"id": 9, "name": "gnome"})
    other = {**table["annotations"][0], "bbox": [0, 0, 4, 4]}
    table["annotations"] += [
        {**other, "id": 10, "bbox": [20, 0, 14, 5]},
        {**other, "id": 11, "bbox": [0, -2, 4, 5]},
        {**other, "id": 12, "bbox": [0, 0, 0, 5]},
        {**other, "id": 13, "bbox": [0, 0, 5]},
        {**other, "id": 14, "image_id": 99},
        {**other, "id": 15, "category_id": 5},
        {**other, "id": 16, "segmentation": None},
        {**other, "id": 17, "segmentation": "0,0,4,0"},
        {**other, "id": 18, "segmentation": {"size": [24, 32], "counts": [700, 60]}},
        {**other, "id": 19, "segmentation": {"size": [32, 24], "counts": "05"}},
        {**other, "id": 20, "segmentation": [[0, 0, 4, 4]]},
        {**other, "id": 20},
    ]
    root = _objects(tmp_path / "bad", table)
    (root / "images/train/1.jpg").write_bytes(b"")
    assert _check(DETECTOR, root) == 1
    shown = capsys.readouterr().out
    for message in (
        r"1 images of \S*json that do not exist: \S*images/train/absent\.jpg",
        r"1 images of another size than their annotations: \S*train/2\.jpg \(32x24 in place of 33x24\)",
        r"1 categories of \S*json that are no class of the config: gnome",
        r"2 boxes of \S*json outside their image: annotation 10 of image 0 \(2 pixels\), annotation 11 of image 0 \(2",
        r"note: 1 empty boxes in \S*json, which mmdetection leaves out: annotation 12 ",
        r"1 objects of \S*json without a box of four numbers: annotation 13 ",
        r"1 objects of \S*json whose image is not listed: annotation 14 of image 99",
        r"1 objects of \S*json of an unknown category: annotation 15 ",
        r"2 objects of \S*json without a mask .*: annotation 16 of image 0, annotation 17 ",
        # The image whose width is wrong has a mask in run lengths, too.
        r"3 masks of \S*json whose run lengths are not of their image's size: annotation 2 .*18 .*, annotation 19 ",
        r"note: 1 objects of \S*json whose outline has less than 3 points, not used by mmdetection: annotation 20 ",
        r"1 ids of \S*json that are not unique: 20 of 2 annotations",
        r"1 images that cannot be read: \S*train/1\.jpg: the file is empty",
    ):
        assert re.search(message, shown), message


def test_unusable_data_and_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _needs_libraries()
    masks, objects = _masks(tmp_path / "masks"), _objects(tmp_path / "objects", _table())
    table = objects / "annotations/instances_train.json"
    for content, message in (
        ("{", "instances_train.json is not a JSON file"),
        ('{"images": []}', "is not in the format of COCO's instances: it has no list annotations, categories"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "an entry of images has no file_name"),
        ('{"images": [], "annotations": [3], "categories": []}', "an entry of annotations has no id, image_id"),
        (json.dumps(_without("iscrowd")), "an entry of annotations has no iscrowd: "),
        (json.dumps(_without("area")), "an entry of annotations has no area: "),
        (json.dumps(_table()).replace('"width": 32', '"width": "32"'), "width and height of an image are not numbers"),
    ):
        table.write_text(content)
        assert _check(DETECTOR, objects) == 1
        assert message in capsys.readouterr().err
    for path in (masks / "img_dir/train").iterdir():
        path.unlink()
    assert _check(SEGMENTER, masks) == 1
    assert "no images are found in" in capsys.readouterr().err
    assert _check(SEGMENTER, tmp_path / "nowhere") == 1
    assert re.search(r"nowhere does not exist .*the folder img_dir/train and", capsys.readouterr().err)
    assert _check(SEGMENTER, masks, changes=("model.decode_head.num_classes=7",)) == 1
    assert re.search(r"decode_head has num_classes=7, the data have 11", capsys.readouterr().err)
    assert _check(SEGMENTER, masks, "--sample", "0") == 2
    capsys.readouterr()
    assert _check(SEGMENTER, masks, changes=("train_dataloader.dataset.data_prefix.img_path=3",)) == 1
    assert "data_prefix is {'img_path': 3" in capsys.readouterr().err
    for place, message in ((tmp_path, "a folder; expected the name of a file"), (table / "x.json", "is a file")):
        assert _check(SEGMENTER, masks, "--output", str(place)) == 2
        assert message in capsys.readouterr().err


def test_images_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.py"
    base = packaged_configs()["imagenette/biformer_n"]
    for split in ("train", "val"):
        for label in range(2):
            _image(tmp_path / f"data/{split}/class{label}/0.png")
    config.write_text(
        f'_base_ = "{base}"\nmodel = dict(backbone=dict(num_classes=2))\ntrain_dataloader = dict(batch_size=2)\n'
    )
    assert _check(str(config), tmp_path / "data") == 0
    assert "4 images listed, 4 images opened" in capsys.readouterr().out
    (tmp_path / "data/val/class1/bad.jpg").write_bytes(b"x")
    assert _check(str(config), tmp_path / "data") == 1
    assert re.search(r"1 images that cannot be read: \S*bad\.jpg", capsys.readouterr().out)
    assert _check(str(config), tmp_path / "data", changes=("model.backbone.num_classes=3",)) == 1
    assert "the data have 2 classes" in capsys.readouterr().err
