"""Classification data: image sources, timm's transforms on top of them, and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from mmengine.registry import DATASETS, FUNCTIONS
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, ImageFolder

from vitrail.models.mm.images import UnreadableImageError, load_image
from vitrail.models.mm.seeding import derive_seed, seeded

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "test")}


class SampleKey(NamedTuple):
    """What a sampler asks of a data set: which image, and for which place of which epoch.

    The place matters where an epoch shows an image several times (repeated augmentation).
    """

    epoch: int
    position: int
    index: int


class ImageSource(Protocol):
    """Labelled images by index."""

    classes: list[str]
    labels: Sequence[int]

    def load(self, index: int) -> Image.Image:
        """Decodes one image."""

    def name(self, index: int) -> str:
        """What to call one image in a message."""


class _VisibleImages(ImageFolder):
    """torchvision's listing of a folder of class folders, without the hidden ones."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Sorted names of the class folders, and the label of each."""
        classes = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir() and entry.name[0] != ".")
        if not classes:
            raise ValueError(f"{directory} has no class folders; expected {directory}/<class>/<image>")
        return classes, {name: label for label, name in enumerate(classes)}


class FolderSource:
    """Image files in a folder a class: `root/train/<class>/*` and `root/val/<class>/*` (ImageNet's layout).

    What is hidden (its name begins with a dot) is left out, folders and files.

    Args:
        root: Folder that holds the splits; a folder of classes is accepted for `val`.
        split: "train" or "val".

    Raises:
        FileNotFoundError: The folder is missing.
        NotADirectoryError: It is a file.
        ValueError: A class has no image, or there is no class.
    """

    def __init__(self, root: str, split: str) -> None:
        folder = _split_folder(Path(root).expanduser(), split)
        listing = _VisibleImages(
            str(folder), is_valid_file=lambda path: is_visible_image(Path(path).relative_to(folder)), allow_empty=True
        )
        empty = set(range(len(listing.classes))) - set(listing.targets)
        if empty:
            names = ", ".join(listing.classes[label] for label in sorted(empty)[:5])
            raise ValueError(f"{folder}: {len(empty)} of {len(listing.classes)} class folders have no image: {names}")
        self.folder = folder
        self.classes = listing.classes
        self.labels = listing.targets
        self._paths = [path for path, _ in listing.samples]

    def load(self, index: int) -> Image.Image:
        """Decodes one image."""
        return load_image(self._paths[index])

    def name(self, index: int) -> str:
        """Path of one image below the split's folder."""
        return str(Path(self._paths[index]).relative_to(self.folder))


class Cifar10Source:
    """CIFAR-10 as torchvision stores it (`root/cifar-10-batches-py`); the files' checksums are verified.

    Raises:
        FileNotFoundError: The files are missing or damaged.
    """

    def __init__(self, root: str, split: str) -> None:
        try:
            data = CIFAR10(str(Path(root).expanduser()), train=split == "train")
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no intact CIFAR-10 in {root}; expected {root}/cifar-10-batches-py with the original files "
                f"(torchvision.datasets.CIFAR10({root!r}, download=True) fetches them)"
            ) from error
        self.classes = list(data.classes)
        self.labels = data.targets
        self._pixels = data.data
        self._split = split

    def load(self, index: int) -> Image.Image:
        """One image, 32x32."""
        return Image.fromarray(self._pixels[index])

    def name(self, index: int) -> str:
        """The split and the index."""
        return f"{self._split}[{index}]"


class DigitsSource:
    """The 1,797 handwritten digits that scikit-learn ships (UCI ML hand-written digits), enlarged from 8 to 32 pixels.

    Held out is a stratified fifth, always the same one.

    Raises:
        ValueError: scikit-learn is not installed.
    """

    def __init__(self, split: str) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise ValueError("the digits data need scikit-learn: pip install 'vitrail[train]'") from None
        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target, shuffle=True
        )
        self._chosen = np.sort(parts[0 if split == "train" else 1])
        self.classes = [str(digit) for digit in range(10)]
        self.labels = digits.target[self._chosen].tolist()
        self._images = [_enlarge(digits.images[i]) for i in self._chosen]

    def load(self, index: int) -> Image.Image:
        """One digit, white on black."""
        return self._images[index]

    def name(self, index: int) -> str:
        """Index into scikit-learn's array."""
        return f"digit {self._chosen[index]}"


