"""Looks for faults in the annotations of detectors' and segmenters' data before a training starts."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from vitrail.models.mm.data_findings import Findings, evenly
from vitrail.models.mm.dense_config_check import blaming
from vitrail.models.mm.dense_data import classes_of, datasets_of, places_of
from vitrail.models.mm.images import UnreadableImageError, load_image

_TOLERANCE = 1.0  # pixels that a box may reach beyond its image: COCO's own are rounded
_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
}
_LABEL_MODES = ("L", "P", "1", "I", "I;16")


def check_dense_data(config: Config, loaders: Sequence[str], limit: int | None) -> Findings:
    """Compares annotations with images and classes; the folders must exist, the library be registered.

    Args:
        config: Completed.
        loaders: Such as "train_dataloader".
        limit: How many images and masks of a data set are opened; None for all. Tables are always read whole.

    Raises:
        ValueError: An annotation file is not what it should be, or a type is unknown.
    """
    findings = Findings()
    seen = set()  # a run that learns by heart has the same files for training and validation
    with DefaultScope.overwrite_default_scope(config.default_scope):
        for loader in sorted(loaders, key=lambda name: name.startswith("train")):  # evaluation asks for more
            for dataset in datasets_of(config[loader]["dataset"]):
                classes_of(dataset)  # knows its type
                is_evaluated = not loader.startswith("train")
                # What a segmenter's metric leaves out its loss need not leave out.
                files = (*places_of(dataset), is_evaluated and config.default_scope == "mmseg")
                if files in seen:
                    continue
                seen.add(files)
                if config.default_scope == "mmseg":
                    _check_masks(config, dataset, findings, limit, is_evaluated)
                elif str(dataset["type"]).endswith("CocoDataset"):
                    _check_objects(dataset, findings, limit, is_evaluated)
                else:
                    findings.note("data sets of a type that is not checked", f"{loader} ({dataset['type']})")
    return findings


def _check_objects(dataset: Mapping[str, Any], findings: Findings, limit: int | None, is_evaluated: bool) -> None:
    path = places_of(dataset)[-1]
    table = _read_table(path, is_evaluated)
    _check_ids(path, table, findings)
    has_masks = any(step.get("with_mask") for step in dataset.get("pipeline") or ())
    prefix = (dataset.get("data_prefix") or {}).get("img", "")
    folder = Path(dataset.get("data_root") or "") / prefix
    images = {image["id"]: image for image in table["images"]}
    _check_categories(path, table, classes_of(dataset), findings)
    present = {entry.name for entry in folder.iterdir()}
    for image in images.values():
        name = image["file_name"]
        if name not in present and ("/" not in name or not (folder / name).is_file()):
            findings.fault(f"images of {path} that do not exist", str(folder / name))
    findings.count("images listed", len(images))
    for row in table["annotations"]:
        image = images.get(row["image_id"])
        if image is None:
            findings.fault(f"objects of {path} whose image is not listed", _name(row))
            continue
        _check_box(path, row, image, findings)
        if has_masks:
            _check_outline(path, row, image, findings)
    findings.count("objects", len(table["annotations"]))
    for image in evenly(list(images.values()), limit):
        _check_image(folder / image["file_name"], (image["width"], image["height"]), findings)


def _read_table(path: Path, is_evaluated: bool) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    parts = ("images", "annotations", "categories")
    lacking = [part for part in parts if not isinstance(table, dict) or not isinstance(table.get(part), list)]
    if lacking:
        raise ValueError(f"{path} is not in the format of COCO's instances: it has no list {', '.join(lacking)}")
    needed = dict(_KEYS)
    if is_evaluated:
        needed["annotations"] += ("iscrowd",)
    for part, keys in needed.items():
        for row in table[part]:
            absent = [key for key in keys if not isinstance(row, dict) or key not in row]
            if absent:
                raise ValueError(f"{path}: an entry of {part} has no {', '.join(absent)}: {str(row)[:80]}")
    for image in table["images"]:
        if not _is_number(image["width"]) or not _is_number(image["height"]):
            raise ValueError(f"{path}: width and height of an image are not numbers: {str(image)[:80]}")
    return table


def _check_categories(path: Path, table: Mapping[str, Any], classes: Sequence[str], findings: Findings) -> None:
    names = {category["id"]: category["name"] for category in table["categories"]}
    for name in names.values():
        if name not in classes:
            findings.fault(f"categories of {path} that are no class of the config", name)
    for name in classes:
        if name not in names.values():
            findings.note(f"classes without a category in {path}", name)
    for row in table["annotations"]:
        if row["category_id"] not in names:
            findings.fault(f"objects of {path} of an unknown category", _name(row))


def _check_ids(path: Path, table: Mapping[str, Any], findings: Findings) -> None:
    for part in _KEYS:
        numbers = Counter(row["id"] for row in table[part])
        for number, count in numbers.items():
            if count > 1:
                findings.fault(f"ids of {path} that are not unique", f"{number} of {count} {part}")


def _check_box(path: Path, row: Mapping[str, Any], image: Mapping[str, Any], findings: Findings) -> None:
    box = row["bbox"]
    if not _is_numbers(box) or len(box) != 4:
        findings.fault(f"objects of {path} without a box of four numbers", _name(row))
        return
    left, top, width, height = box
    if width <= 0 or height <= 0:
        findings.note(f"empty boxes in {path}, which mmdetection leaves out", _name(row))
        return
    beyond = max(-left, -top, left + width - image["width"], top + height - image["height"])
    if beyond > _TOLERANCE:
        findings.fault(f"boxes of {path} outside their image", f"{_name(row)} ({beyond:g} pixels)")


def _check_outline(path: Path, row: Mapping[str, Any], image: Mapping[str, Any], findings: Findings) -> None:
    """Looks at an object's mask: polygons of x, y, x, y, ..., or run lengths of the whole image."""
    outline = row.get("segmentation")
    size = [image["height"], image["width"]]
    if isinstance(outline, dict):
        runs = outline.get("counts")
        is_whole = isinstance(runs, str) or (_is_numbers(runs) and sum(runs) == math.prod(size))
        if outline.get("size") != size or not is_whole:
            findings.fault(f"masks of {path} whose run lengths are not of their image's size", _name(row))
    elif not isinstance(outline, list) or not outline or not all(map(_is_numbers, outline)):
        findings.fault(f"objects of {path} without a mask (polygons or run lengths in `segmentation`)", _name(row))
    elif not any(len(part) >= 6 and len(part) % 2 == 0 for part in outline):
        findings.note(f"objects of {path} whose outline has less than 3 points, not used by mmdetection", _name(row))


