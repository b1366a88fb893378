"""Routing attention: its definition token by token, gradients, the registered operator, argument checks."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from _seeds import seeds
from torch import Tensor

from vitrail.kernels._common.dispatch import HAS_TRITON
from vitrail.kernels.routing_attention import region_routes, routing_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

_SHAPES = [  # batch, height, width, heads, D, n_regions, topk
    (2, 6, 9, 2, 4, (3, 3), 2),
    (1, 7, 5, 1, 8, (2, 4), 8),
    (3, 1, 1, 2, 3, (2, 2), 4),
    (1, 5, 11, 3, 2, (4, 4), 5),
    (2, 4, 4, 2, 4, (1, 1), 1),
]


def _inputs(batch: int, height: int, width: int, heads: int, dim: int) -> tuple[Tensor, ...]:
    """q, k, v as views of one projection, then what padded positions hold: pad_q, pad_k, pad_v."""
    qkv = torch.randn(batch, height, width, 3, heads, dim, dtype=torch.float64)
    return *qkv.unbind(3), *torch.randn(3, heads, dim, dtype=torch.float64).unbind(0)


def _cells(x: Tensor, pad: Tensor, n_regions: tuple[int, int]) -> list[Tensor]:
    """The tokens of every region of one padded map (H, W, heads, D), each (T, heads, D)."""
    height, width = x.shape[:2]
    rows, columns = -(-height // n_regions[0]), -(-width // n_regions[1])
    whole = pad.expand(rows * n_regions[0], columns * n_regions[1], *pad.shape).clone()
    whole[:height, :width] = x
    bands = whole.split(rows, dim=0)
    return [cell.flatten(0, 1) for band in bands for cell in band.split(columns, dim=1)]


def _check_routes(
    routes: Tensor, q: Tensor, k: Tensor, pad_q: Tensor, pad_k: Tensor, n_regions: tuple[int, int], topk: int
) -> None:
    """Routes lead to distinct regions, as similar as any; which ones is open, as regions of padding alone tie."""
    assert routes.shape == (len(q), math.prod(n_regions), topk)
    assert routes.dtype == torch.int64
    for image in range(len(q)):
        q_means, k_means = (
            torch.stack([cell.double().mean(0).flatten() for cell in _cells(x[image], pad, n_regions)])
            for x, pad in ((q, pad_q), (k, pad_k))
        )
        similarity = q_means @ k_means.T
        torch.testing.assert_close(
            similarity.gather(1, routes[image]), similarity.topk(topk).values, rtol=1e-5, atol=1e-5
        )
        assert all(len(set(row)) == topk for row in routes[image].tolist())


@pytest.mark.parametrize("shape", _SHAPES)
def test_routes_are_the_most_similar_regions(shape: tuple) -> None:
    *sizes, n_regions, topk = shape
    q, k, _, pad_q, pad_k, _ = _inputs(*sizes)
    routes = region_routes(q, k, n_regions=n_regions, topk=topk, pad_q=pad_q, pad_k=pad_k)
    _check_routes(routes, q, k, pad_q, pad_k, n_regions, topk)


@pytest.mark.parametrize("shape", _SHAPES)
def test_attention_is_softmax_over_the_routed_tokens(shape: tuple) -> None:
    *sizes, n_regions, topk = shape
    q, k, v, pad_q, pad_k, pad_v = _inputs(*sizes)
    routes = torch.rand(sizes[0], math.prod(n_regions), math.prod(n_regions)).topk(topk).indices
    got = routing_attention(q, k, v, routes, n_regions=n_regions, pad_k=pad_k, pad_v=pad_v, scale=0.3)
    assert got.is_contiguous()
    assert got.shape == q.shape
    for image in range(sizes[0]):
        got_cells = _cells(got[image], pad_q, n_regions)
        is_real = _cells(torch.ones_like(q[image]), torch.zeros_like(pad_q), n_regions)
        keys, values = _cells(k[image], pad_k, n_regions), _cells(v[image], pad_v, n_regions)
        for region, queries in enumerate(_cells(q[image], pad_q, n_regions)):
            routed = routes[image, region].tolist()
            logits = 0.3 * torch.einsum("thd,shd->hts", queries, torch.cat([keys[r] for r in routed]))
            want = torch.einsum("hts,shd->thd", logits.softmax(-1), torch.cat([values[r] for r in routed]))
            real = is_real[region].bool()
            torch.testing.assert_close(got_cells[region][real], want[real], rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    q, k, v, _, pad_k, pad_v = (t.clone().requires_grad_() for t in _inputs(1, 3, 5, 2, 2))
    routes = torch.tensor([[[0, 1], [1, 2], [3, 0], [1, 3]]])

    def operator(q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor, pad_v: Tensor) -> Tensor:
        return torch.ops.vitrail.routing_attention(q, k, v, pad_k, pad_v, routes, [2, 2], 0.7)

    def api(q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor, pad_v: Tensor) -> Tensor:
        return routing_attention(q, k, v, routes, n_regions=2, pad_k=pad_k, pad_v=pad_v, scale=0.7)

    assert torch.autograd.gradcheck(operator, (q, k, v, pad_k, pad_v))
    assert torch.autograd.gradcheck(api, (q, k, v, pad_k, pad_v))


@pytest.mark.parametrize("padded", [True, False])
def test_registration(padded: bool) -> None:
    q, k, v, _, pad_k, pad_v = (t.float().requires_grad_() for t in _inputs(2, 5, 4, 2, 4))
    routes = torch.randint(0, 4, (2, 4, 3))
    pads = (pad_k, pad_v) if padded else (None, None)
    torch.library.opcheck(torch.ops.vitrail.routing_attention.default, (q, k, v, *pads, routes, [2, 2], 0.5))
    plain = tuple(t.detach() for t in (q, k, pad_k, pad_v))
    torch.library.opcheck(torch.ops.vitrail.region_routes.default, (*plain, [2, 2], 3))


def test_autocast_does_not_change_the_routes() -> None:
    q, k = torch.randn(2, 4, 28, 28, 4, 32).unbind(0)
    want = region_routes(q, k, n_regions=7, topk=4).sort().values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(region_routes(q, k, n_regions=7, topk=4).sort().values, want)


def test_routes_carry_no_gradient() -> None:
    q, k, _, pad_q, pad_k, _ = (t.clone().requires_grad_() for t in _inputs(1, 5, 5, 1, 4))
    assert not region_routes(q, k, n_regions=2, topk=1, pad_q=pad_q, pad_k=pad_k).requires_grad


def test_backward_is_reproducible() -> None:
    q, k, v, *_ = (t.float().requires_grad_() for t in _inputs(4, 14, 14, 2, 8))
    routes = torch.rand(4, 49, 49).topk(16).indices
    gradients = [
        torch.autograd.grad(routing_attention(q, k, v, routes, n_regions=7).square().sum(), (q, k, v)) for _ in range(3)
    ]
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


def test_empty_batch() -> None:
    q = torch.randn(0, 6, 6, 2, 4)
    routes = region_routes(q, q, n_regions=2, topk=3)
    assert routes.shape == (0, 4, 3)
    assert routing_attention(q, q, q, routes, n_regions=2).shape == q.shape


def test_low_precision_is_as_close_as_its_own_naive_form() -> None:
    q, k, v, *_ = _inputs(2, 8, 8, 2, 16)
    routes = torch.arange(4).expand(2, 4, 4)  # all regions: plain attention over the map
    want = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    got = routing_attention(*(t.bfloat16() for t in (q, k, v)), routes, n_regions=2, scale=16**-0.5)
    assert got.dtype == torch.bfloat16
    error = (got.double().flatten(1, 2).transpose(1, 2) - want).abs().max()
    naive = F.scaled_dot_product_attention(*(t.bfloat16().flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    assert error <= 2 * (naive.double() - want).abs().max() + 1e-3


class _Call(NamedTuple):
    """Arguments of one call of the operator: qkv (B, H, W, 3, heads, D), pads (2, heads, D) or None."""

    qkv: Tensor
    pads: Tensor | None
    routes: Tensor
    n_regions: tuple[int, int]
    grad: Tensor

    def run(self, dtype: torch.dtype, backend: str) -> list[Tensor]:
        """Output and the gradients of qkv and pads."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.qkv, self.pads) if x is not None]
        pad_k, pad_v = leaves[1] if self.pads is not None else (None, None)
        out = routing_attention(
            *leaves[0].unbind(3), self.routes, n_regions=self.n_regions, pad_k=pad_k, pad_v=pad_v, backend=backend
        )
        return [out, *torch.autograd.grad(out, leaves, self.grad.to(dtype), materialize_grads=True)]

    def check_fused(self, dtype: torch.dtype) -> None:
        """The fused kernels are as close to float64 as the eager form of the same dtype; a schedule changes nothing."""
        fused = self.run(dtype, "triton")
        for exact, ours, theirs in zip(self.run(torch.float64, "eager"), fused, self.run(dtype, "eager"), strict=True):
            scale = exact.norm() + 1e-12
            bound = 2 * (theirs.double() - exact).norm() / scale + torch.finfo(dtype).eps
            assert ours.isfinite().all()
            assert (ours.double() - exact).norm() / scale <= bound
        if DEVICE == "cuda":
            assert all(torch.equal(a, b) for a, b in zip(fused, self.run(dtype, "triton"), strict=True))


