"""Judges whether a model of ours computes what its definition does, before it is timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vitrail.tools._common.kernel_check import relative_error
from vitrail.tools._common.literal_models import compute_by_definition
from vitrail.tools._common.ready_models import PRECISIONS, Settings, Source, autocast, create

_IMAGES = 2
_MAY = 4.0  # times the error of the definition in the same dtype; BiFormer's routes may differ for either


class ModelVerdict(NamedTuple):
    """The relative error of a model's logits, and whether it is allowed."""

    error: float
    correct: bool


def check_model(
    source: Source, model: nn.Module, size: tuple[int, int, int], settings: Settings
) -> ModelVerdict | None:
    """Compares a model's logits with those of its definition in float64, on two images; None for a peer.

    The definition has the model's weights: for ours every operator's reference, for an accelerated model timm's own.

    Args:
        source: What the model's name stands for.
        model: As `build` made it.
        size: Of an image, (channels, height, width).
        settings: Its dtype and device.
    """
    definition = _definition(source, model, settings)
    if definition is None:
        return None
    generator = torch.Generator(settings.device).manual_seed(0)
    images = torch.randn(min(settings.batch_size, _IMAGES), *size, device=settings.device, generator=generator)
    images = images.to(PRECISIONS[settings.precision])
    training = model.training
    with torch.no_grad():
        with autocast(settings):
            ours, plain = model.eval()(images).double(), definition.eval()(images).double()
        truth = definition.double()(images.double())
    model.train(training)
    error, allowed = (relative_error(logits, truth) for logits in (ours, plain))
    dtype = torch.bfloat16 if settings.precision == "amp-bf16" else PRECISIONS[settings.precision]
    return ModelVerdict(error, error <= _MAY * allowed + torch.finfo(dtype).eps)


def _definition(source: Source, model: nn.Module, settings: Settings) -> nn.Module | None:
    """A model of the same weights without anything fused."""
    if source.kind not in ("vitrail", "authors", "accelerated"):
        return None
    definition, _ = create(source, settings)
    weight = next(model.parameters())
    definition.to(weight.device, weight.dtype).load_state_dict(model.state_dict())
    if source.kind != "accelerated":
        compute_by_definition(definition)
    return definition
