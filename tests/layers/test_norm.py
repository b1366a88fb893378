"""The normalisation layers: PyTorch's and timm's results and parameters, and the operator only where they train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
from _graphs import keep_graphs
from timm.layers import is_notrace_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices, settings
from vitrail.kernels.layer_norm import layer_norm
from vitrail.layers.norm import LayerNorm, LayerNorm2d

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = pytest.mark.parametrize(
    ("ours", "plain", "shape"),
    [(LayerNorm, nn.LayerNorm, (2, 3, 4, 8)), (LayerNorm2d, timm.layers.LayerNorm2d, (2, 8, 3, 4))],
    ids=["rows", "maps"],
)


class _Calls(TorchDispatchMode):
    """Collects the names of operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@contextmanager
def on_a_gpu() -> Iterator[_Calls]:
    """Collects calls; tensors that are made inside are on a GPU, without data, if there is none."""
    with FakeTensorMode(), _Calls() as calls:
        yield calls


def alike(ours: type[nn.Module], plain: type[nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """Both layers with the same weights."""
    first, second = ours(8, **options), plain(8, **options)
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    first.load_state_dict(second.state_dict())
    return first, second


@PAIRS
def test_results_gradients_and_parameters_are_those_of_the_plain_layer(
    ours: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...]
) -> None:
    for options in ({}, {"eps": 0.1, "dtype": torch.float64}, {"bias": False} if plain is nn.LayerNorm else {}):
        first, second = alike(ours, plain, **options)
        assert repr(first) == repr(second)
        assert isinstance(first, plain)
        x = torch.randn(shape, dtype=options.get("dtype"))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = [layer(leaf) for layer, leaf in zip((first, second), leaves, strict=True)]
        torch.testing.assert_close(outs[0], outs[1])
        assert outs[0].stride() == outs[1].stride()
        for out in outs:
            out.backward(x.cos())
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


@PAIRS
def test_operator_runs_where_large_maps_train_on_a_gpu(
    ours: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_a_gpu() as calls:
        layer, x = ours(8, device="cuda"), torch.empty(shape, device="cuda")

        def operators(x: Tensor) -> list[str]:
            calls.names.clear()
            layer(x)
            return [name for name in calls.names if "layer_norm" in name]

        plains, fused = ["aten::native_layer_norm"], ["vitrail::layer_norm"]
        assert operators(x) == plains
        with monkeypatch.context() as patch:
            patch.setattr(settings, "default_backend", "triton")
            assert operators(x) == (fused if HAS_TRITON else plains)
        monkeypatch.setattr("vitrail.layers.norm._LARGE", x.numel())
        assert operators(x) == (fused if HAS_TRITON else plains)
        with torch.no_grad():
            assert operators(x) == plains
        layer.requires_grad_(False)
        assert operators(x) == plains
        assert operators(x.detach().requires_grad_()) == (fused if HAS_TRITON else plains)
        monkeypatch.setattr(settings, "default_backend", "eager")
        assert operators(x) == plains


@needs_triton
@PAIRS
def test_a_compiled_layer_that_trains_holds_the_operator(
    ours: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.layers.norm.layer_norm", partial(layer_norm, backend="triton"))
    layer, x = ours(8).to(DEVICE), torch.randn(shape, device=DEVICE)
    for trains in (True, False):
        layer.requires_grad_(trains)
        with _Calls() as calls:
            layer(x)
        assert "vitrail::layer_norm" not in calls.names  # a small map
        backend, graphs = keep_graphs()
        torch.compile(layer, fullgraph=True, backend=backend)(x)
        assert sum(graph.count("vitrail.layer_norm.default") for graph in graphs) == trains
        torch._dynamo.reset()


@PAIRS
def test_exports_and_traces_hold_pytorchs_operator(
    ours: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...]
) -> None:
    first, second = (layer.eval() for layer in alike(ours, plain))
    x = torch.randn(shape)
    graphs = [str(torch.export.export(layer, (x,)).graph) for layer in (first, second)]
    assert graphs[0].replace("input", "x") == graphs[1].replace("input", "x")
    for recorded in (torch.jit.script(first), torch.jit.trace(first, (x,))):
        torch.testing.assert_close(recorded(x), second(x))
    assert is_notrace_module(ours)


def test_tracing_for_a_gpu_holds_pytorchs_operator() -> None:
    with on_a_gpu():
        graph = torch.export.export(LayerNorm(8, device="cuda"), (torch.empty(2, 8, device="cuda"),)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["aten.layer_norm.default"]


@PAIRS
def test_compiles_in_one_graph_and_is_checkpointed(
    ours: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...]
) -> None:
    layer, _ = alike(ours, plain)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    for reentrant in (False, True):
        (want,) = torch.autograd.grad(layer(x).square().sum(), x)
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, want)


def test_several_axes_and_bad_inputs_are_pytorchs() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    with record_choices() as choices:
        torch.testing.assert_close(LayerNorm((3, 4))(x), nn.LayerNorm((3, 4))(x))
        for affine in (False, True):
            with pytest.raises(RuntimeError, match="normalized_shape"):
                LayerNorm(3, elementwise_affine=affine)(x)
    assert choices == []


def test_half_precision_with_float32_parameters() -> None:
    first, second = alike(LayerNorm, nn.LayerNorm)
    x = torch.randn(3, 8).bfloat16()
    assert first(x).dtype == second(x).dtype == torch.bfloat16
    torch.testing.assert_close(first(x), second(x))


@PAIRS
@pytest.mark.gpu
def test_training_on_a_gpu(
    ours: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.layers.norm._LARGE", 0)
    layers = [layer.cuda() for layer in alike(ours, plain)]
    x = torch.randn(shape, device="cuda")
    for run in (lambda layer: layer, lambda layer: torch.compile(layer, fullgraph=True)):
        found = []
        for layer in layers:
            leaf = x.clone().requires_grad_()
            out = run(layer)(leaf)
            found.append([out, *torch.autograd.grad(out, [leaf, *layer.parameters()], x.cos())])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)
