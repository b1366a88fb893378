"""mmcv's operators without its extension, called as mmcv calls them, against literal float64 definitions."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

pytest.importorskip("mmcv", reason="needs onedl-mmcv: pip install vitrail[mm]")

from vitrail.models.mm import _operators
from vitrail.models.mm.ops import StandInFinder, StandInModule, install_operators

if not isinstance(importlib.import_module("mmcv._ext"), StandInModule):
    pytest.skip("mmcv has its compiled operators here", allow_module_level=True)

import mmcv.ops

Pair = tuple[int, int]
DOUBLE = {"dtype": torch.float64}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _boxes(count: int, extent: float = 20.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, **DOUBLE) * extent
    return torch.cat((corner, corner + 1 + torch.rand(count, 2, generator=generator, **DOUBLE) * extent / 2), 1)


def _literal_iou(a: list[float], b: list[float], offset: int) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    shared = max(width, 0.0) * max(height, 0.0)
    sizes = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return shared / (sum(sizes) - shared)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 60])
def test_nms(count: int, offset: int, device: str) -> None:
    boxes, scores = _boxes(count), torch.rand(count, **DOUBLE)
    kept: list[int] = []
    for i in sorted(range(count), key=lambda i: -scores[i].item()):
        if all(_literal_iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.3 for j in kept):
            kept.append(i)
    dets, places = mmcv.ops.nms(boxes.to(device), scores.to(device), 0.3, offset=offset)
    assert places.tolist() == kept
    assert torch.equal(dets.cpu(), torch.cat((boxes, scores[:, None]), 1)[kept])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("count", [1, 40])
def test_soft_nms(count: int, method: str, offset: int, device: str) -> None:
    boxes, scores = _boxes(count), torch.rand(count, **DOUBLE)
    rest = dict(enumerate(scores.tolist()))
    rows, places = [], []
    while rest:
        best = max(rest, key=lambda i: rest[i])
        places.append(best)
        rows.append([*boxes[best].tolist(), rest.pop(best)])
        for i in list(rest):
            overlap = _literal_iou(boxes[best].tolist(), boxes[i].tolist(), offset)
            if method == "gaussian":
                rest[i] *= math.exp(-(overlap**2) / 0.5)
            elif overlap >= 0.3:
                rest[i] *= 1 - overlap if method == "linear" else 0.0
            if rest[i] < 0.05:
                del rest[i]
    dets, got = mmcv.ops.soft_nms(
        boxes.to(device), scores.to(device), 0.3, sigma=0.5, min_score=0.05, method=method, offset=offset
    )
    assert got.tolist() == places
    torch.testing.assert_close(dets.cpu(), torch.tensor(rows, **DOUBLE))


def test_soft_nms_among_equals_keeps_the_order_of_mmcv() -> None:
    # Box 1 is dropped, so that the last box takes its place in front of box 2.
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], **DOUBLE)
    _, places = mmcv.ops.soft_nms(boxes, torch.tensor([0.9, 0.5, 0.5, 0.5], **DOUBLE), 0.3, min_score=0.1)
    assert places.tolist() == [0, 3, 2]


def _pixel(image: Tensor, y: int, x: int) -> Tensor:
    inside = 0 <= y < image.shape[1] and 0 <= x < image.shape[2]
    return image[:, y, x] if inside else torch.zeros_like(image[:, 0, 0])


def _bilinear(image: Tensor, y: float, x: float) -> Tensor:
    """Value of (C, H, W) at a point; the image is zero outside."""
    top, left = math.floor(y), math.floor(x)
    total = torch.zeros_like(image[:, 0, 0])
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        total = total + (1 - abs(y - i)) * (1 - abs(x - j)) * _pixel(image, i, j)
    return total


def _region_value(image: Tensor, y: float, x: float) -> Tensor:
    """As `_bilinear`, but the border's values go on for one pixel."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros_like(image[:, 0, 0])
    return _bilinear(image, min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1))


def _literal_roi_align(
    images: Tensor, rois: Tensor, size: tuple[int, int], scale: float, samples: int, aligned: bool
) -> Tensor:
    out = torch.zeros(len(rois), images.shape[1], *size, **DOUBLE)
    for k, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        rows = samples or math.ceil(height / size[0])
        columns = samples or math.ceil(width / size[1])
        for i, j in itertools.product(range(size[0]), range(size[1])):
            for a, b in itertools.product(range(rows), range(columns)):
                y = y1 + height / size[0] * (i + (a + 0.5) / rows)
                x = x1 + width / size[1] * (j + (b + 0.5) / columns)
                out[k, :, i, j] += _region_value(images[int(image)], y, x) / (rows * columns)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("samples", "aligned"), [(2, True), (0, True), (0, False)])
