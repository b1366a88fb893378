"""The layers of BiFormer against a literal reading of the released computation: pad first, then project."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _graphs import keep_graphs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from vitrail.kernels._common.dispatch import HAS_TRITON, settings
from vitrail.layers.routing import FullAttention, RoutingAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _literal_routing(layer: RoutingAttention, x: Tensor, n_win: int, topk: int) -> Tensor:
    """Zero-pads the input, projects every token, attends region by region."""
    batch, height, width, dim = x.shape
    scale = dim**-0.5
    x = F.pad(x, (0, 0, 0, -width % n_win, 0, -height % n_win))
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    rows, columns = x.shape[1] // n_win, x.shape[2] // n_win
    boxes = [
        (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        for i in range(n_win)
        for j in range(n_win)
    ]
    maps = []
    for image in range(batch):
        q_means, k_means = (torch.stack([t[image][box].mean((0, 1)) for box in boxes]) for t in (q, k))
        routes = (scale * q_means @ k_means.T).topk(topk).indices
        out = torch.zeros_like(q[image])
        for box, routed in zip(boxes, routes.tolist(), strict=True):
            keys, values = (
                torch.cat([t[image][boxes[r]].flatten(0, 1) for r in routed]).unflatten(1, (layer.num_heads, -1))
                for t in (k, v)
            )
            queries = q[image][box].unflatten(2, (layer.num_heads, -1))
            weights = (scale * torch.einsum("ijhd,shd->ijhs", queries, keys)).softmax(-1)
            out[box] = torch.einsum("ijhs,shd->ijhd", weights, values).flatten(2)
        maps.append(out)
    local = F.conv2d(v.permute(0, 3, 1, 2), layer.lepe.weight, layer.lepe.bias, padding=2, groups=dim)
    return layer.proj(torch.stack(maps) + local.permute(0, 2, 3, 1))[:, :height, :width]


def _literal_full(layer: FullAttention, x: Tensor) -> Tensor:
    batch, height, width, dim = x.shape
    q, k, v = layer.qkv(x).reshape(batch, height * width, 3, 8, dim // 8).permute(2, 0, 3, 1, 4)
    out = ((dim / 8) ** -0.5 * q @ k.transpose(2, 3)).softmax(-1) @ v
    local = F.conv2d(x.permute(0, 3, 1, 2), layer.lepe.weight, layer.lepe.bias, padding=2, groups=dim)
    return layer.proj(out.transpose(1, 2).reshape(x.shape) + local.permute(0, 2, 3, 1))


def _assert_same(layer: nn.Module, got: Tensor, want: Tensor, x: Tensor) -> None:
    """Outputs and the gradients of the input and all parameters agree to rounding in float64."""
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    leaves = [x, *layer.parameters()]
    seed = torch.randn_like(got)
    for mine, literal in zip(
        torch.autograd.grad(got, leaves, seed), torch.autograd.grad(want, leaves, seed), strict=True
    ):
        torch.testing.assert_close(mine, literal, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "n_win", "topk"),
    [
        ((14, 14), 7, 4),
        ((13, 17), 7, 16),
        ((25, 33), 8, 4),
        ((13, 17), 16, 16),  # whole regions of padding
        ((2, 3), 7, 4),
        ((1, 1), 2, 3),
        ((8, 7), 4, 16),  # one column short: less padding than the filter reaches
    ],
)
def test_routing_pads_as_released(size: tuple[int, int], n_win: int, topk: int) -> None:
    layer = RoutingAttention(16, 4, n_win, topk, dtype=torch.float64)
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    _assert_same(layer, layer(x), _literal_routing(layer, x, n_win, topk), x)


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)])
def test_full_attention(size: tuple[int, int]) -> None:
    layer = FullAttention(32, dtype=torch.float64)
    x = torch.randn(2, *size, 32, dtype=torch.float64, requires_grad=True)
    _assert_same(layer, layer(x), _literal_full(layer, x), x)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("kind", ["routing", "full"])
def test_script_and_compile(kind: str, size: tuple[int, int]) -> None:
    layer = RoutingAttention(16, 2, 4, 3) if kind == "routing" else FullAttention(16)
    x = torch.randn(2, *size, 16)
    want = layer(x)
    torch.testing.assert_close(torch.jit.script(layer)(x), want)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("height", "adds"), [(4, 0), (3, 1)], ids=["whole", "padded"])
def test_training_neither_joins_nor_adds_gradients(height: int, adds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the projection's bias, which has a second gradient where it is what padding holds."""
    monkeypatch.setattr(settings, "default_backend", "triton")
    layer = RoutingAttention(16, 1, 2, 2, device=DEVICE)
    x = torch.randn(1, height, 4, 16, device=DEVICE, requires_grad=True)
    backend, graphs = keep_graphs()
    torch.compile(layer, fullgraph=True, backend=backend)(x).sum().backward()
    forward, backward = graphs
    assert [node for node in forward if node.startswith("vitrail")] == [
        "vitrail.region_routes.default",
        "vitrail.routing_attention_lepe.default",
    ]
    assert [node for node in backward if node.startswith("vitrail")] == [
        "vitrail.routing_attention_lepe_backward.default"
    ]
    assert sum("add" in node for node in backward) == adds
    assert not any(word in node for node in backward for word in ("cat", "stack", "scatter"))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads 3"):
        RoutingAttention(16, 3)
    with pytest.raises(ValueError, match="topk is 50"):
        RoutingAttention(16, 2, 7, 50)
    with pytest.raises(ValueError, match="n_win is 0"):
        RoutingAttention(16, 2, 0, 1)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_sizes_make_no_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where attention is one node; the reference's steps depend on the padding."""
    monkeypatch.setattr(settings, "default_backend", "triton")
    layer = RoutingAttention(32, 2, n_win=2, topk=1).to(DEVICE)
    counter = CompileCounter()
    run = torch.compile(layer, backend=counter)
    with torch.no_grad():
        for size in ((8, 12), (9, 16), (12, 20), (15, 17), (16, 13)):
            x = torch.randn(1, *size, 32, device=DEVICE)
            torch.testing.assert_close(run(x), layer(x))
    assert counter.frame_count == 2  # the second is for any size
