"""Boxes with a heading against polygon clipping in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.layers.rotated_boxes import (
    bev_overlap,
    box_corners_bev,
    distance_iou_3d,
    paired_iou,
    pairwise_iou,
    points_in_boxes,
    rotated_nms,
    wrap_angle,
)


def _boxes(count: int, seed: int, spread: float = 4.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = (torch.rand(count, 3, generator=generator, dtype=dtype) - 0.5) * spread
    extents = torch.rand(count, 3, generator=generator, dtype=dtype) * 4 + 0.2
    yaw = (torch.rand(count, 1, generator=generator, dtype=dtype) - 0.5) * 4 * math.pi
    return torch.cat([centre, extents, yaw], dim=1)


def _corners(box: np.ndarray) -> list[tuple[float, float]]:
    x, y, _, length, width, _, yaw = box[:7].tolist()
    ends = [(length / 2, width / 2), (-length / 2, width / 2), (-length / 2, -width / 2), (length / 2, -width / 2)]
    cos, sin = math.cos(yaw), math.sin(yaw)
    return [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in ends]


def _clip(polygon: list[tuple[float, float]], p: tuple[float, float], q: tuple[float, float]) -> list:
    """Sutherland and Hodgman's step: what lies left of the line from p to q."""

    def side(r: tuple[float, float]) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    kept = []
    for i, current in enumerate(polygon):
        before = polygon[i - 1]
        now, then = side(current), side(before)
        if (now >= 0) != (then >= 0):
            t = then / (then - now)
            kept.append((before[0] + t * (current[0] - before[0]), before[1] + t * (current[1] - before[1])))
        if now >= 0:
            kept.append(current)
    return kept


def _clipped_area(a: np.ndarray, b: np.ndarray) -> float:
    polygon, window = _corners(a), _corners(b)
    for i in range(4):
        if polygon:
            polygon = _clip(polygon, window[i - 1], window[i])
    turns = (p[0] * q[1] - p[1] * q[0] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))
    return abs(sum(turns)) / 2


@pytest.mark.parametrize("spread", [0.5, 4.0, 8.0])
def test_overlap_is_that_of_clipped_polygons(spread: float) -> None:
    a, b = _boxes(400, 0, spread), _boxes(400, 1, spread)
    areas = [_clipped_area(p, q) for p, q in zip(a.numpy(), b.numpy(), strict=True)]
    want = torch.tensor(areas, dtype=torch.float64)
    assert (want == 0).any() == (spread > 1)
    torch.testing.assert_close(bev_overlap(a, b), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bev_overlap(b, a), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bev_overlap(a.float(), b.float()).double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turn", [0.0, math.pi / 2, math.pi, 1e-9, -1e-7, 0.3])
def test_boxes_with_common_edges(turn: float, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6
    box = torch.tensor([60.0, -30.0, 1.0, 4.0, 2.0, 1.5, 0.7], dtype=dtype)
    other = box.clone()
    other[6] += turn
    if turn == math.pi / 2:
        other[3:5] = other[3:5].flip(0)
    want = 8.0 if turn != 0.3 else _clipped_area(box.double().numpy(), other.double().numpy())
    assert bev_overlap(box, other).item() == pytest.approx(want, abs=tolerance)
    along = torch.tensor([math.cos(0.7), math.sin(0.7)], dtype=dtype)
    neighbour, half = box.clone(), box.clone()
    neighbour[:2] += 4 * along
    half[:2] += 2 * along
    assert bev_overlap(box, neighbour).item() == pytest.approx(0, abs=tolerance)
    assert bev_overlap(box, half).item() == pytest.approx(4, abs=tolerance)


def test_iou_of_all_pairs_is_that_of_each_pair() -> None:
    a, b = _boxes(23, 2, 12.0), _boxes(17, 3, 12.0)
    for in_3d in (False, True):
        want = paired_iou(a[:, None], b[None], in_3d)
        assert (want > 0).any()
        assert (want == 0).any()
        torch.testing.assert_close(pairwise_iou(a, b, in_3d), want, rtol=1e-12, atol=1e-13)
    assert pairwise_iou(a, b[:0]).shape == (23, 0)
    assert pairwise_iou(a[:0], b).shape == (0, 17)


def test_iou_in_space_of_upright_boxes() -> None:
    a = torch.tensor([0.0, 0, 0, 2, 2, 2, 0])
    b = torch.tensor([1.0, 0, 1, 2, 2, 2, math.pi])
    assert paired_iou(a, b).item() == pytest.approx(1 / 3)
    assert paired_iou(a, b, in_3d=True).item() == pytest.approx(2 / 14)
    assert paired_iou(a, b + torch.tensor([0.0, 0, 5, 0, 0, 0, 0]), in_3d=True).item() == 0
    flat = torch.tensor([0.0, 0, 0, 0, 0, 0, 0])
    assert paired_iou(flat, flat).item() == 0
    # hull 3 x 2 x 3, centres sqrt(2) apart
    assert distance_iou_3d(a, b).item() == pytest.approx(2 / 14 - 2 / 22)
    assert distance_iou_3d(a, a).item() == pytest.approx(1)


def test_overlap_has_the_gradients_of_finite_differences() -> None:
    a, b = _boxes(12, 4, 2.0).requires_grad_(), _boxes(12, 5, 2.0).requires_grad_()
    assert torch.autograd.gradcheck(distance_iou_3d, (a, b))


def test_gradients_are_finite_where_boxes_coincide() -> None:
    a = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0, 0, 0, 4, 2, 1, math.pi / 2]], requires_grad=True)
    distance_iou_3d(a, a.detach()).sum().backward()
    assert a.grad.isfinite().all()


