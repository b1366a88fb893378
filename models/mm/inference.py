"""Predictions for single images: from decoded pictures to classes, objects or label maps, one kind of result a task."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from vitrail.models.mm.checkpoint import load_trained
from vitrail.models.mm.dense_config_check import blaming
from vitrail.models.mm.dense_data import check_classes, classes_of, datasets_of
from vitrail.models.mm.dense_runner import build_trained_model, complete_dense_config, is_dense, register_library
from vitrail.models.mm.report import readable_names
from vitrail.models.mm.runner import complete_config

_LOADS = "Load"  # what the libraries' transforms that read files are called by


@dataclass(frozen=True)
class Classification:
    """The most probable classes of an image, best first.

    Attributes:
        labels: (K,) class numbers.
        scores: (K,) probabilities.
    """

    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Detection:
    """The objects found in an image, best first.

    Attributes:
        labels: (N,) class numbers.
        scores: (N,).
        boxes: (N, 4) as left, top, right, bottom, in pixels of the image.
        masks: (N, H, W) booleans, or None where the detector has boxes only.
    """

    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel.

    Attributes:
        labels: (H, W) class numbers.
    """

    labels: np.ndarray


Result = Classification | Detection | Segmentation


class Predictor(ABC):
    """A trained model with what it needs to look at an image.

    Attributes:
        classes: Names by class number.
        named: Whether the names are known; otherwise `classes` holds "class 0", "class 1", ...
    """

    classes: list[str]
    named: bool = True

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """What the model wants of an RGB image; of one shape (see `shape_of`) in a batch."""

    @abstractmethod
    def shape_of(self, prepared: Any) -> tuple[int, ...]:
        """The shape of a prepared image. Batches are of one shape, so that a result does not depend on its batch."""

    @abstractmethod
    def predict(self, batch: Sequence[Any]) -> list[Result]:
        """The results for prepared images of one shape."""


def build_predictor(
    config: Config,
    weights: str | Path,
    device: torch.device,
    classes: Sequence[str] | None = None,
    score_threshold: float = 0.3,
) -> Predictor:
    """Loads a trained classifier, detector or segmenter; the data it was trained on are not needed.

    Args:
        config: As read from its file.
        weights: A checkpoint of `vitrail.tools.train`, or one released by others.
        device: Where to run.
        classes: Their names; None for those that stand beside the weights or in the config.
        score_threshold: Least score of an object that a detector reports.

    Raises:
        ValueError: The config, the names and the checkpoint do not fit together.
        OSError: The checkpoint is missing.
    """
    if is_dense(config):
        return _DensePredictor(config, Path(weights), device, classes, score_threshold)
    return _ClassPredictor(config, Path(weights), device, classes)


class _ClassPredictor(Predictor):
    """Reports the five most probable classes."""

    def __init__(self, config: Config, weights: Path, device: torch.device, classes: Sequence[str] | None) -> None:
        config = complete_config(config)
        try:
            self.model = MODELS.build(copy.deepcopy(config.model.to_dict())).backbone
        except (TypeError, KeyError) as error:
            raise ValueError(f"model: {error}") from error
        load_trained(self.model, weights)
        self.model = self.model.to(device).eval()
        self.device = device
        self.transform = create_transform(**config.val_dataloader.dataset.transform.to_dict())
        count = self.model.num_classes
        known = classes or _names_beside(weights, count) or (_imagenet_names() if count == 1000 else None)
        self.named = known is not None
        self.classes = readable_names(_checked(known, count) if known else [f"class {i}" for i in range(count)])

    def prepare(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)

    def shape_of(self, prepared: torch.Tensor) -> tuple[int, ...]:
        return tuple(prepared.shape)

    @torch.inference_mode()
    def predict(self, batch: Sequence[torch.Tensor]) -> list[Result]:
        chances = self.model(torch.stack(list(batch)).to(self.device)).float().softmax(dim=1)
        scores, labels = chances.topk(min(5, len(self.classes)), dim=1)
        pairs = zip(labels.cpu().numpy(), scores.cpu().numpy(), strict=True)
        return [Classification(label, score) for label, score in pairs]


class _DensePredictor(Predictor):
    """Reports objects or label maps, in pixels of the image as it came."""

    def __init__(
        self, config: Config, weights: Path, device: torch.device, classes: Sequence[str] | None, threshold: float
    ) -> None:
        config = complete_dense_config(config, resumes=True)
        register_library(config.default_scope)
        self.scope = config.default_scope
        self.threshold = threshold
        self.model = build_trained_model(config, weights).to(device).eval()
        dataset = next(iter(datasets_of(config.test_dataloader.dataset)))
        with DefaultScope.overwrite_default_scope(self.scope):
            self.classes = list(classes or classes_of(dataset))
            with blaming("test_dataloader.dataset.pipeline"):
                self.pipeline = Compose(_without_files(dataset.get("pipeline", [])))
        check_classes(self.model, tuple(self.classes))

    def prepare(self, image: Image.Image) -> Mapping[str, Any]:
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # the libraries' images are BGR
        size = pixels.shape[:2]
        facts = {"img": pixels, "img_shape": size, "ori_shape": size, "img_id": 0, "img_path": "", "instances": []}
        with DefaultScope.overwrite_default_scope(self.scope):
            return self.pipeline({**facts, "seg_fields": [], "reduce_zero_label": False})

    def shape_of(self, prepared: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(prepared["inputs"].shape)

    @torch.inference_mode()
    def predict(self, batch: Sequence[Mapping[str, Any]]) -> list[Result]:
        together = {name: [sample[name] for sample in batch] for name in ("inputs", "data_samples")}
        return [self._result(sample) for sample in self.model.test_step(together)]

    def _result(self, sample: Any) -> Result:
        if "pred_sem_seg" in sample:
            return Segmentation(sample.pred_sem_seg.data[0].cpu().numpy())
        found = sample.pred_instances
        found = found[found.scores >= self.threshold]
        found = found[found.scores.argsort(descending=True, stable=True)].cpu()
        masks = found.masks.numpy().astype(bool) if "masks" in found else None
        return Detection(found.labels.numpy(), found.scores.numpy(), found.bboxes.numpy(), masks)


def _without_files(pipeline: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A test pipeline without the transforms that read image and truth."""
    return [step for step in pipeline if not str(step["type"]).rpartition(".")[2].startswith(_LOADS)]


def _checked(names: Sequence[str], count: int) -> list[str]:
    if len(names) != count:
        raise ValueError(f"there are names for {len(names)} classes, the model tells {count} apart")
    return list(names)


def _names_beside(weights: Path, count: int) -> list[str] | None:
    """The class names in the `metrics.json` of the training that the weights come from."""
    path = weights.parent / "metrics.json"
    if not path.is_file():
        return None
    try:
        names = [row["class"] for row in json.loads(path.read_text())["per_class"]]
    except (KeyError, TypeError, ValueError):  # of another program
        return None
    return names if len(names) == count else None


def _imagenet_names() -> list[str]:
    return list(ImageNetInfo().label_names())