def test_roi_align(samples: int, aligned: bool, device: str) -> None:
    images = torch.randn(2, 3, 7, 9, **DOUBLE)
    rois = torch.tensor([[0, 1, 2, 12, 9], [1, -6, -3, 30, 18], [1, 4.3, 5.1, 4.5, 5.2]], **DOUBLE)
    want = _literal_roi_align(images, rois, (2, 3), 0.5, samples, aligned)
    images, rois = images.to(device).requires_grad_(), rois.to(device)
    got = mmcv.ops.roi_align(images, rois, (2, 3), 0.5, samples, "avg", aligned)
    torch.testing.assert_close(got.cpu(), want)
    assert gradcheck(
        lambda x: mmcv.ops.roi_align(x, rois, (2, 3), 0.5, samples, "avg", aligned),
        images,
        fast_mode=True,
        nondet_tol=1e-9,
    )
    assert mmcv.ops.roi_align(images, rois[:0], (2, 3)).shape == (0, 3, 2, 3)


def test_roi_align_in_half_precision_is_computed_in_float32() -> None:
    images, rois = torch.randn(1, 4, 8, 8), torch.tensor([[0, 0.7, 1.3, 6.2, 5.9]])
    narrow = images.bfloat16().requires_grad_()
    got = mmcv.ops.roi_align(narrow, rois, 3)
    want = mmcv.ops.roi_align(narrow.detach().float(), rois, 3)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())
    got.sum().backward()
    assert narrow.grad.dtype == torch.bfloat16


def test_roi_align_has_no_maximum() -> None:
    with pytest.raises(NotImplementedError, match="pool_mode='avg' only"):
        mmcv.ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2, 1.0, 2, "max")


@pytest.mark.parametrize("device", DEVICES)
def test_roi_pool(device: str) -> None:
    images = torch.randn(2, 3, 8, 8, **DOUBLE)
    rois = torch.tensor([[1, 0, 2, 5, 5], [0, 2, 0, 7, 7]], **DOUBLE)
    want = torch.zeros(2, 3, 2, 2, **DOUBLE)
    for k, (image, x1, y1, x2, y2) in enumerate(rois.long().tolist()):
        h, w = (y2 - y1 + 1) // 2, (x2 - x1 + 1) // 2
        for i, j in itertools.product(range(2), range(2)):
            block = images[image][:, y1 + i * h : y1 + (i + 1) * h, x1 + j * w : x1 + (j + 1) * w]
            want[k, :, i, j] = block.amax((1, 2))
    images, rois = images.to(device).requires_grad_(), rois.to(device)
    torch.testing.assert_close(mmcv.ops.roi_pool(images, rois, 2).cpu(), want)
    assert gradcheck(lambda x: mmcv.ops.roi_pool(x, rois, 2), images, fast_mode=True, nondet_tol=1e-9)


def _literal_deform_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: Pair, pad: Pair, dilation: Pair, groups: int
) -> Tensor:
    """`offset` (B, G, kh, kw, 2, h, w), `mask` (B, G, kh, kw, h, w)."""
    batch, deform_groups, kh, kw, _, height, width = offset.shape
    out = torch.zeros(batch, len(weight), height, width, **DOUBLE)
    per_group, per_deform = x.shape[1] // groups, x.shape[1] // deform_groups
    for b, g, i, j, r, s in itertools.product(*map(range, (batch, deform_groups, height, width, kh, kw))):
        y = i * stride[0] - pad[0] + r * dilation[0] + offset[b, g, r, s, 0, i, j].item()
        z = j * stride[1] - pad[1] + s * dilation[1] + offset[b, g, r, s, 1, i, j].item()
        values = _bilinear(x[b], y, z) * mask[b, g, r, s, i, j]
        for c in range(g * per_deform, (g + 1) * per_deform):
            for o in range(len(weight)):
                if o * groups // len(weight) == c // per_group:
                    out[b, o, i, j] += weight[o, c % per_group, r, s] * values[c]
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    ("stride", "pad", "dilation", "groups", "deform_groups"),
    [((1, 1), (1, 1), (1, 1), 1, 1), ((1, 2), (2, 0), (2, 1), 2, 1), ((2, 1), (0, 3), (1, 2), 1, 2)],
)
def test_deform_conv(
    stride: Pair, pad: Pair, dilation: Pair, groups: int, deform_groups: int, modulated: bool, device: str
) -> None:
    x, weight = torch.randn(2, 4, 5, 6, **DOUBLE), torch.randn(4, 4 // groups, 3, 2, **DOUBLE)
    sizes = zip((5, 6), (3, 2), stride, pad, dilation, strict=True)
    height, width = ((n + 2 * p - d * (kernel - 1) - 1) // s + 1 for n, kernel, s, p, d in sizes)
    offset = 1.5 * torch.randn(2, deform_groups, 3, 2, 2, height, width, **DOUBLE)
    mask = torch.rand(2, deform_groups, 3, 2, height, width, **DOUBLE)
    bias = torch.randn(4, **DOUBLE)
    geometry = (stride, pad, dilation, groups, deform_groups)
    want = _literal_deform_conv(x, offset, mask if modulated else torch.ones_like(mask), weight, *geometry[:4])
    offset, mask = offset.reshape(2, -1, height, width), mask.reshape(2, -1, height, width)
    if modulated:
        function, inputs = mmcv.ops.modulated_deform_conv2d, (x, offset, mask, weight, bias)
        want = want + bias[:, None, None]
    else:
        function, inputs = mmcv.ops.deform_conv2d, (x, offset, weight)
    inputs = tuple(t.to(device).requires_grad_() for t in inputs)
    torch.testing.assert_close(function(*inputs, *geometry).cpu(), want)
    assert gradcheck(lambda *tensors: function(*tensors, *geometry), inputs, fast_mode=True, nondet_tol=1e-9)


def test_modulated_deform_conv_without_bias() -> None:
    x, weight = torch.randn(1, 2, 4, 4, **DOUBLE), torch.randn(3, 2, 3, 3, **DOUBLE)
    inputs = (x, torch.randn(1, 18, 4, 4, **DOUBLE), torch.rand(1, 9, 4, 4, **DOUBLE), weight)
    for tensor in inputs:
        tensor.requires_grad_()
    assert gradcheck(lambda *t: mmcv.ops.modulated_deform_conv2d(*t, None, 1, 1), inputs, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted: bool, device: str) -> None:
    logits = 3 * torch.randn(5, 4, **DOUBLE)
    target = torch.tensor([0, 4, 2, 1, 3])  # 4 is background
    weight = torch.rand(4, **DOUBLE) if weighted else None
    want = torch.zeros(5, 4, **DOUBLE)
    for n, c in itertools.product(range(5), range(4)):
        p = 1 / (1 + math.exp(-logits[n, c].item()))
        hit = target[n] == c
        loss = -0.3 * (1 - p) ** 1.5 * math.log(p) if hit else -0.7 * p**1.5 * math.log(1 - p)
        want[n, c] = loss * (weight[target[n]] if weighted and target[n] < 4 else 1.0)
    logits, target = logits.to(device).requires_grad_(), target.to(device)
    weight = weight.to(device) if weighted else None
    got = mmcv.ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, weight, "none")
    torch.testing.assert_close(got.cpu(), want)
    # mmcv multiplies by the incoming gradient, so a sum and a mean see the operator's whole derivative.
    for reduction in ("sum", "mean"):
        assert gradcheck(lambda x: mmcv.ops.sigmoid_focal_loss(x, target, 1.5, 0.3, weight, reduction), logits)  # noqa: B023


def test_focal_loss_of_certain_logits_is_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 200 + 0.25 * 200)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.75, -0.25]]))


