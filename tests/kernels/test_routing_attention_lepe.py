"""Routing attention with its position term: the two operators that it is made of, and what it writes in one piece."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from _cuda_graphs import assert_a_cuda_graph_repeats
from _exactness import allowed_error, assert_as_exact
from _graphs import keep_graphs
from _seeds import seeds
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common import replay
from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.depthwise_conv import depthwise_conv
from vitrail.kernels.routing_attention import routing_attention
from vitrail.kernels.routing_attention.reference import region_size
from vitrail.kernels.routing_attention_lepe import routing_attention_lepe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
_NAMES = ("qkv", "pads", "weight", "bias")
_SHAPES = [  # batch, height, width, heads, D, filter, n_regions, topk
    (2, 6, 9, 2, 4, 5, (3, 3), 2),
    (1, 7, 5, 1, 8, 3, (2, 4), 8),
    (3, 1, 1, 2, 3, 5, (2, 2), 4),
    (1, 5, 11, 3, 2, 7, (4, 4), 5),
    (2, 4, 4, 2, 4, 9, (1, 1), 1),
]


class _Call(NamedTuple):
    """Tensors of one call, absent ones None, and the gradient of its result."""

    tensors: dict[str, Tensor | None]
    routes: Tensor
    n_regions: tuple[int, int]
    grad: Tensor

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        given = self.tensors.items()
        return {name: None if t is None else t.to(dtype).detach().requires_grad_() for name, t in given}

    def outcome(self, out: Tensor, leaves: dict[str, Tensor | None]) -> list[Tensor]:
        """Output and the gradients of all tensors."""
        wanted = [leaf for leaf in leaves.values() if leaf is not None]
        options = {"allow_unused": True, "materialize_grads": True}
        return [out.detach(), *torch.autograd.grad(out, wanted, self.grad.to(out.dtype), **options)]

    def run(self, dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = self.leaves(dtype)
        if backend == "eager":  # how a map lies changes nothing, but breaks PyTorch's kernels for 16 bits on a GPU
            leaves["qkv"] = leaves["qkv"].detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        out = routing_attention_lepe(routes=self.routes, n_regions=self.n_regions, **leaves, backend=backend)
        return self.outcome(out, leaves)

    def run_apart(self, dtype: torch.dtype, backend: str) -> list[Tensor]:
        """The same by the two operators."""
        leaves = self.leaves(dtype)
        return self.outcome(self.apart(leaves, backend), leaves)

    def apart(self, leaves: dict[str, Tensor | None], backend: str) -> Tensor:
        q, k, v = leaves["qkv"].unbind(3)
        _, pad_k, pad_v = (None, None, None) if leaves["pads"] is None else leaves["pads"].unbind(0)
        attention = routing_attention(
            q, k, v, self.routes, n_regions=self.n_regions, pad_k=pad_k, pad_v=pad_v, backend=backend
        )
        options: dict[str, Any] = {"pads": region_size(*q.shape[1:3], self.n_regions)[1], "backend": backend}
        if pad_v is not None:
            options["pad_value"] = pad_v.flatten()
        return depthwise_conv(v.flatten(3), leaves["weight"], leaves["bias"], residual=attention.flatten(3), **options)

    def check_fused(self, dtype: torch.dtype) -> None:
        """As close to float64 as the eager form of the same dtype; forward the very numbers of the two operators."""
        fused = self.run(dtype, "triton")
        for exact, ours, theirs in zip(self.run(torch.float64, "eager"), fused, self.run(dtype, "eager"), strict=True):
            assert ours.dtype == dtype
            assert ours.is_contiguous()
            assert_as_exact(ours, theirs, exact)
        with torch.no_grad():
            assert torch.equal(fused[0], self.apart(self.leaves(dtype), "triton"))
        if DEVICE == "cuda":
            assert all(torch.equal(a, b) for a, b in zip(fused, self.run(dtype, "triton"), strict=True))


def _draw_call(
    seed: int, shape: tuple[int, ...], size: int, n_regions: tuple[int, int], topk: int, dtype: torch.dtype
) -> _Call:
    """Numbers that `dtype` can hold; whether padding's values and a bias are given, and how qkv lies, differs."""
    batch, height, width, heads, dim = shape
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    regions = math.prod(n_regions)
    routes = torch.rand(batch, regions, regions, generator=generator).topk(topk).indices.to(DEVICE)
    qkv = randn(batch, height, width, 3, heads, dim)
    if draw.random() < 0.3:  # rows and columns change places
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    elif draw.random() < 0.2:  # channels first
        qkv = qkv.permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3)
    tensors = {
        "qkv": qkv,
        "pads": randn(3, heads, dim) if draw.random() < 0.7 else None,
        "weight": randn(heads * dim, 1, size, size) / size,
        "bias": randn(heads * dim) if draw.random() < 0.7 else None,
    }
    return _Call(tensors, routes, n_regions, randn(batch, height, width, heads * dim))


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("seed", [0, 5])
def test_is_attention_and_the_convolution_of_the_values(shape: tuple[Any, ...], seed: int) -> None:
    *sizes, size, n_regions, topk = shape
    call = _draw_call(seed, tuple(sizes), size, n_regions, topk, torch.float64)
    for mine, apart in zip(call.run(torch.float64, "eager"), call.run_apart(torch.float64, "eager"), strict=True):
        torch.testing.assert_close(mine, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 5), (2, 4)], ids=["padded", "whole"])
