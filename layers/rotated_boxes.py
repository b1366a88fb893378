"""Boxes with a heading, seen from above and in space: overlap, suppression of doubles, which points lie inside.

A box is (x, y, z, length, width, height, yaw): its centre, its extents (the length along the heading) and the heading,
counter-clockwise about z from +x. Boxes with more numbers (a velocity) are accepted; what follows the seven is ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "bev_overlap",
    "box_corners_bev",
    "distance_iou_3d",
    "paired_iou",
    "pairwise_iou",
    "points_in_boxes",
    "rotated_nms",
    "wrap_angle",
]

_PAIRS_AT_ONCE = 1 << 20  # bounds the memory of comparing many boxes with many


def wrap_angle(angle: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return (angle + torch.pi).remainder(2 * torch.pi) - torch.pi


def box_corners_bev(boxes: Tensor) -> Tensor:
    """Corners of (..., 7) boxes from above, counter-clockwise from the front left: (..., 4, 2)."""
    _check_boxes("boxes", boxes)
    signs = boxes.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    corners = signs * boxes[..., None, 3:5]  # (..., 4, 2), in the box's own frame
    return _rotate(corners, boxes[..., None, 6]) + boxes[..., None, :2]


def bev_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Area in which two boxes overlap from above, box by box.

    In the frame of b, which there is |x| <= l/2, |y| <= w/2, the area is the integral of clamp(x, -l/2, l/2) dy along
    those parts of a's outline where |y| <= w/2: for every such y the two crossings of the outline, clamped, enclose
    what both boxes share. x and y are linear along an edge, so each edge gives a sum of trapezia. Corners are not
    sorted and no test could flip: the result is continuous in both boxes, and differentiable almost everywhere.

    Args:
        a: (..., 7), with positive extents.
        b: (..., 7), of a shape that broadcasts with a's.

    Returns:
        (...), not negative.

    Raises:
        ValueError: The last dimension has fewer than 7 entries.
    """
    _check_boxes("a", a)
    _check_boxes("b", b)
    half = b[..., 3:5].abs()[..., None, :] / 2  # (..., 1, 2)
    centre = _rotate(a[..., :2] - b[..., :2], -b[..., 6])
    signs = a.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    corners = _rotate(signs * a[..., None, 3:5].abs(), (a[..., 6] - b[..., 6])[..., None]) + centre[..., None, :]
    start, stop = corners, corners.roll(-1, dims=-2)  # (..., 4, 2): the four edges
    start, stop = _cut_edges(start, stop, half[..., 1])
    area = (_mean_of_clamped(start[..., 0], stop[..., 0], half[..., 0]) * (stop[..., 1] - start[..., 1])).sum(-1)
    return area.clamp(min=0)


def paired_iou(a: Tensor, b: Tensor, in_3d: bool = False) -> Tensor:
    """Intersection over union of boxes (..., 7) and (..., 7), box by box, from above or in space: (...)."""
    overlap, size_a, size_b = bev_overlap(a, b), _area(a), _area(b)
    if in_3d:
        overlap = overlap * _height_overlap(a, b)
        size_a, size_b = size_a * a[..., 5].abs(), size_b * b[..., 5].abs()
    union = size_a + size_b - overlap
    return torch.where(union > 0, overlap / union.where(union > 0, torch.ones_like(union)), torch.zeros_like(union))


def pairwise_iou(a: Tensor, b: Tensor, in_3d: bool = False) -> Tensor:
    """Intersection over union of every box of a with every box of b.

    Only pairs whose circumscribed circles meet are computed.

    Args:
        a: (N, 7).
        b: (M, 7).
        in_3d: In space; otherwise from above.

    Returns:
        (N, M).
    """
    _check_boxes("a", a)
    _check_boxes("b", b)
    iou = a.new_zeros(len(a), len(b))
    reach = (a[:, None, 3:5].norm(dim=-1) + b[None, :, 3:5].norm(dim=-1)) / 2
    rows, columns = torch.nonzero((a[:, None, :2] - b[None, :, :2]).norm(dim=-1) < reach, as_tuple=True)
    for chunk in range(0, len(rows), _PAIRS_AT_ONCE):
        i, j = rows[chunk : chunk + _PAIRS_AT_ONCE], columns[chunk : chunk + _PAIRS_AT_ONCE]
        iou = iou.index_put((i, j), paired_iou(a[i], b[j], in_3d))
    return iou


def distance_iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """IoU in space less the squared distance of the centres over the squared diagonal of the upright hull, box by box.

    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020 (arXiv 1911.08287), equation 6, with the overlap of the turned
    boxes in place of upright ones.

    Args:
        a: (..., 7).
        b: (..., 7).

    Returns:
        (...), from -1 to 1.
    """
    corners = torch.cat([box_corners_bev(a), box_corners_bev(b)], dim=-2)
    sides = corners.amax(-2) - corners.amin(-2)
    top = torch.maximum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.minimum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    diagonal = sides.square().sum(-1) + (top - bottom).square()
    distance = (a[..., :3] - b[..., :3]).square().sum(-1)
    return paired_iou(a, b, in_3d=True) - distance / diagonal.clamp(min=1e-12)