@pytest.mark.parametrize("device", DEVICES)
def test_multi_scale_deformable_attention(device: str) -> None:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    shapes, heads, dim, queries, points = [(3, 4), (2, 5)], 2, 3, 4, 2
    value = torch.randn(2, sum(h * w for h, w in shapes), heads, dim, **DOUBLE)
    where = 1.4 * torch.rand(2, queries, heads, len(shapes), points, 2, **DOUBLE) - 0.2
    weights = torch.rand(2, queries, heads, len(shapes), points, **DOUBLE)
    want = torch.zeros(2, queries, heads, dim, **DOUBLE)
    for b, q, m, level, p in itertools.product(range(2), range(queries), range(heads), range(2), range(points)):
        h, w = shapes[level]
        start = sum(height * width for height, width in shapes[:level])
        level_map = value[b, start : start + h * w, m].T.reshape(dim, h, w)
        x, y = where[b, q, m, level, p].tolist()
        want[b, q, m] += weights[b, q, m, level, p] * _bilinear(level_map, y * h - 0.5, x * w - 0.5)
    starts = torch.tensor([0, 12], device=device)
    inputs = [t.to(device).requires_grad_() for t in (value, where, weights)]

    def attend(value: Tensor, where: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.tensor(shapes, device=device)
        return MultiScaleDeformableAttnFunction.apply(value, sizes, starts, where, weights, 64)

    torch.testing.assert_close(attend(*inputs).cpu(), want.flatten(2))
    assert gradcheck(attend, inputs, fast_mode=True, nondet_tol=1e-9)


def test_other_operators_raise_when_they_are_called() -> None:
    with pytest.raises(NotImplementedError, match=r"'carafe_forward' needs mmcv's compiled operators"):
        mmcv.ops.carafe(torch.zeros(1, 4, 2, 2), torch.zeros(1, 9, 4, 4), 3, 1, 2)
    assert not hasattr(sys.modules["mmcv._ext"], "__wrapped__")


def test_a_compiled_extension_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
            return (
                importlib.machinery.ModuleSpec(fullname, None, origin="compiled") if fullname == "mmcv._ext" else None
            )

    monkeypatch.delitem(sys.modules, "mmcv._ext")
    assert isinstance(importlib.util.find_spec("mmcv._ext").loader, StandInFinder)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, StandInFinder)])
    assert importlib.util.find_spec("mmcv._ext") is None
    sys.meta_path.append(Compiled())
    install_operators()
    install_operators()
    assert sum(isinstance(finder, StandInFinder) for finder in sys.meta_path) == 1
    assert importlib.util.find_spec("mmcv._ext").origin == "compiled"


def test_every_operator_is_one_that_mmcv_asks_for() -> None:
    from pathlib import Path

    text = "".join(path.read_text() for path in Path(mmcv.ops.__file__).parent.glob("*.py"))
    assert all(f"'{name}'" in text for name in _operators.OPERATORS)
