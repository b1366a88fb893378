"""Targets, losses and decoding of the head on maps from above."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitrail.layers.rotated_boxes import paired_iou
from vitrail.models.mm.center_head import CenterHead, draw_gaussians, gaussian_radius, heat_loss

RANGE = (0.0, -8.0, -2.0, 24.0, 8.0, 2.0)
SIZE = (32, 48)  # cells of half a metre


def _head(**changes: object) -> CenterHead:
    arguments = {"in_channels": 8, "tasks": [["car", "van"], ["cyclist"]], "point_range": RANGE, "dim": 8}
    return CenterHead(**{**arguments, "iou_weights": (0.5, 0.5, 0.5), **changes})


def _boxes(columns: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    boxes = torch.tensor(
        [
            [5.1, 2.3, -0.5, 4.0, 1.8, 1.5, 0.3, 1.0, 2.0],
            [12.9, -3.2, -0.4, 4.5, 1.9, 1.6, -2.9, 0.0, -1.0],
            [20.0, 6.0, -0.2, 1.8, 0.6, 1.7, 1.5, 3.0, 0.0],
            [90.0, 6.0, -0.2, 1.8, 0.6, 1.7, 1.5, 0.0, 0.0],  # off the map
        ]
    )[:, :columns]
    return [boxes, boxes[:0]], [torch.tensor([0, 1, 2, 0]), torch.zeros(0, dtype=torch.int64)]


def test_bumps_are_the_larger_of_overlapping_gaussians() -> None:
    heat = torch.zeros(2, 12, 10)
    plane, x, y, radius = torch.tensor([[0, 0, 1], [3, 5, 0], [4, 4, 11], [2, 3, 2]])
    draw_gaussians(heat, plane, x, y, radius)
    want = torch.zeros_like(heat)
    for p, u, v, r in zip(plane.tolist(), x.tolist(), y.tolist(), radius.tolist(), strict=True):
        for row in range(12):
            for column in range(10):
                if max(abs(row - v), abs(column - u)) <= r:
                    value = math.exp(-((row - v) ** 2 + (column - u) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                    want[p, row, column] = max(want[p, row, column].item(), value)
    torch.testing.assert_close(heat, want)
    assert heat[0, 4, 3] == heat[0, 4, 5] == heat[1, 11, 0] == 1
    draw_gaussians(heat, plane[:0], x[:0], y[:0], radius[:0])


def test_radius_is_the_smallest_of_three() -> None:
    # Of the three equations the last has the smallest root here.
    got = gaussian_radius(torch.tensor([8.0]), torch.tensor([4.0]), 0.5).item()
    third = (-12 + math.sqrt(144 + 4 * 2 * 0.5 * 32)) / 2
    assert got == pytest.approx(third)
    small, large = gaussian_radius(torch.tensor([4.0, 8.0]), torch.tensor([2.0, 4.0]), 0.1)
    assert large == pytest.approx(2 * small.item(), rel=1e-5)


def test_targets_sit_at_the_centres() -> None:
    head = _head()
    boxes, labels = _boxes()
    targets = head.make_targets(boxes, labels, 3, SIZE)
    assert targets.heat.shape == (2, 3, *SIZE)
    assert targets.scan.tolist() == [0, 0, 0]
    assert targets.cell.tolist() == [20 * 48 + 10, 9 * 48 + 25, 28 * 48 + 40]
    assert [tuple(p) for p in (targets.heat == 1).nonzero().tolist()] == [(0, 0, 20, 10), (0, 1, 9, 25), (0, 2, 28, 40)]
    assert targets.heat[1].max() == 0


def _perfect_maps(head: CenterHead, boxes: list[Tensor], labels: list[Tensor]) -> list[dict[str, Tensor]]:
    maps, first = [], 0
    for task in head.tasks:
        own = [(label >= first) & (label < first + len(task)) for label in labels]
        targets = head.make_targets(
            [b[m] for b, m in zip(boxes, own, strict=True)],
            [label[m] - first for label, m in zip(labels, own, strict=True)],
            len(task),
            SIZE,
        )
        held = {"heat": torch.where(targets.heat == 1, 9.0, -9.0), "iou": torch.ones(2, 1, *SIZE)}
        for name, values in head._encode(targets, SIZE).items():
            plane = torch.zeros(2, values.shape[1], *SIZE)
            plane.flatten(2)[targets.scan, :, targets.cell] = values
            held[name] = plane
        maps.append(held)
        first += len(task)
    return maps


@pytest.mark.parametrize("with_velocity", [False, True])
def test_what_is_encoded_is_decoded(with_velocity: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head = _head(with_velocity=with_velocity)
    boxes, labels = _boxes(9 if with_velocity else 7)
    maps = _perfect_maps(head, boxes, labels)
    monkeypatch.setattr(CenterHead, "forward", lambda self, x: maps)
    first, second = head.predict(torch.zeros(2, 8, *SIZE))
    order = first["labels"].argsort()
    assert first["labels"][order].tolist() == [0, 1, 2]
    torch.testing.assert_close(first["boxes"][order], boxes[0][:3], rtol=1e-5, atol=1e-5)
    assert all(len(value) == 0 for value in second.values())
    losses = head.loss(torch.zeros(2, 8, *SIZE), boxes, labels)
    assert losses["loss_heat"] < 0.1
    for name in losses.keys() - {"loss_heat"}:
        assert losses[name].item() == pytest.approx(0, abs=1e-4), name
    assert ("loss_velocity" in losses) == with_velocity


def test_scores_are_corrected_by_the_predicted_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    head = _head(iou_weights=(0.25, 0.5, 1.0))
    boxes, labels = _boxes()
    maps = _perfect_maps(head, boxes, labels)
    for held in maps:
        held["iou"].fill_(0.0)  # an IoU of a half
    monkeypatch.setattr(CenterHead, "forward", lambda self, x: maps)
    found = head.predict(torch.zeros(2, 8, *SIZE))[0]
    p = 1 / (1 + math.exp(-9.0))
    want = {label: p ** (1 - share) * 0.5**share for label, share in enumerate((0.25, 0.5, 1.0))}
    got = dict(zip(found["labels"].tolist(), found["scores"].tolist(), strict=True))
    assert got == pytest.approx(want)
    assert (found["scores"].diff() <= 0).all()


def test_doubles_go_within_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    head = _head(nms_thresholds=(0.3, 0.95, 0.3), iou_weights=None)
    box = torch.tensor([10.1, 0.1, 0.0, 4.0, 1.8, 1.5, 0.0])
    near = box + torch.tensor([0.5, 0, 0, 0, 0, 0, 0])
    boxes, labels = [torch.stack([box, near, box, near])], [torch.tensor([0, 0, 1, 1])]
    both = _perfect_maps(head, [*boxes, boxes[0][:0]], [*labels, labels[0][:0]])
    monkeypatch.setattr(CenterHead, "forward", lambda self, x: both)
    found = head.predict(torch.zeros(2, 8, *SIZE))[0]
    assert sorted(found["labels"].tolist()) == [0, 1, 1]
    assert paired_iou(box, near) > 0.3


def test_heat_loss_is_the_focal_one() -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    heat = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 0.9
    heat[0, 1, 2, 3] = heat[1, 0, 0, 0] = 1
    p = logits.sigmoid()
    want = -sum(
        (1 - q) ** 2 * math.log(q) if t == 1 else (1 - t) ** 4 * q**2 * math.log(1 - q)
        for q, t in zip(p.flatten().tolist(), heat.flatten().tolist(), strict=True)
    )
    assert heat_loss(logits, heat).item() == pytest.approx(want / 2)
    assert heat_loss(torch.full((1, 1, 2, 2), -60.0), torch.zeros(1, 1, 2, 2)).item() == 0


@pytest.mark.parametrize("empty", [False, True])
def test_losses_reach_every_parameter(empty: bool) -> None:
    head = _head(with_velocity=True)
    boxes, labels = _boxes(9)
    if empty:
        boxes, labels = [b[:0] for b in boxes], [label[:0] for label in labels]
    losses = head.loss(torch.randn(2, 8, *SIZE), boxes, labels)
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_training_raises_the_overlap() -> None:
    head = _head()
    boxes, labels = _boxes()
    x = torch.randn(2, 8, *SIZE)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        losses = head.loss(x, boxes, labels)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    found = head.predict(x)[0]
    for box, label in zip(boxes[0][:3], labels[0][:3], strict=True):
        own = found["boxes"][found["labels"] == label]
        assert paired_iou(own, box, in_3d=True).max() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nms_thresholds": (0.5, 0.5)}, "nms_thresholds is .* 3 numbers from 0 to 1"),
        ({"iou_weights": (0.5, 0.5, 1.5)}, "iou_weights is"),
        ({"point_range": (0, 0, 0, 1, 1)}, "point_range is"),
        ({"point_range": (0, 0, 0, 1, 1, -1)}, "point_range is"),
    ],
)
def test_arguments_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _head(**changes)