def rotated_nms(boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None = None) -> Tensor:
    """Keeps of boxes that overlap too much from above the one with the highest score.

    The order is that of the scores; of equal scores the box that comes first wins, so the outcome does not depend on
    the device.

    Args:
        boxes: (N, 7).
        scores: (N,).
        threshold: Boxes with a larger IoU than this to a kept one go.
        labels: (N,) integers; boxes of different labels do not suppress each other. None: all are alike.

    Returns:
        Indices of the kept boxes, (K,), by falling score.

    Raises:
        ValueError: Shapes differ, or `threshold` is outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; allowed: 0 to 1")
    if scores.shape != boxes.shape[:1] or (labels is not None and labels.shape != scores.shape):
        raise ValueError(f"boxes {tuple(boxes.shape)} need as many scores and labels, got {tuple(scores.shape)}")
    order = scores.argsort(descending=True, stable=True)
    overlaps = pairwise_iou(boxes[order], boxes[order]) > threshold
    if labels is not None:
        overlaps &= labels[order][:, None] == labels[order]
    return order[_greedy(overlaps.cpu()).to(order.device)]


def points_in_boxes(points: Tensor, boxes: Tensor, margin: float = 0.0) -> Tensor:
    """Which points lie in which boxes, faces included.

    Args:
        points: (N, 3 or more), x y z first. A point that is not finite is in no box.
        boxes: (M, 7).
        margin: Added to the boxes on every side.

    Returns:
        (M, N), bool.
    """
    _check_boxes("boxes", boxes)
    inside = torch.zeros(len(boxes), len(points), dtype=torch.bool, device=points.device)
    half = boxes[:, 3:6].to(points.dtype) / 2 + margin
    for i, box in enumerate(boxes.to(points.dtype)):  # a box at a time: (M, N, 3) would not fit for a whole scan
        local = points[:, :3] - box[:3]
        flat = _rotate(local[:, :2], -box[6])
        inside[i] = (flat.abs() <= half[i, :2]).all(dim=1) & (local[:, 2].abs() <= half[i, 2])
    return inside


def _greedy(overlaps: Tensor) -> Tensor:
    """Rows that no kept row before them overlaps; (N, N) bool on the CPU."""
    matrix = overlaps.numpy()
    alive = torch.ones(len(overlaps), dtype=torch.bool)
    flags = alive.numpy()
    for i in range(len(flags)):
        if flags[i]:
            flags[i + 1 :] &= ~matrix[i, i + 1 :]
    return alive


def _rotate(xy: Tensor, angle: Tensor) -> Tensor:
    """(..., 2) turned counter-clockwise by an angle (...)."""
    cos, sin = angle.cos(), angle.sin()
    x, y = xy[..., 0], xy[..., 1]
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


def _cut_edges(start: Tensor, stop: Tensor, half_width: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of edges (..., 2) where |y| <= half_width; an edge without one shrinks to a point."""
    step = stop - start
    dy = step[..., 1]
    safe = torch.where(dy == 0, torch.ones_like(dy), dy)
    y = start[..., 1]
    first = ((y.clamp(-half_width, half_width) - y) / safe).clamp(0, 1)
    last = (((y + dy).clamp(-half_width, half_width) - y) / safe).clamp(0, 1)
    # An edge wholly outside has its clamped ends on one line, where dy of the returned part must be exactly 0.
    new_start, new_stop = start + first[..., None] * step, start + last[..., None] * step
    y_start = y.clamp(-half_width, half_width)
    y_stop = stop[..., 1].clamp(-half_width, half_width)
    return torch.stack([new_start[..., 0], y_start], -1), torch.stack([new_stop[..., 0], y_stop], -1)


def _mean_of_clamped(first: Tensor, last: Tensor, half: Tensor) -> Tensor:
    """Mean of clamp(x, -half, half) while x goes evenly from `first` to `last`."""
    dx = last - first
    safe = torch.where(dx == 0, torch.ones_like(dx), dx)
    # Where x crosses -half and +half; in between and outside, the clamped x is linear.
    low, high = ((-half - first) / safe).clamp(0, 1), ((half - first) / safe).clamp(0, 1)
    t1, t2 = torch.minimum(low, high), torch.maximum(low, high)
    x0, x1, x2, x3 = ((first + t * dx).clamp(-half, half) for t in (torch.zeros_like(t1), t1, t2, torch.ones_like(t1)))
    return (t1 * (x0 + x1) + (t2 - t1) * (x1 + x2) + (1 - t2) * (x2 + x3)) / 2


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 3] * boxes[..., 4]).abs()


def _height_overlap(a: Tensor, b: Tensor) -> Tensor:
    half_a, half_b = a[..., 5].abs() / 2, b[..., 5].abs() / 2
    top = torch.minimum(a[..., 2] + half_a, b[..., 2] + half_b)
    bottom = torch.maximum(a[..., 2] - half_a, b[..., 2] - half_b)
    return (top - bottom).clamp(min=0)


def _check_boxes(name: str, boxes: Tensor) -> None:
    if boxes.dim() == 0 or boxes.shape[-1] < 7:
        raise ValueError(f"{name} has the shape {tuple(boxes.shape)}; allowed: (..., 7) or wider")
