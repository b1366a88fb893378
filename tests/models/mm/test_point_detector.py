"""The detector around a backbone for scans: a tiny stand-in, and the real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from vitrail.models.mm import center_head  # noqa: F401 -- registers the head
from vitrail.models.mm.point_detector import PointDetector, create_point_backbone

RANGE = (0.0, -8.0, -2.0, 16.0, 8.0, 2.0)


@MODELS.register_module(name="CountingBackbone", force=True)
class CountingBackbone(nn.Module):
    """Counts points in cells of a metre."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, points: list[Tensor]) -> Tensor:
        maps = torch.zeros(len(points), 1, 16, 16)
        for plane, scan in zip(maps, points, strict=True):
            x, y = scan[:, 0].long(), (scan[:, 1] + 8).long()
            plane[0].index_put_((y, x), torch.ones(len(scan)), accumulate=True)
        return self.conv(maps)


def _detector(**changes: Any) -> PointDetector:
    head = {"type": "CenterHead", "in_channels": 8, "tasks": [["car"]], "point_range": RANGE, "dim": 8}
    neck = {"type": "CascadedBevBackbone", "dim": 8, "depth": 1, "blocks": (1, 1, 1)}
    return PointDetector(**{"backbone": {"type": "CountingBackbone"}, "bbox_head": head, "neck": neck, **changes})


def _batch() -> dict[str, list[Any]]:
    box = torch.tensor([[4.0, 1.0, 0.0, 4.0, 2.0, 2.0, 0.2]])
    points = [torch.rand(40, 4) * torch.tensor([16.0, 16, 2, 1]) - torch.tensor([0.0, 8, 1, 0]), torch.zeros(0, 4)]
    samples = [
        {"boxes": box, "labels": torch.tensor([0])},
        {"boxes": box[:0], "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return {"inputs": points, "data_samples": samples}


def test_modes() -> None:
    model, batch = _detector(), _batch()
    assert model(**batch).shape == (2, 8, 16, 16)
    total, values = model.parse_losses(model(**batch, mode="loss"))
    total.backward()
    assert {"loss_heat", "loss_box", "loss_overlap"} <= values.keys()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    found = model.eval().test_step(batch)
    assert [sample["boxes"].shape for sample in found] == [(1, 7), (0, 7)]
    assert found[1]["predicted"]["boxes"].shape[1] == 7
    assert len(model(batch["inputs"], mode="predict")) == 2
    with pytest.raises(ValueError, match="mode is 'train'"):
        model(**batch, mode="train")


def test_a_scatterformer_inside() -> None:
    grid = {"low": (0.0, -8.0, -2.0), "high": (16.0, 8.0, 2.0), "voxel_size": (0.5, 0.5, 0.5), "window_size": 4}
    small = {"voxel_dim": 8, "dim": 16, "num_heads": 2, "stem_depth": 1, "depths": (1, 1), "pool_heads": 2}
    head = {"type": "CenterHead", "in_channels": 16, "tasks": [["car"]], "point_range": RANGE, "dim": 8}
    backbone = {"type": "PointBackbone", "name": "scatterformer_kitti_n", **grid, **small}
    model = _detector(backbone=backbone, bbox_head=head, neck=None)
    batch = _batch()
    total, _ = model.parse_losses(model(**batch, mode="loss"))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(**batch).shape == (2, 16, 16, 16)
    nothing = {"inputs": [torch.zeros(0, 4)] * 2, "data_samples": batch["data_samples"][1:] * 2}
    total, _ = model.parse_losses(model(**nothing, mode="loss"))
    assert total.isfinite()
    assert len(model.eval().test_step(nothing)) == 2
    with pytest.raises(ValueError, match=r"point_range is .*, the backbone sees"):
        _detector(backbone=backbone, bbox_head={**head, "point_range": (0, -8, -2, 17, 8, 2)}, neck=None)


def test_unknown_backbones_are_named() -> None:
    with pytest.raises(ValueError, match=r"'scatterformer_x', which timm does not know; .*scatterformer_kitti"):
        create_point_backbone("scatterformer_x")
