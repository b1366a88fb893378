"""A detector of objects in LiDAR scans: point backbone, network on the map from above, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from vitrail.layers.bev import CascadedBevBackbone

MODELS.register_module(name="CascadedBevBackbone", module=CascadedBevBackbone)


@MODELS.register_module(name="PointBackbone")
def create_point_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Builds a backbone for scans from timm's registry.

    Args:
        name: Entry point, such as "scatterformer_kitti".
        **kwargs: Of the entry point; `pretrained=True` for its weights.

    Raises:
        ValueError: timm does not know the name.
    """
    if not timm.is_model(name):
        known = ", ".join(timm.list_models("scatterformer*"))
        raise ValueError(f"model.backbone.name is {name!r}, which timm does not know; backbones for scans: {known}")
    return timm.create_model(name, **kwargs)


@MODELS.register_module()
class PointDetector(BaseModel):
    """From scans to boxes.

    Args:
        backbone: Config of a module from a list of scans (N_i, F) to a map (B, C, H, W), seen from above.
        bbox_head: Config of a head with `loss` and `predict`.
        neck: Config of a module on the map; None for none.
        data_preprocessor: Moves batches to the device.

    Raises:
        ValueError: The backbone's and the head's ranges or channels differ.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        bbox_head: Mapping[str, Any],
        neck: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = MODELS.build(dict(backbone))
        self.neck = MODELS.build(dict(neck)) if neck else nn.Identity()
        self.bbox_head = MODELS.build(dict(bbox_head))
        _check_range(self.backbone, self.bbox_head)

    def init_weights(self) -> None:
        """Leaves the weights as the parts made them (mmengine would initialise them again)."""

    def forward(
        self, inputs: Sequence[Tensor], data_samples: Sequence[Mapping[str, Any]] | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """The map, the losses or the boxes of a batch.

        Args:
            inputs: One (N_i, F) tensor a scan, x y z first; N_i may be 0.
            data_samples: For each scan `boxes` (M, 7 or 9) and `labels` (M,), and what else the data set gives.
            mode: "tensor", "loss" or "predict".

        Returns:
            For "predict" the data samples, each with `predicted`: `boxes` (K, 7 or 9), `scores` and `labels`.

        Raises:
            ValueError: `mode` is unknown.
        """
        if mode not in ("tensor", "loss", "predict"):
            raise ValueError(f"mode is {mode!r}; allowed: 'tensor', 'loss', 'predict'")
        x = self.neck(self.backbone(list(inputs)))
        if mode == "tensor":
            return x
        if mode == "loss":
            boxes, labels = ([sample[key] for sample in data_samples or ()] for key in ("boxes", "labels"))
            return self.bbox_head.loss(x, boxes, labels)
        samples = data_samples or [{} for _ in inputs]
        with torch.no_grad():
            predicted = self.bbox_head.predict(x)
        return [{**sample, "predicted": boxes} for sample, boxes in zip(samples, predicted, strict=True)]


def _check_range(backbone: nn.Module, head: nn.Module) -> None:
    grid = getattr(backbone, "grid", None)
    low, high = getattr(grid, "low", None), getattr(grid, "high", None)
    if low is None or high is None:
        return
    seen = (*low, *high)
    if any(abs(a - b) > 1e-3 for a, b in zip(seen, head.point_range, strict=True)):
        raise ValueError(f"model.bbox_head.point_range is {head.point_range}, the backbone sees {seen}")
