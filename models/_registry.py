"""What this package registers with timm: the names, and what their pretrained configurations have in common."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg

PACKAGE = "package:"  # begins the address of a weights file that comes with the package
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What the recipes of the same names, configs/digits and configs/cifar10, feed to a model.
_SMALL_DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "label_names": tuple("0123456789"),
        "description": "trained on scikit-learn's handwritten digits",
    },
    "cifar10": {
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "label_names": _CIFAR10,
        "description": "trained on CIFAR-10",
    },
}


def list_models(pattern: str = "*") -> list[str]:
    """Sorted entry points of vitrail whose name matches a shell-style pattern, for `timm.create_model`."""
    ours = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vitrail.")]
    return sorted(fnmatch.filter(ours, pattern))


def configurations(name: str) -> list[PretrainedCfg]:
    """The pretrained configurations of an entry point, by their tags; of one without tags, its only one."""
    default = timm.models.get_pretrained_cfg(name)
    tags = timm.models.list_models(f"{name}.*", include_tags=True) if default else []
    exact = [timm.models.get_pretrained_cfg(tag) for tag in tags if tag.partition(".")[0] == name]
    return exact or ([default] if default else [])


def is_shipped(cfg: PretrainedCfg) -> bool:
    """Whether the weights of a configuration come with the package."""
    return isinstance(cfg.url, str) and cfg.url.startswith(PACKAGE)


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


def shipped_cfgs(
    make_cfg: Callable[..., dict[str, Any]], variant: str, *data: str, **kwargs: Any
) -> dict[str, dict[str, Any]]:
    """Pretrained configurations, by `VARIANT.DATA`, of weights of our own that come with the package.

    Args:
        make_cfg: Makes a configuration of the family from what differs.
        variant: Name of the entry point; its weights are the files `weights/VARIANT.DATA.safetensors`.
        *data: "digits" or "cifar10", 32 pixels and ten classes; timm takes the first for the variant's default.
        **kwargs: Further arguments of `make_cfg`.
    """
    common = {"num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0, "license": "apache-2.0"}
    return {
        f"{variant}.{name}": make_cfg(
            url=f"{PACKAGE}{variant}.{name}.safetensors", **common, **_SMALL_DATA[name], **kwargs
        )
        for name in data
    }
