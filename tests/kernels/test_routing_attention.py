"""Routing attention: its definition token by token, gradients, the registered operator, argument checks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.routing_attention import region_routes, routing_attention

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


@pytest.mark.parametrize("shape", _SHAPES)
def test_routes_are_the_most_similar_regions(shape: tuple) -> None:
    *sizes, n_regions, topk = shape
    q, k, _, pad_q, pad_k, _ = _inputs(*sizes)
    routes = region_routes(q, k, n_regions=n_regions, topk=topk, pad_q=pad_q, pad_k=pad_k)
    assert routes.shape == (sizes[0], math.prod(n_regions), topk)
    for image in range(sizes[0]):
        q_means = torch.stack([cell.mean(0).flatten() for cell in _cells(q[image], pad_q, n_regions)])
        k_means = torch.stack([cell.mean(0).flatten() for cell in _cells(k[image], pad_k, n_regions)])
        similarity = q_means @ k_means.T
        # Similarities, not indices: regions that are all padding tie.
        torch.testing.assert_close(
            similarity.gather(1, routes[image]).sort().values, similarity.topk(topk).values.sort().values
        )
        assert all(len(set(row)) == topk for row in routes[image].tolist())


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
    with pytest.raises(NotImplementedError, match="no fused kernel yet"):
        routing_attention(q, k, v, routes, n_regions=2, backend="triton")
