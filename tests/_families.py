"""The smallest variant of every family of backbones."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

import vitrail  # noqa: F401 -- registers the models

# Shallower where a family has no small variant.
SMALLEST: dict[str, dict[str, Any]] = {
    "biformer_n": {},
    "davit_t": {"depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)},
    "dinat_n": {},
    "dinats_t": {"depths": (2, 2, 2, 2), "dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)},
    "gated_swinrmt_retention_n": {},
    "gated_swinrmt_swat_n": {},
    "l2vit_n": {},
    "mobilenetv2_ela_b": {},
    "nat_mini": {"depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)},
    "resnet18_ela_t": {},
    "rmt_n": {},
    "swin_t": {"depths": (1, 1, 2, 1), "dims": (32, 64, 64, 128), "num_heads": (1, 2, 2, 4)},
    "vsa_swin_n": {},
    "vsa_vitae_s": {},
}
_FIXED_SIZE = ("vsa_vitae_s",)  # made for one size


def build(name: str, checkpointing: bool = False, size: int = 64, **changes: Any) -> nn.Module:
    """A family's smallest model with seven classes, in training mode, with the same weights every time."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **{**SMALLEST[name], **changes}).train()
    if hasattr(model, "set_input_size") and name not in _FIXED_SIZE:
        model.set_input_size(img_size=(size, size))
    model.set_grad_checkpointing(checkpointing)
    return model