def _random_call(seed: int, dtype: torch.dtype, shape: tuple[int, ...] | None = None, grid: int | None = None) -> _Call:
    draw = random.Random(seed)
    batch, height, width, heads, dim = shape or (*(draw.randint(1, high) for high in (2, 13, 13, 2)), 16)
    n_regions = (grid, grid) if grid else (draw.randint(1, 5), draw.randint(1, 4))
    regions = math.prod(n_regions)
    topk = draw.randint(1, regions if grid is None else 4)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    # One in four times all regions choose the same ones, which leaves the others without queries.
    rows = 1 if draw.random() < 0.25 else regions
    routes = torch.rand(batch, rows, regions, generator=generator).topk(topk).indices.expand(-1, regions, -1)
    qkv = randn(batch, height, width, 3, heads, dim)
    if draw.random() < 0.3:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    pads = randn(2, heads, dim) if draw.random() < 0.6 else None
    return _Call(qkv, pads, routes.to(DEVICE), n_regions, randn(batch, height, width, heads, dim))


_DTYPES = pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)


@needs_triton
@_DTYPES
@pytest.mark.parametrize("seed", range(8))
def test_fused_is_as_exact_as_eager(
    seed: int, dtype: torch.dtype, routing_kernels: None, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitrail.kernels.routing_attention import triton

    monkeypatch.setattr(triton, "_BLOCK", 32 if seed % 2 else 64)  # several tiles on a small map
    _random_call(seed, dtype).check_fused(dtype)


@needs_triton
def test_keys_beyond_the_last_are_hidden(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile of all 192 keys has places for 85 regions; a mask has bits for 64 and begins anew."""
    from vitrail.kernels.routing_attention import triton

    monkeypatch.setattr(triton, "_DENSE_ADVANTAGE", math.inf)
    _random_call(1, torch.float16, (1, 8, 24, 1, 16), 8).check_fused(torch.float16)


@needs_triton
@pytest.mark.parametrize(
    ("size", "grid", "topk", "dense"), [(56, 7, 1, False), (28, 7, 4, False), (14, 7, 16, True), (50, 16, 4, False)]
)
def test_form_of_the_kernels(size: int, grid: int, topk: int, dense: bool) -> None:
    """Stages of BiFormer at 224 pixels, and one with more regions than a mask has bits."""
    from vitrail.kernels.routing_attention.triton import _Problem

    routes = torch.zeros(1, grid**2, topk, dtype=torch.int64)
    q = torch.zeros(1, size, size, 1, 32, dtype=torch.float16)
    forward, backward = (_Problem(q, None, routes, (grid, grid), 1.0, forward=forward) for forward in (True, False))
    assert bool(forward.dense) == bool(backward.dense) == dense
    assert forward.single
    assert backward.single == (size != 14)


@pytest.fixture(params=["counted", "passes"])
def ranking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every call find the places of regions in one of the two ways."""
    triton_routes = pytest.importorskip("vitrail.kernels.routing_attention.triton_routes")
    monkeypatch.setattr(triton_routes, "_COUNTED_A_PASS", 1 if request.param == "passes" else 10**6)


@needs_triton
@pytest.mark.parametrize("seed", range(10))
def test_fused_routes_are_those_of_the_reference(
    seed: int, ranking: None, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitrail.kernels.routing_attention import triton_routes

    # Tiles of several regions, and several steps of one region's tokens.
    monkeypatch.setattr(triton_routes, "_MOST_LANES", 2 if seed % 2 else 64)
    monkeypatch.setattr(triton_routes, "_MOST_RANKED", 512 if seed % 3 else 0)
    call = _random_call(seed, torch.float32)
    q, k, _ = call.qkv.requires_grad_().unbind(3)
    pad_q, pad_k = q.new_zeros(2, *q.shape[3:]) if call.pads is None else call.pads
    pads = {} if call.pads is None else {"pad_q": pad_q, "pad_k": pad_k}
    topk = call.routes.shape[2]
    routes = region_routes(q, k, n_regions=call.n_regions, topk=topk, **pads, backend="triton")
    assert not routes.requires_grad
    _check_routes(routes, q.detach(), k.detach(), pad_q, pad_k, call.n_regions, topk)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of the products
@pytest.mark.parametrize(("grid", "topk", "heads"), [((2, 3), 6, 1), ((5, 7), 20, 3), ((7, 10), 70, 1)])
def test_equal_regions_are_ranked_in_their_order(
    grid: tuple[int, int], topk: int, heads: int, ranking: None, poison: None
) -> None:
    """Small integers tie often and are exact; what is no number comes last, as minus infinity does."""
    generator = torch.Generator().manual_seed(topk)
    q, k = torch.randint(-1, 2, (2, 2, *grid, heads, 16), generator=generator).float().to(DEVICE).unbind(0)
    k[0, 0, 0] = math.inf
    k[1, 1, 1] = math.nan
    similarity = q.flatten(1, 2).flatten(2) @ k.flatten(1, 2).flatten(2).transpose(1, 2)
    similarity = torch.where(similarity > -3e38, similarity, -3e38)
    want = torch.sort(similarity, dim=-1, descending=True, stable=True).indices[..., :topk]
    assert torch.equal(region_routes(q, k, n_regions=grid, topk=topk, backend="triton"), want)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_fused_routes_stay_inside_the_map_whatever_the_numbers(ranking: None) -> None:
    q = torch.full((1, 6, 6, 1, 16), math.nan, device=DEVICE)
    q[0, :2] = math.inf
    routes = region_routes(q, q, n_regions=3, topk=9, backend="triton")
    assert routes.sort().values.tolist() == [[list(range(9))] * 9]


@needs_triton
@pytest.mark.parametrize(
    ("regions", "topk", "count"), [(49, 1, False), (49, 4, True), (49, 16, True), (256, 4, False), (256, 64, True)]
)
def test_ranking_of_the_models(regions: int, topk: int, count: bool) -> None:
    """Counting takes time as the regions do, passes as the routes."""
    from vitrail.kernels.routing_attention.triton_routes import _is_counted

    assert _is_counted(regions, topk) == count


@needs_triton
def test_opposite_lists() -> None:
    from vitrail.kernels.routing_attention.triton import _inverse_lists, _masks

    routes = torch.rand(3, 40, 40).topk(5).indices.to(DEVICE)
    listed, bounds = _inverse_lists(routes)
    for image in range(3):
        for region in range(40):
            first, last = bounds[image, region].tolist()
            chosen_by = (routes[image] == region).any(-1).nonzero().flatten()
            assert listed[image, first:last].tolist() == chosen_by.tolist()
    bits = _masks(routes)[..., None] >> torch.arange(40, device=DEVICE) & 1
    assert torch.equal(bits, torch.zeros_like(bits).scatter(-1, routes, 1))


@needs_triton
@pytest.mark.parametrize("padded", [True, False])
def test_registration_of_the_kernels(padded: bool, routing_kernels: None) -> None:
    q, k, v, _, pad_k, pad_v = (t.float().to(DEVICE).requires_grad_() for t in _inputs(2, 5, 4, 1, 16))
    routes = torch.rand(2, 4, 4).topk(3).indices.to(DEVICE)
    pads = (pad_k, pad_v) if padded else (None, None)
    torch.library.opcheck(torch.ops.vitrail.routing_attention.default, (q, k, v, *pads, routes, [2, 2], 0.5))
    torch.library.opcheck(torch.ops.vitrail.region_routes.default, (q, k, *pads, [2, 2], 3))


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("seed", seeds(100))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    draw = random.Random(seed)
    shape = (draw.randint(1, 4), draw.randint(1, 70), draw.randint(1, 70), draw.randint(1, 4))
    _random_call(seed, dtype, (*shape, draw.choice([16, 32, 64, 128])), draw.choice([2, 5, 7, 16])).check_fused(dtype)


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("grid", [7, 16])
def test_fused_on_a_detection_image(grid: int, dtype: torch.dtype) -> None:
    _random_call(grid, dtype, (2, 200, 336, 2, 32), grid).check_fused(dtype)


def test_bad_arguments_are_named() -> None:
    q, k, v, pad_q, pad_k, _ = _inputs(1, 4, 4, 2, 4)
    routes = torch.zeros(1, 4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="topk is 5"):
        region_routes(q, k, n_regions=2, topk=5)
    with pytest.raises(ValueError, match="pad_q and pad_k"):
        region_routes(q, k, n_regions=2, topk=1, pad_q=pad_q)
    with pytest.raises(ValueError, match="pad_k and pad_v"):
        routing_attention(q, k, v, routes, n_regions=2, pad_k=pad_k)
    with pytest.raises(TypeError, match=r"routes is torch\.float32"):
        routing_attention(q, k, v, routes.float(), n_regions=2)
    with pytest.raises(ValueError, match="routes has shape"):
        routing_attention(q, k, v, routes, n_regions=3)
    with pytest.raises(NotImplementedError, match=r"routing_attention.*Triton"):
        routing_attention(q, k, v, routes, n_regions=2, backend="triton")
