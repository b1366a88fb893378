"""What this package registers with timm: the names, and what their pretrained configurations have in common."""

from __future__ import annotations

import fnmatch
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def list_models(pattern: str = "*") -> list[str]:
    """Sorted entry points of vitrail whose name matches a shell-style pattern, for `timm.create_model`."""
    ours = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vitrail.")]
    return sorted(fnmatch.filter(ours, pattern))


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """A pretrained configuration for ImageNet-1k at 224 pixels; keyword arguments add to it and replace."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **kwargs,
    }