def test_gradients(size: tuple[int, int]) -> None:
    tensors = _draw_call(0, (1, *size, 1, 2), 3, (2, 2), 2, torch.float64).leaves(torch.float64)
    routes = torch.tensor([[[0, 1], [1, 2], [3, 0], [1, 3]]], device=DEVICE)

    def operator(*given: Tensor) -> Tensor:
        return torch.ops.vitrail.routing_attention_lepe(*given, routes, [2, 2], 0.7)

    assert torch.autograd.gradcheck(operator, tuple(tensors.values()))


def _opcheck(dim: int, has_all: bool) -> None:
    call = _draw_call(0, (2, 3, 2, 1, dim), 3, (2, 2), 3, torch.float32)
    tensors = call.leaves(torch.float32)
    if not has_all:
        tensors |= {"pads": None, "bias": None}
    operator = torch.ops.vitrail.routing_attention_lepe.default
    torch.library.opcheck(operator, (*tensors.values(), call.routes, [2, 2], 0.5))


@pytest.mark.parametrize("has_all", [True, False])
def test_registration(has_all: bool) -> None:
    _opcheck(3, has_all)


@needs_triton
def test_registration_of_the_kernels(large_tiles: None) -> None:
    _opcheck(16, True)


def test_inputs_alone_are_saved() -> None:
    call = _draw_call(0, (1, 4, 5, 2, 3), 5, (2, 2), 2, torch.float32)
    tensors, saved = call.leaves(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        torch.ops.vitrail.routing_attention_lepe(*tensors.values(), call.routes, [2, 2], 1.0)
    given = {t.data_ptr() for t in (*tensors.values(), call.routes)}
    assert {t.data_ptr() for t in saved} == given


def test_autocast() -> None:
    call = _draw_call(0, (1, 4, 5, 2, 4), 5, (2, 2), 2, torch.float32)
    tensors = {**call.leaves(torch.float32), "routes": call.routes, "n_regions": 2}
    with torch.autocast(DEVICE, torch.bfloat16):
        assert routing_attention_lepe(**tensors).dtype == torch.bfloat16
        short = {**tensors, "qkv": tensors["qkv"].bfloat16()}
        assert routing_attention_lepe(**short).dtype == torch.bfloat16
        exact = {name: t.double() if name in _NAMES else t for name, t in tensors.items()}
        assert routing_attention_lepe(**exact).dtype == torch.float64


@needs_triton
def test_flops_are_those_of_the_two_operators(large_tiles: None) -> None:
    tensors = _draw_call(0, (1, 4, 3, 1, 16), 3, (2, 2), 3, torch.float32).leaves(torch.float32)
    routes = torch.arange(3, device=DEVICE).expand(1, 4, 3)
    (q, k, v), (_, pad_k, pad_v) = tensors["qkv"].unbind(3), tensors["pads"].unbind(0)
    totals = []
    for run in (
        lambda: torch.ops.vitrail.routing_attention_lepe(*tensors.values(), routes, [2, 2], 0.5),
        lambda: torch.ops.vitrail.depthwise_conv(
            v.flatten(3), tensors["weight"], tensors["bias"], pad_v.flatten(),
            torch.ops.vitrail.routing_attention(q, k, v, pad_k, pad_v, routes, [2, 2], 0.5).flatten(3),
            [0, 1], False, False,
        ),
    ):  # fmt: skip
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                out = run()
                if backward:
                    out.sum().backward()
            totals.append(counter.get_total_flops())
    assert totals[:2] == totals[2:]
    tokens = 2 * 2  # of a region
    assert totals[0] == 2 * 16 * (2 * 4 * tokens * 3 * tokens + 4 * 3 * 9)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
def test_empty_batch(backend: str) -> None:
    call = _draw_call(0, (0, 5, 4, 1, 16), 5, (2, 2), 3, torch.float32)
    out, *gradients = call.run(torch.float32, backend)
    assert out.shape == (0, 5, 4, 16)
    assert all(not gradient.any() for gradient in gradients)


def test_compiles_to_one_node_in_either_direction() -> None:
    def run(qkv: Tensor, routes: Tensor, pads: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.vitrail.routing_attention_lepe(qkv, pads, weight, bias, routes, [2, 2], 0.5)

    backend, graphs = keep_graphs()
    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for height, width in ((6, 7), (11, 9)):
        call = _draw_call(0, (2, height, width, 2, 4), 5, (2, 2), 3, torch.float32)
        results = []
        for function in (compiled, run):
            leaves = call.leaves(torch.float32)
            results.append(call.outcome(function(routes=call.routes, **leaves), leaves))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 2  # forward and backward
    for graph, name in zip(graphs, ("routing_attention_lepe", "routing_attention_lepe_backward"), strict=True):
        assert [node for node in graph if "vitrail" in node] == [f"vitrail.{name}.default"]
        assert not any("cat" in node or "add" in node or "stack" in node for node in graph)


_DTYPES = pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)


def _random_call(seed: int, dtype: torch.dtype, most: int, head_dims: list[int]) -> _Call:
    draw = random.Random(seed)
    shape = (
        draw.randint(1, 3),
        draw.randint(1, most),
        draw.randint(1, most),
        draw.randint(1, 4),
        draw.choice(head_dims),
    )
    n_regions = (draw.randint(1, 5), draw.randint(1, 7))
    return _draw_call(
        seed, shape, draw.choice([3, 5, 5, 7]), n_regions, draw.randint(1, min(16, math.prod(n_regions))), dtype
    )


@needs_triton
@_DTYPES
@pytest.mark.parametrize("seed", [0, 3, 5, 9])  # one map of whole regions, others padded, with all tensors and without
def test_fused_is_as_exact_as_eager(
    seed: int, dtype: torch.dtype, routing_kernels: None, poison: None, large_tiles: None
) -> None:
    draw = random.Random(seed)
    shape = (1 + seed % 2, draw.randint(1, 6), draw.randint(1, 6), 1, 16)
    n_regions = (draw.randint(1, 3), draw.randint(1, 3))
    topk = draw.randint(1, math.prod(n_regions))
    _draw_call(seed, shape, (5, 3, 7)[seed % 3], n_regions, topk, dtype).check_fused(dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(5, 1), (1, 4), (1, 1)], ids=["column", "row", "pixel"])