SOURCES = {"image_folder": FolderSource, "cifar10": Cifar10Source, "digits": DigitsSource}


@DATASETS.register_module()
class ClassificationDataset(Dataset):
    """Images of a source, transformed; what comes out depends on (seed, epoch, position, index) alone.

    Args:
        source: Arguments of a source, its kind under `type` ("image_folder", "cifar10" or "digits").
        transform: Arguments of `timm.data.create_transform`.
        seed: Of the augmentations.
        unreadable: "error" stops at an image that cannot be decoded; "skip" goes on without it and counts it.

    Raises:
        ValueError: An argument is unknown; later, an image cannot be decoded (its message names the file).
    """

    def __init__(
        self, source: Mapping[str, Any], transform: Mapping[str, Any], seed: int = 0, unreadable: str = "error"
    ) -> None:
        if unreadable not in ("error", "skip"):
            raise ValueError(f"unreadable is {unreadable!r}; allowed: 'error', 'skip'")
        self.source = build_source(source)
        self.transform = create_transform(**transform)
        self.seed = seed
        self.unreadable = unreadable

    @property
    def metainfo(self) -> dict[str, Any]:
        """The class names, for mmengine."""
        return {"classes": list(self.source.classes)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the transform makes of an image."""
        with seeded(0):
            return tuple(self.transform(Image.new("RGB", (64, 64))).shape)

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        if not isinstance(key, tuple):
            key = SampleKey(0, key, key)
        epoch, position, index = key
        sample = {"labels": self.source.labels[index], "indices": index}
        try:
            image = self.source.load(index)
        except UnreadableImageError:
            if self.unreadable == "error":
                raise
            return {"images": None, **sample}
        with seeded(derive_seed("sample", self.seed, epoch, position, index)):
            return {"images": self.transform(image), **sample}


def build_source(source: Mapping[str, Any]) -> ImageSource:
    """Builds a source from its config.

    Raises:
        ValueError: The kind or an argument is unknown.
    """
    arguments = dict(source)
    kind = arguments.pop("type", None)
    if kind not in SOURCES:
        raise ValueError(f"data source type is {kind!r}; allowed: {', '.join(sorted(SOURCES))}")
    if arguments.get("split") not in _SPLIT_FOLDERS:
        raise ValueError(f"data source split is {arguments.get('split')!r}; allowed: train, val")
    try:
        return SOURCES[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"data source {kind!r}: {error}") from error


@FUNCTIONS.register_module()
def collate_classification(samples: Sequence[Mapping[str, Any]], replace_unreadable: bool) -> dict[str, torch.Tensor]:
    """Stacks samples; deals with those whose image could not be decoded.

    Args:
        samples: What `ClassificationDataset` returned.
        replace_unreadable: In training, a neighbour of the batch takes the place, so that batches keep their size
            (mixing needs pairs, processes need equal batches); in evaluation the sample is left out.

    Returns:
        `images` (B, C, H, W), `labels` (B,), `indices` (B,), and `unreadable`: the indices left out or replaced. With
        no image left, which only evaluation allows, `images` is (0,).

    Raises:
        ValueError: No image of a training batch could be decoded.
    """
    readable = [sample for sample in samples if sample["images"] is not None]
    lost = [sample["indices"] for sample in samples if sample["images"] is None]
    if replace_unreadable and not readable:
        raise ValueError(f"none of the {len(samples)} images of a training batch can be read: there is no substitute")
    if replace_unreadable:
        readable += [readable[i % len(readable)] for i in range(len(lost))]
    return {
        "images": torch.stack([sample["images"] for sample in readable]) if readable else torch.empty(0),
        "labels": torch.tensor([sample["labels"] for sample in readable], dtype=torch.long),
        "indices": torch.tensor([sample["indices"] for sample in readable], dtype=torch.long),
        "unreadable": torch.tensor(lost, dtype=torch.long),
    }


def _split_folder(root: Path, split: str) -> Path:
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, expected a folder of images")
    for name in _SPLIT_FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    if split == "val" and not (root / "train").is_dir():
        return root
    raise FileNotFoundError(f"data folder {root} has no folder {' or '.join(_SPLIT_FOLDERS[split])}")


def is_visible_image(path: Path) -> bool:
    """Whether a file is named like an image and neither it nor a folder on the way is hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _enlarge(pixels: np.ndarray) -> Image.Image:
    grey = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    return grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
