"""Sparse convolution against PyTorch's dense one, its tables against loops, operators and kernels against it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from _seeds import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.sparse_conv import (
    NeighbourTable,
    depthwise_sparse_conv,
    find_runs,
    mixed_depthwise_conv,
    point_keys,
    site_coords,
    site_keys,
    sites,
    sparse_conv,
    strided_sites,
    strided_table,
    submanifold_table,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Triple = tuple[int, int, int]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
grids = st.tuples(st.integers(3, 6), st.integers(3, 7), st.integers(3, 8))
kernels = st.sampled_from([(3, 3, 3), (1, 1, 5), (1, 7, 1), (1, 1, 1), (5, 1, 3)])
strided = st.sampled_from(
    [
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
        ((2, 2, 2), (2, 2, 2), (0, 0, 0)),
        ((1, 2, 3), (1, 3, 2), (0, 1, 0)),
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ]
)


def draw_keys(shape: Triple, share: float, batch: int = 2) -> Tensor:
    """Sites of a random part of all sites, sorted."""
    return (torch.rand(batch, *shape) < share).flatten().nonzero().flatten()


def dense(features: Tensor, keys: Tensor, shape: Triple, batch: int = 2) -> Tensor:
    """(N, C) -> (B, C, D, H, W)."""
    rows = features.new_zeros(batch * shape[0] * shape[1] * shape[2], features.shape[1])
    return rows.index_copy(0, keys, features).view(batch, *shape, -1).permute(0, 4, 1, 2, 3)


def rows_of(x: Tensor, keys: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (N, C)."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 3)[keys]


def assert_equal_with_gradients(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(want)
    ours = torch.autograd.grad(got, leaves, grad, materialize_grads=True, allow_unused=True)
    theirs = torch.autograd.grad(want, leaves, grad, materialize_grads=True, allow_unused=True, retain_graph=True)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@settings(max_examples=30)
@given(shape=grids, kernel=kernels, share=st.sampled_from([0.0, 0.02, 0.2, 1.0]))
def test_submanifold_is_the_dense_convolution_at_occupied_sites(shape: Triple, kernel: Triple, share: float) -> None:
    keys = draw_keys(shape, share)
    table = submanifold_table(keys, shape, kernel)
    x = torch.randn(len(keys), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, *kernel, 3, dtype=torch.float64, requires_grad=True)
    padding = tuple(k // 2 for k in kernel)
    want = rows_of(F.conv3d(dense(x, keys, shape), weight.permute(0, 4, 1, 2, 3), padding=padding), keys)
    assert_equal_with_gradients(sparse_conv(x, weight, table), want, [x, weight])
    assert_equal_with_gradients(torch.ops.vitrail.sparse_conv(x, weight.flatten(1, 3), *table), want, [x, weight])
    filters = torch.randn(*kernel, 3, dtype=torch.float64, requires_grad=True)
    per_channel = filters.permute(3, 0, 1, 2)[:, None]
    want = rows_of(F.conv3d(dense(x, keys, shape), per_channel, padding=padding, groups=3), keys)
    assert_equal_with_gradients(depthwise_sparse_conv(x, filters, table), want, [x, filters])
    by_op = torch.ops.vitrail.depthwise_sparse_conv(x, filters.flatten(0, 2), *table)
    assert_equal_with_gradients(by_op, want, [x, filters])


@settings(max_examples=15)
@given(shape=grids, share=st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_mixed_is_three_convolutions_side_by_side(shape: Triple, share: float) -> None:
    keys = draw_keys(shape, share)
    sizes = ((3, 3, 3), (1, 1, 5), (1, 7, 1))
    tables = [submanifold_table(keys, shape, size) for size in sizes]
    x = torch.randn(len(keys), 12, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(*size, 3, dtype=torch.float64, requires_grad=True) for size in sizes]
    a, b, c, rest = x.chunk(4, 1)
    gathered = [depthwise_sparse_conv(*part) for part in zip((a, b, c), weights, tables, strict=True)]
    want = x + torch.cat((*gathered, rest), 1)
    assert_equal_with_gradients(mixed_depthwise_conv(x, weights, tables), want, [x, *weights])
    flat = [w.flatten(0, 2) for w in weights]
    by_op = torch.ops.vitrail.mixed_depthwise_conv(x, *flat, *itertools.chain(*tables))
    assert_equal_with_gradients(by_op, want, [x, *weights])


@settings(max_examples=30)
@given(shape=grids, how=strided, share=st.sampled_from([0.0, 0.02, 0.2, 1.0]))
def test_strided_is_the_dense_convolution_wherever_it_sees_a_voxel(
    shape: Triple, how: tuple[Triple, Triple, Triple], share: float
) -> None:
    kernel, stride, padding = how
    keys = draw_keys(shape, share)
    out_keys, out_shape = strided_sites(keys, shape, kernel, stride, padding)
    table = strided_table(keys, shape, out_keys, out_shape, kernel, stride, padding)
    occupied = dense(torch.ones(len(keys), 1), keys, shape)
    seen = F.conv3d(occupied, torch.ones(1, 1, *kernel), stride=stride, padding=padding)
    assert out_shape == tuple(seen.shape[2:])
    assert torch.equal(out_keys, (seen > 0.5).flatten().nonzero().flatten())
    x = torch.randn(len(keys), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, *kernel, 3, dtype=torch.float64, requires_grad=True)
    full = F.conv3d(dense(x, keys, shape), weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)
    want = rows_of(full, out_keys)
    assert_equal_with_gradients(sparse_conv(x, weight, table), want, [x, weight])
    assert_equal_with_gradients(torch.ops.vitrail.sparse_conv(x, weight.flatten(1, 3), *table), want, [x, weight])


def test_tables_are_what_loops_find() -> None:
    shape, kernel = (3, 4, 5), (3, 1, 3)
    keys = draw_keys(shape, 0.4)
    sites = {tuple(site): row for row, site in enumerate(site_coords(keys, shape).tolist())}
    table = submanifold_table(keys, shape, kernel)
    for tap, (dz, dy, dx) in enumerate(itertools.product((-1, 0, 1), (0,), (-1, 0, 1))):
        for (b, z, y, x), row in sites.items():
            assert table.forward[tap, row] == sites.get((b, z + dz, y + dy, x + dx), -1)
            assert table.backward[tap, row] == sites.get((b, z - dz, y - dy, x - dx), -1)


def test_keys_and_coordinates_are_inverse_and_sorted_alike() -> None:
    shape = (3, 4, 5)
    coords = torch.cartesian_prod(*map(torch.arange, (2, *shape)))
    keys = site_keys(coords.int(), shape)
    assert torch.equal(keys, torch.arange(len(coords)))
    assert torch.equal(site_coords(keys, shape), coords)


def test_runs_leave_out_what_is_negative() -> None:
    runs = find_runs(torch.tensor([-1, -1, 0, 3, 3, 3, 9]))
    assert runs.keys.tolist() == [0, 3, 9]
    assert runs.first.tolist() == [2, 3, 6]
    assert runs.run.tolist() == [0, 1, 1, 1, 2]
    for nothing in (torch.tensor([-1, -1]), torch.empty(0, dtype=torch.long)):
        assert all(len(part) == 0 for part in find_runs(nothing))


def test_large_grids_do_not_overflow() -> None:
    shape = (40, 30_000, 30_000)
    coords = torch.tensor([[0, 1, 2, 3], [9, 39, 29_999, 29_998], [9, 39, 29_999, 29_999]])
    keys = site_keys(coords, shape)
    assert keys[-1] > 2**32
    table = submanifold_table(keys, shape, (1, 1, 3))
    assert table.forward.tolist() == [[-1, -1, 1], [0, 1, 2], [-1, 2, -1]]


def test_gradients_are_the_derivatives() -> None:
    keys = draw_keys((3, 3, 3), 0.3, 1)
    table = submanifold_table(keys, (3, 3, 3), (3, 3, 3))
    x = torch.randn(len(keys), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 27, 2, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(27, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.ops.vitrail.sparse_conv(x, w, *table), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: torch.ops.vitrail.depthwise_sparse_conv(x, w, *table), (x, filters))


def test_registration() -> None:
    shape, how = (3, 4, 4), ((3, 3, 3), (2, 2, 2), (1, 1, 1))
    keys = draw_keys(shape, 0.3)
    out_keys, out_shape = strided_sites(keys, shape, *how)
    table = strided_table(keys, shape, out_keys, out_shape, *how)
    x = torch.randn(len(keys), 3, requires_grad=True)
    weight, filters = (torch.randn(s, requires_grad=True) for s in ((2, 27, 3), (27, 3)))
    torch.library.opcheck(torch.ops.vitrail.sparse_conv, (x, weight, *table))
    torch.library.opcheck(torch.ops.vitrail.depthwise_sparse_conv, (x, filters, *table))
    table = submanifold_table(keys, shape, (1, 1, 3))
    x, filters = torch.randn(len(keys), 8, requires_grad=True), [torch.randn(3, 2, requires_grad=True)] * 3
    torch.library.opcheck(torch.ops.vitrail.mixed_depthwise_conv, (x, *filters, *table, *table, *table))


def test_autocast_rounds_the_inputs_and_nothing_else() -> None:
    keys = draw_keys((4, 4, 4), 0.5)
    table = submanifold_table(keys, (4, 4, 4), (3, 3, 3))
    x, weight = torch.randn(len(keys), 8), torch.randn(4, 27, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_conv(x, weight, table)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sparse_conv(x.bfloat16(), weight.bfloat16(), table))
    wide = sparse_conv(x.bfloat16().double(), weight.bfloat16().double(), table)
    torch.testing.assert_close(out.double(), wide, rtol=2**-8, atol=1e-5)


def test_flops_of_the_operator_are_those_of_the_reference() -> None:
    shape, how = (4, 5, 6), ((3, 3, 3), (2, 2, 2), (1, 1, 1))
    keys = draw_keys(shape, 0.3)
    out_keys, out_shape = strided_sites(keys, shape, *how)
    table = strided_table(keys, shape, out_keys, out_shape, *how)
    x, weight = torch.randn(len(keys), 3, requires_grad=True), torch.randn(2, 27, 3, requires_grad=True)
    n_in, n_out, per_row = len(keys), len(out_keys), 2 * 2 * 27 * 3
    for function in (sparse_conv, lambda x, w, table: torch.ops.vitrail.sparse_conv(x, w, *table)):
        with FlopCounterMode(display=False) as counter:
            out = function(x, weight, table)
        assert counter.get_total_flops() == n_out * per_row
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == (n_out + n_in) * per_row


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["full", "depthwise", "mixed"])
@pytest.mark.parametrize("seed", seeds(5))
def test_fused_is_as_exact_as_eager(seed: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vitrail.kernels.sparse_conv.triton")
    monkeypatch.setattr(triton, "_ROWS", 16)  # several tiles and parts
    monkeypatch.setattr(triton, "_ROWS_OF_A_PART", 32)
    monkeypatch.setattr(triton, "_MOST_PARTS", 3)
    draw = random.Random(seed)
    shape = (draw.randint(3, 5), draw.randint(3, 6), draw.randint(3, 6))
    keys = draw_keys(shape, draw.choice([0.05, 0.3, 0.6])).to(DEVICE)
    how = ((3, 3, 3), (2, 2, 2), (1, 1, 1))
    out_keys, out_shape = strided_sites(keys, shape, *how)
    tables = [submanifold_table(keys, shape, (1, 3, 3)), strided_table(keys, shape, out_keys, out_shape, *how)]
    table = draw.choice(tables)
    if kind == "mixed":
        tables = [submanifold_table(keys, shape, size) for size in ((3, 3, 3), (1, 1, 5), (1, 3, 1))]
    taps, dim, out_dim = len(table.forward), draw.choice([4, 16, 40]), draw.choice([5, 32])
    shapes = {
        "full": [(out_dim, taps, dim)],
        "depthwise": [(taps, dim)],
        "mixed": [(len(each.forward), dim // 4) for each in tables],
    }
    # A part of wider rows.
    x = torch.randn(len(keys), dim + 4, device=DEVICE).to(dtype)[:, 2:-2]
    weights = [torch.randn(size, device=DEVICE).to(dtype) for size in shapes[kind]]
    n_outputs = len(keys) if kind == "mixed" else table.forward.shape[1]
    grad = torch.randn(n_outputs, out_dim if kind == "full" else dim, device=DEVICE).to(dtype)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, *weights)]
        if kind == "mixed":
            out = mixed_depthwise_conv(leaves[0], leaves[1:], tables, backend=backend)
        else:
            out = (depthwise_sparse_conv if kind == "depthwise" else sparse_conv)(*leaves, table, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    for exact, ours, theirs in zip(run(torch.float64, "eager"), run(dtype, "triton"), run(dtype, "eager"), strict=True):
        scale = exact.norm() + 1e-12
        bound = 2 * (theirs.double() - exact).norm() / scale + torch.finfo(dtype).eps
        assert ours.isfinite().all()
        assert (ours.double() - exact).norm() / scale <= bound


@needs_triton
@pytest.mark.parametrize("n", [0, 1])
def test_fused_takes_no_voxel_and_one(n: int) -> None:
    pytest.importorskip("vitrail.kernels.sparse_conv.triton")
    keys = torch.arange(n, device=DEVICE)
    table = submanifold_table(keys, (3, 3, 3), (3, 3, 3))
    x = torch.randn(n, 16, device=DEVICE, requires_grad=True)
    for function, shape in ((sparse_conv, (8, 27, 16)), (depthwise_sparse_conv, (27, 16))):
        weight = torch.randn(shape, device=DEVICE, requires_grad=True)
        results = []
        for backend in ("triton", "eager"):
            out = function(x, weight, table, backend=backend)
            results.append([out, *torch.autograd.grad(out.sum(), (x, weight))])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@needs_triton
@settings(max_examples=12)
@given(shape=grids, how=strided, kernel=kernels, share=st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_fused_sites_and_tables_are_those_of_the_definition(
    shape: Triple, how: tuple[Triple, Triple, Triple], kernel: Triple, share: float
) -> None:
    pytest.importorskip("vitrail.kernels.sparse_conv.triton_sites")
    keys = draw_keys(shape, share).to(DEVICE)
    results = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sites, "runs_kernels", lambda _, fused=fused: fused)
            out_keys, out_shape = strided_sites(keys, shape, *how)
            tables = (
                *submanifold_table(keys, shape, kernel),
                *strided_table(keys, shape, out_keys, out_shape, *how),
            )
            results.append((out_keys, site_coords(keys, shape), *tables))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@needs_triton
def test_fused_keys_of_points_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vitrail.kernels.sparse_conv.triton_sites")
    points = torch.rand(500, 5, device=DEVICE) * 6 - 1.5
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e30)):
        points[row, row] = value
        points[row + 10, 3] = value
    points[20, :3] = torch.tensor([-1.0, 0.0, 0.5])  # the lower corner belongs to the grid
    points[21, 1] = 3.0  # the upper one does not
    batch = torch.arange(500, device=DEVICE) % 3
    results = []
    for fused in (True, False):
        monkeypatch.setattr(sites, "runs_kernels", lambda _, fused=fused: fused)
        results.append(point_keys(points, batch, (-1.0, 0.0, 0.5), (0.5, 0.25, 0.3), (7, 12, 8)))
    assert torch.equal(*results)
    assert results[0][20] == 2 * 7 * 12 * 8
    assert (results[0][[0, 1, 2, 10, 11, 12, 21]] == -1).all()
    assert results[0][13] >= 0  # large, but finite and no coordinate
    assert (results[0] >= 0).sum() > 50


def test_choice_is_recorded() -> None:
    keys = draw_keys((3, 3, 3), 0.5)
    table = submanifold_table(keys, (3, 3, 3), (1, 1, 1))
    with record_choices() as choices:
        sparse_conv(torch.randn(len(keys), 4).double(), torch.randn(4, 1, 4).double(), table)
        depthwise_sparse_conv(torch.randn(len(keys), 4).double(), torch.randn(1, 4).double(), table)
    assert [(c.op, c.backend) for c in choices] == [("sparse_conv", "eager"), ("depthwise_sparse_conv", "eager")]


def test_bad_arguments_are_named() -> None:
    keys = draw_keys((3, 3, 3), 0.5)
    table = submanifold_table(keys, (3, 3, 3), (3, 1, 1))
    x, weight = torch.randn(len(keys), 4), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="kernel_size is"):
        submanifold_table(keys, (3, 3, 3), (2, 3, 3))
    with pytest.raises(ValueError, match="it must fit into the grid"):
        strided_sites(keys, (3, 3, 3), (5, 1, 1), (1, 1, 1), (0, 0, 0))
    with pytest.raises(ValueError, match="features has shape"):
        sparse_conv(x[:, :3], weight, table)
    with pytest.raises(ValueError, match=r"table\.backward has shape"):
        sparse_conv(x[1:], weight, table)
    with pytest.raises(ValueError, match=r"table\.forward has shape"):
        sparse_conv(x, weight[:, :2], table)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float64"):
        sparse_conv(x, weight.double(), table)
    with pytest.raises(TypeError, match=r"features is torch\.int64"):
        depthwise_sparse_conv(x.long(), weight[0], table)
    with pytest.raises(TypeError, match=r"table\.forward is torch\.int64"):
        depthwise_sparse_conv(x, weight[0], NeighbourTable(table.forward.long(), table.backward))
    three = [x.new_zeros(3, 1)] * 3
    with pytest.raises(ValueError, match="2 weights and 3 tables"):
        mixed_depthwise_conv(x, three[:2], [table] * 3)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\); expected \(3, 1\)"):
        mixed_depthwise_conv(x, [*three[:2], x.new_zeros(3, 2)], [table] * 3)
    with pytest.raises(ValueError, match="3 channels; allowed: a multiple of 4"):
        mixed_depthwise_conv(x[:, :3], three, [table] * 3)
    with pytest.raises(NotImplementedError, match=r"sparse_conv.*float64"):
        sparse_conv(x.double(), weight.double(), table, backend="triton")
