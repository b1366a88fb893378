"""The models that commands are given by name: `NAME` or `NAME.TAG`, with clear errors for what does not exist."""

from __future__ import annotations

import timm
from timm.models import PretrainedCfg

import vitrail
from vitrail.models._registry import configurations
from vitrail.tools._common.cli import UsageError, unknown_name


def find_configuration(model: str) -> tuple[str, PretrainedCfg]:
    """The entry point and the pretrained configuration that a name means.

    Raises:
        UsageError: There is no such model of this package, or no such tag of it.
    """
    name, _, tag = model.partition(".")
    known = vitrail.list_models()
    if name not in known:
        raise unknown_name("model", name, known)
    if not tag:
        return name, timm.models.get_pretrained_cfg(name)
    tagged = {cfg.tag: cfg for cfg in configurations(name) if cfg.tag}
    if tag not in tagged:
        raise UsageError(f"{name} has no weights tagged {tag!r}; its tags: {', '.join(tagged) or 'none'}")
    return name, tagged[tag]


def check_takes_images(model: str) -> None:
    """Raises `UsageError` unless a name means a model of images."""
    name, cfg = find_configuration(model)
    if cfg.input_size is None:
        raise UsageError(f"{name} takes points, not images; allowed: models of images")


def image_models() -> list[str]:
    """Sorted entry points that take images."""
    return [name for name in vitrail.list_models() if timm.models.get_pretrained_cfg(name).input_size]
