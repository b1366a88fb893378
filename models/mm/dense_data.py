"""What the data sets of a detector's or segmenter's config need, and whether it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import nn


def datasets_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The data sets inside wrappers that repeat or join them."""
    if "dataset" in config:
        yield from datasets_of(config["dataset"])
    elif "datasets" in config:
        for part in config["datasets"]:
            yield from datasets_of(part)
    else:
        yield config


def check_data_folders(config: Config, loaders: Sequence[str]) -> None:
    """Raises FileNotFoundError for a folder or file that a data set needs and that is not there."""
    for name in loaders:
        for dataset in datasets_of(config[name]["dataset"]):
            root = Path(dataset.get("data_root") or "")
            for place in [root, *places_of(dataset)]:
                if not place.exists():
                    raise FileNotFoundError(
                        f"{name}: {place} does not exist (looked for in data_root {root}, which must hold "
                        f"{_layout(dataset, root)}); the head of {config.filename} tells more, and --cfg-options "
                        "data_root=FOLDER another place"
                    )


def _layout(dataset: Mapping[str, Any], root: Path) -> str:
    """What a data set needs below its root, in words."""
    needed = [place.relative_to(root).as_posix() for place in places_of(dataset)]
    return " and ".join(f"the file {name}" if Path(name).suffix else f"the folder {name}" for name in needed)


def places_of(dataset: Mapping[str, Any]) -> list[Path]:
    """The folders of a data set, then its annotation file if it has one.

    Raises:
        ValueError: Its `data_prefix` is no dict of names.
    """
    root = Path(dataset.get("data_root") or "")
    prefix = dataset.get("data_prefix") or {}
    if not isinstance(prefix, Mapping) or not all(isinstance(place, (str, type(None))) for place in prefix.values()):
        raise ValueError(f"data_prefix is {prefix!r}; expected a dict of folders' names")
    places = [root / place for place in prefix.values() if place]
    return places + ([root / dataset["ann_file"]] if dataset.get("ann_file") else [])


@contextmanager
def naming_unreadable_images() -> Iterator[None]:
    """A context in which an image that a transform cannot read is an expected error, not a defect.

    Raises:
        ValueError: That is so; the message names the file.
    """
    try:
        yield
    except AssertionError as error:
        found = re.search(r"failed to load image: (.+)", str(error))  # mmcv's words, maybe out of a loader's process
        if found is None:
            raise
        raise ValueError(f"image {found[1]} cannot be read (vitrail-check-data names every such file)") from error


def classes_of(dataset: Mapping[str, Any]) -> list[str]:
    """The names of a data set's classes, without its data; its library must be registered and the default scope.

    Raises:
        ValueError: Its type is unknown, or neither it nor its type names classes.
    """
    with DATASETS.switch_scope_and_registry(None) as registry:
        kind = registry.get(dataset["type"])
    if kind is None:
        raise ValueError(f"data set type {dataset['type']!r} does not exist")
    told = (dataset.get("metainfo") or {}).get("classes") or dataset.get("classes")  # the latter for LiDAR scans
    names = told or getattr(kind, "METAINFO", {}).get("classes")
    if not names:
        raise ValueError(f"the config's data set {dataset['type']} names no classes: give them in its metainfo")
    return [names] if isinstance(names, str) else list(names)


def check_classes(model: nn.Module, classes: tuple[str, ...]) -> None:
    """Raises ValueError where a head has another number of classes than the data."""
    for name, module in model.named_modules():
        count = getattr(module, "num_classes", None)
        is_head = name.split(".")[0] in ("decode_head", "auxiliary_head", "bbox_head", "roi_head")
        if is_head and isinstance(count, int) and count != len(classes) and "loss" not in name:
            raise ValueError(
                f"model.{name} has num_classes={count}, the data have {len(classes)} classes: "
                f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
            )
