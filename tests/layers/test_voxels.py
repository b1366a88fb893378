"""Voxels: which points make them, what a sparse tensor keeps, and the features of a voxel's points."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.layers.voxels import SparseTensor, VoxelEncoder, VoxelGrid, VoxelNorm, reduce_points, voxelize

GRID = VoxelGrid((-2.0, 0.0, 1.0), (2.0, 3.0, 2.0), (0.5, 0.25, 0.5))


def literal_voxels(scans: list[Tensor], grid: VoxelGrid) -> dict[tuple[int, ...], list[list[float]]]:
    """(batch, z, y, x) -> points, one point at a time."""
    found: dict[tuple[int, ...], list[list[float]]] = {}
    for batch, scan in enumerate(scans):
        for point in scan.tolist():
            if all(low <= value < high for value, low, high in zip(point, grid.low, grid.high, strict=False)):
                place = [int((v - low) // s) for v, low, s in zip(point, grid.low, grid.voxel_size, strict=False)]
                found.setdefault((batch, *place[::-1]), []).append(point)
    return found


def draw_scans(counts: list[int], width: int = 4) -> list[Tensor]:
    return [torch.rand(n, width, dtype=torch.float64) * 5 - 2.5 for n in counts]


@settings(max_examples=40)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_voxels_hold_the_points_that_a_loop_puts_there(counts: list[int]) -> None:
    scans = draw_scans(counts)
    points, voxel, counted, sites = voxelize(scans, GRID)
    assert counted.tolist() == [len(p) for _, p in sorted(literal_voxels(scans, GRID).items())]
    want = literal_voxels(scans, GRID)
    assert [tuple(site) for site in sites.coords.tolist()] == sorted(want)
    assert sites.batch_size == len(counts)
    assert sites.shape == (2, 12, 8)
    for row, site in enumerate(sorted(want)):
        assert points[voxel == row].tolist() == want[site]


def test_points_that_cannot_be_used_are_left_out() -> None:
    inside = [0.1, 0.1, 1.1, 7.0]
    nan, inf = float("nan"), float("inf")
    broken = [[nan, 0.1, 1.1, 7.0], [0.1, inf, 1.1, 7.0], [0.1, 0.1, -inf, 7.0], [0.1, 0.1, 1.1, nan]]
    outside = [[2.0, 0.1, 1.1, 7.0], [-2.01, 0.1, 1.1, 7.0], [0.1, 3.0, 1.1, 7.0], [0.1, 0.1, 1e30, 7.0]]
    edge = [-2.0, 0.0, 1.0, 7.0]
    points, _, _, sites = voxelize([torch.tensor([*broken, inside, *outside, edge])], GRID)
    assert sorted(points.tolist()) == [pytest.approx(edge), pytest.approx(inside)]
    assert len(sites) == 2


def test_points_given_twice_count_twice() -> None:
    twice = torch.tensor([[0.1, 0.1, 1.1, 0.0], [0.1, 0.1, 1.1, 0.0], [0.4, 0.2, 1.4, 3.0]])
    points, _, counts, sites = voxelize([twice], GRID)
    assert (len(points), len(sites)) == (3, 1)
    assert reduce_points(points, counts, "mean")[0, 3] == 1.0


@settings(max_examples=20)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_reductions_are_those_of_every_voxel(counts: list[int]) -> None:
    voxel = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = torch.randn(len(voxel), 3, dtype=torch.float64, requires_grad=True)
    for how in ("mean", "max"):
        groups = [getattr(x[voxel == i], "amax" if how == "max" else how)(0) for i in range(len(counts))]
        got, want = reduce_points(x, torch.tensor(counts), how), torch.stack(groups)
        torch.testing.assert_close(got, want)
        grad = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(want, x, grad)[0], rtol=1e-12, atol=1e-12
        )


def test_sparse_tensors_sort_what_they_are_given() -> None:
    coords = torch.tensor([[1, 0, 2, 1], [0, 1, 0, 3], [0, 0, 2, 2], [0, 0, 2, 1]], dtype=torch.int32)
    features = torch.arange(8.0).view(4, 2)
    x = SparseTensor.from_coords(features, coords, (2, 3, 4), 3)
    assert torch.equal(x.sites.coords, coords[[3, 2, 1, 0]].long())
    assert torch.equal(x.features, features[[3, 2, 1, 0]])
    dense = x.dense()
    assert dense.shape == (3, 2, 2, 3, 4)
    for site, row in zip(coords.tolist(), features, strict=True):
        assert torch.equal(dense[site[0], :, site[1], site[2], site[3]], row)
    assert dense.count_nonzero() == features.count_nonzero()


def test_tables_and_windows_are_made_once() -> None:
    sites = voxelize(draw_scans([50]), GRID).sites
    assert sites.neighbours((3, 3, 3)) is sites.neighbours((3, 3, 3))
    assert sites.neighbours((1, 1, 3)) is not sites.neighbours((3, 3, 3))
    assert sites.windows(4) is sites.windows(4)


def test_windows_are_columns_of_full_height() -> None:
    sites = voxelize(draw_scans([300, 0, 300]), GRID).sites
    windows = sites.windows(5)
    want: dict[tuple[int, int, int], list[int]] = {}
    for row, (b, _, y, x) in enumerate(sites.coords.tolist()):
        want.setdefault((b, y // 5, x // 5), []).append(row)
    assert windows.order.tolist() == [row for window in sorted(want) for row in want[window]]
    sizes = [len(want[window]) for window in sorted(want) for _ in want[window]]
    assert (windows.ends - windows.starts).tolist() == sizes


def test_encoder_is_its_definition() -> None:
    scans = draw_scans([60, 0, 45])
    encoder = VoxelEncoder(4, 8, dtype=torch.float64).eval()
    for layer in encoder.layers:
        layer.norm.running_mean.normal_()
    x = encoder(scans, GRID)
    for row, (site, points) in enumerate(sorted(literal_voxels(scans, GRID).items())):
        p = torch.tensor(points, dtype=torch.float64)
        size, low = torch.tensor(GRID.voxel_size).double(), torch.tensor(GRID.low).double()
        centre = low + (torch.tensor(site[:0:-1]) + 0.5) * size
        h = torch.cat((p, p[:, :3] - p[:, :3].mean(0), p[:, :3] - centre), 1)
        first, second = encoder.layers
        h = first.norm(first.linear(h)).relu()
        h = torch.cat((h, h.amax(0).expand_as(h)), 1)
        torch.testing.assert_close(x.features[row], second.norm(second.linear(h)).relu().amax(0))


def test_encoder_keeps_centimetres_under_autocast() -> None:
    far = VoxelGrid((64.0, 64.0, 0.0), (66.0, 66.0, 2.0), (0.5, 0.5, 0.5))
    scan = torch.rand(200, 4) * 2 + torch.tensor([64.0, 64.0, 0.0, 0.0])
    encoder = VoxelEncoder(4, 8).eval()
    # Of all inputs the first layer takes x alone, less its far end.
    with torch.no_grad():
        encoder.layers[0].linear.weight.copy_(torch.eye(10)[0])
        encoder.layers[0].norm.running_mean += 64
    want = encoder([scan], far).features
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder([scan], far).features
    torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.03)


def test_encoder_takes_points_of_another_precision() -> None:
    (scan,) = draw_scans([80])
    encoder = VoxelEncoder(4, 8)
    assert encoder([scan], GRID).features.dtype == torch.float32
    assert encoder.bfloat16()([scan.float()], GRID).features.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_norm_takes_any_number_of_voxels(n: int, training: bool) -> None:
    norm = VoxelNorm(3).train(training)
    norm.running_mean += 1
    x = torch.randn(n, 3, requires_grad=True)
    out = norm(x)
    assert out.shape == (n, 3)
    assert out.isfinite().all()
    out.sum().backward()
    if n == 1:
        torch.testing.assert_close(out, (x - 1) / (1 + norm.eps) ** 0.5)
    assert norm.num_batches_tracked == (training and n > 1)


def test_spconv_tensors_are_taken_over_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    coords = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]], dtype=torch.int32)
    theirs = SimpleNamespace(features=torch.eye(2), indices=coords, spatial_shape=[2, 3, 4], batch_size=1)
    x = SparseTensor.from_spconv(theirs)
    assert torch.equal(x.features, torch.eye(2)[[1, 0]])
    package, module = ModuleType("spconv"), ModuleType("spconv.pytorch")
    module.SparseConvTensor = lambda *arguments: SimpleNamespace(arguments=arguments)
    monkeypatch.setitem(sys.modules, "spconv", package)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", module)
    features, indices, shape, batch_size = x.to_spconv().arguments
    assert torch.equal(features, x.features)
    assert torch.equal(indices, coords[[1, 0]])
    assert indices.dtype == torch.int32
    assert indices.is_contiguous()
    assert (shape, batch_size) == ([2, 3, 4], 1)


def test_bad_arguments_are_named() -> None:
    one = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="coords has shape"):
        SparseTensor.from_coords(one, torch.zeros(2, 4, dtype=torch.int64), (1, 1, 1), 1)
    with pytest.raises(ValueError, match="sites outside"):
        SparseTensor.from_coords(one, torch.tensor([[0, 0, 1, 0]]), (1, 1, 1), 1)
    with pytest.raises(ValueError, match="more than once"):
        SparseTensor.from_coords(one.expand(2, 2), torch.zeros(2, 4, dtype=torch.int64), (1, 1, 1), 1)
    with pytest.raises(ValueError, match="points has shapes"):
        voxelize([], GRID)
    with pytest.raises(ValueError, match="points has shapes"):
        voxelize([torch.zeros(3, 4), torch.zeros(3, 5)], GRID)
    with pytest.raises(ValueError, match="whole numbers"):
        VoxelGrid((0, 0, 0), (1, 1, 1), (0.3, 0.5, 0.5)).shape  # noqa: B018 -- the property raises
    with pytest.raises(ValueError, match="in_chans is 2"):
        VoxelEncoder(2)
    with pytest.raises(ValueError, match=r"points has shape \(3, 4\)"):
        VoxelEncoder(5)([torch.zeros(3, 4)], GRID)