def _check_masks(
    config: Config, dataset: Mapping[str, Any], findings: Findings, limit: int | None, is_evaluated: bool
) -> None:
    with blaming("data set"):
        built = DATASETS.build(copy.deepcopy({**dataset, "pipeline": [], "lazy_init": True}))
    pairs = [(Path(row["img_path"]), Path(row["seg_map_path"])) for row in built.load_data_list()]
    if not pairs:
        folders = ", ".join(str(place) for place in places_of(dataset))
        raise ValueError(f"no images are found in {folders} (looked for *{built.img_suffix})")
    count = len(classes_of(dataset))
    first = int(built.reduce_zero_label)
    allowed = np.zeros(65536, bool)
    allowed[: count + first] = True
    allowed[_ignored_by(config.model)] = True
    if is_evaluated:
        allowed[built.ignore_index] = True
    usable = []
    for image, mask in pairs:
        if not image.is_file():
            findings.fault("images that do not exist", str(image))
        elif not mask.is_file():
            findings.fault("images without a mask", f"{image} (looked for {mask})")
        else:
            usable.append((image, mask))
    findings.count("images listed", len(pairs))
    known = {mask.name for _, mask in pairs}
    for folder in {mask.parent for _, mask in pairs}:
        for path in sorted(folder.glob(f"*{built.seg_map_suffix}")) if folder.is_dir() else ():
            if path.name not in known:
                findings.note("masks without an image", str(path))
    for image, mask in evenly(usable, limit):
        _check_mask(image, mask, allowed, range(first, count + first), findings)


def _ignored_by(model: Mapping[str, Any]) -> int:
    """The label that the (last) decode head leaves out of its loss."""
    head = model.get("decode_head") or {}
    return (head[-1] if isinstance(head, (list, tuple)) else head).get("ignore_index", 255)


def _check_mask(image: Path, path: Path, allowed: np.ndarray, classes: range, findings: Findings) -> None:
    try:
        with Image.open(path) as mask:
            mask.load()
            labels, mode, size = np.asarray(mask), mask.mode, mask.size
    except (OSError, SyntaxError, ValueError) as error:
        findings.fault("masks that cannot be read", f"{path} ({error})")
        return
    findings.count("masks opened")
    if mode not in _LABEL_MODES:
        findings.fault("masks that are not of one channel of numbers", f"{path} (mode {mode})")
        return
    present = np.unique(labels).astype(np.int64)
    wrong = [int(x) for x in present if not (0 <= x < len(allowed) and allowed[x])]
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        findings.fault("masks with labels out of range", f"{path} ({shown})")
    elif not any(int(x) in classes for x in present):
        findings.note("masks in which no pixel has a class", str(path))
    _check_image(image, size, findings)


def _check_image(path: Path, size: tuple[int, int], findings: Findings) -> None:
    if not path.is_file():
        return  # has been named
    try:
        image = load_image(path)
    except UnreadableImageError as error:
        findings.fault("images that cannot be read", str(error).removeprefix("cannot read image "))
        return
    findings.count("images opened")
    if image.size != size:
        findings.fault(
            "images of another size than their annotations",
            f"{path} ({image.width}x{image.height} in place of {size[0]}x{size[1]})",
        )


def _name(row: Mapping[str, Any]) -> str:
    return f"annotation {row['id']} of image {row['image_id']}"


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