def test_fused_on_thin_maps(size: tuple[int, int], dtype: torch.dtype, poison: None, large_tiles: None) -> None:
    """The stride of an axis of one pixel says nothing."""
    _draw_call(1, (2, *size, 1, 16), 3, (2, 2), 2, dtype).check_fused(dtype)


@needs_triton
def test_autocast_leaves_padding_as_it_is(large_tiles: None) -> None:
    """The projection's bias stays in float32, and so does its gradient."""
    call = _draw_call(0, (1, 3, 3, 1, 16), 3, (2, 2), 2, torch.float16)
    exact = call.run(torch.float64, "eager")
    with torch.autocast(DEVICE, torch.float16):
        eager, fused = (call.run(torch.float32, backend) for backend in ("eager", "triton"))
    assert [t.dtype for t in fused] == [torch.float16] + [torch.float32] * 4
    for truth, ours, theirs in zip(exact, fused, eager, strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error <= allowed_error(truth, theirs, torch.float16)


@needs_triton
def test_gradient_of_the_values_is_rounded_once_more_than_the_convolution(large_tiles: None) -> None:
    """Queries of zero make all weights 1/16, and the filter passes the gradient on: both parts are exact."""
    call = _draw_call(0, (1, 4, 4, 1, 16), 3, (2, 2), 4, torch.float16)
    call.tensors["qkv"][:, :, :, 0] = 0
    call.tensors["weight"].zero_()[:, :, 1, 1] = 1
    exact, apart, ours = (
        run(dtype, backend)[1][:, :, :, 2]
        for run, dtype, backend in (
            (call.run, torch.float64, "eager"),
            (call.run_apart, torch.float16, "triton"),
            (call.run, torch.float16, "triton"),
        )
    )
    assert torch.equal(ours, exact.half())
    assert not torch.equal(apart, exact.half())


@needs_triton
def test_in_float32_the_convolutions_gradient_is_added_at_the_end() -> None:
    """Sums that began with it would be rounded at its size with each product."""
    from vitrail.kernels.routing_attention.triton import routing_attention_gradients

    call = _draw_call(1, (1, 12, 12, 1, 16), 3, (2, 2), 4, torch.float32)
    q, k, v = call.tensors["qkv"].float().unbind(3)
    grad = call.grad.float().unflatten(3, (1, 16))
    sums = []
    for begun in (0.0, 4096.0):
        parts = torch.full((*q.shape[:3], 3, *q.shape[3:]), begun, device=DEVICE).unbind(3)
        routing_attention_gradients(
            grad, q, k, v, *parts, None, None, call.routes, call.n_regions, 0.25, adds_to_v=begun > 0
        )
        sums.append(parts[2])
    assert torch.equal(sums[1], sums[0] + 4096)


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("seed", seeds(60))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    _random_call(seed, dtype, 60, [16, 32, 64, 128]).check_fused(dtype)


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("grid", [7, 16])
def test_fused_on_a_detection_image(grid: int, dtype: torch.dtype, poison: None) -> None:
    _draw_call(grid, (2, 100, 168, 2, 32), 5, (grid, grid), 4, dtype).check_fused(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["direct", "compiled"])
@pytest.mark.parametrize("size", [14, 25], ids=["whole", "padded"])
def test_calls_are_replayed(size: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on other numbers, to the last bit; the third step is replayed."""
    call = _draw_call(0, (2, size, size, 2, 32), 5, (7, 7), 4, torch.bfloat16)
    run: Callable[..., Tensor] = functools.partial(
        routing_attention_lepe, routes=call.routes, n_regions=(7, 7), backend="triton"
    )
    if compiled:
        run = torch.compile(run, backend="aot_eager", dynamic=False)
    plans = []
    run_plan = replay.Plan.run
    monkeypatch.setattr(replay.Plan, "run", lambda plan, given: plans.append(plan) or run_plan(plan, given))
    for step in range(4):
        results = []
        for replays in (False, True):
            monkeypatch.setattr(replay, "REPLAYS", replays)
            leaves = call.leaves(torch.bfloat16)
            leaves["qkv"] = (leaves["qkv"].detach() * (1 - step / 8)).requires_grad_()
            results.append(call.outcome(run(**leaves), leaves))
        assert all(map(torch.equal, *results))
    assert len(set(plans)) == 2


@pytest.mark.gpu
def test_a_cuda_graph_repeats() -> None:
    call = _draw_call(0, (4, 28, 28, 4, 32), 5, (7, 7), 4, torch.bfloat16)
    assert_a_cuda_graph_repeats(lambda: call.run(torch.bfloat16, "triton"))


def test_choice_is_recorded_and_what_the_kernels_do_not_take_is_named() -> None:
    call = _draw_call(0, (1, 4, 4, 1, 16), 9, (2, 2), 2, torch.float32)
    with record_choices() as choices:
        call.run(torch.float32, "auto")
    assert [(c.op, c.backend, c.shape) for c in choices] == [("routing_attention_lepe", "eager", (1, 4, 4, 1, 16))]
    assert "the filter has 9" in choices[0].reason or DEVICE == "cpu"
    with pytest.raises(NotImplementedError, match=r"routing_attention_lepe.*Triton"):
        call.run(torch.float32, "triton")


def test_bad_arguments_are_named() -> None:
    call = _draw_call(0, (1, 4, 4, 2, 4), 5, (2, 2), 2, torch.float32)
    good = {**call.tensors, "routes": call.routes, "n_regions": 2}
    qkv, weight, routes = good["qkv"], good["weight"], good["routes"]
    for wrong, error, message in (
        ({"qkv": qkv[:, :, :, :2]}, ValueError, "qkv has shape"),
        ({"qkv": qkv.long()}, TypeError, r"qkv is torch\.int64"),
        ({"weight": weight[:4]}, ValueError, "weight has shape"),
        ({"weight": weight[..., :4]}, ValueError, "filters of 5 x 4"),
        ({"weight": weight.double()}, ValueError, r"weight has dtype torch\.float64"),
        ({"bias": weight.new_zeros(3)}, ValueError, "bias has shape"),
        ({"pads": weight.new_zeros(2, 2, 4)}, ValueError, "pads has shape"),
        ({"routes": routes.float()}, TypeError, r"routes is torch\.float32"),
        ({"n_regions": 3}, ValueError, "routes has shape"),
        ({"n_regions": 0}, ValueError, "n_regions is 0"),
    ):
        with pytest.raises(error, match=message):
            routing_attention_lepe(**{**good, **wrong})