def _slow_nms(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda j: (-scores[j].item(), j)):
        area = [boxes[j, 3:5].prod().item() for j in range(len(boxes))]
        shared = [_clipped_area(boxes[i].numpy(), boxes[j].numpy()) for j in kept]
        if all(s / (area[i] + area[j] - s) <= threshold for s, j in zip(shared, kept, strict=True)):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7])
def test_nms_is_the_greedy_one(threshold: float) -> None:
    boxes = _boxes(60, 6, 3.0)
    boxes[30:] = boxes[:30] + 0.05
    scores = torch.rand(60, generator=torch.Generator().manual_seed(7)).mul(20).round()  # many are equal
    want = _slow_nms(boxes, scores, threshold)
    assert 1 < len(want) < 60
    assert rotated_nms(boxes, scores, threshold).tolist() == want


def test_nms_by_class() -> None:
    boxes, labels = _boxes(60, 8, 10.0), torch.arange(60) % 3
    scores = torch.rand(60, generator=torch.Generator().manual_seed(9))
    kept = rotated_nms(boxes, scores, 0.1, labels)
    for label in range(3):
        own = torch.nonzero(labels == label)[:, 0]
        assert kept[labels[kept] == label].tolist() == own[rotated_nms(boxes[own], scores[own], 0.1)].tolist()
    assert (scores[kept].diff() <= 0).all()
    assert rotated_nms(boxes[:0], scores[:0], 0.1).shape == (0,)


def test_points_in_boxes() -> None:
    boxes = _boxes(7, 10)
    points = (torch.rand(500, 4, generator=torch.Generator().manual_seed(11), dtype=torch.float64) - 0.5) * 8
    points[3, 1] = torch.nan
    inside = points_in_boxes(points, boxes)
    corners = box_corners_bev(boxes)
    for box, ends, row in zip(boxes, corners, inside, strict=True):
        edges = ends.roll(-1, 0) - ends
        offset = points[:, None, :2] - ends
        left = (edges[:, 0] * offset[..., 1] - edges[:, 1] * offset[..., 0] >= 0).all(dim=1)
        assert torch.equal(row, left & ((points[:, 2] - box[2]).abs() <= box[5] / 2))
    assert inside.any()
    assert not inside[:, 3].any()
    wider = points_in_boxes(points, boxes, margin=0.5)
    assert (wider | ~inside).all()
    assert wider.sum() > inside.sum()
    assert points_in_boxes(points[:0], boxes).shape == (7, 0)


def test_wrap_angle() -> None:
    angle = torch.linspace(-20, 20, 101, dtype=torch.float64)
    wrapped = wrap_angle(angle)
    assert (wrapped >= -math.pi).all()
    assert (wrapped < math.pi).all()
    torch.testing.assert_close(torch.exp(1j * wrapped), torch.exp(1j * angle))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"a has the shape \(3, 5\)"):
        bev_overlap(torch.zeros(3, 5), torch.zeros(3, 7))
    with pytest.raises(ValueError, match="threshold is 2"):
        rotated_nms(torch.zeros(3, 7), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="as many scores"):
        rotated_nms(torch.zeros(3, 7), torch.zeros(4), 0.5)
