"""The feed-forward layer: timm's results and parameters, and the operator only where all parts are plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from _graphs import keep_graphs
from timm.layers import is_notrace_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices, settings
from vitrail.layers.mlp import Mlp

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs kernels also without a GPU, in the interpreter."""
    monkeypatch.setattr(settings, "default_backend", "triton")


def alike(**options: Any) -> tuple[Mlp, timm.layers.Mlp]:
    """Our layer and timm's, with the same weights, in float16 and for inference."""
    first, second = (kind(16, 24, 20, **options).to(DEVICE, torch.float16).eval() for kind in (Mlp, timm.layers.Mlp))
    first.load_state_dict(second.state_dict())
    return first, second


def rows(*leading: int) -> Tensor:
    return torch.randn((*leading, 16), device=DEVICE, dtype=torch.float16)


def runs_fused(layer: nn.Module, x: Tensor) -> bool:
    with record_choices() as choices:
        layer(x)
    assert {(choice.op, choice.backend) for choice in choices} <= {("mlp", "triton")}
    return bool(choices)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"bias": (True, False), "drop": 0.5}, {"act_layer": nn.ReLU}, {"norm_layer": nn.LayerNorm}],
    ids=str,
)
def test_results_gradients_and_parameters_are_timms(options: dict[str, Any]) -> None:
    first, second = (layer.float() for layer in alike(**options))
    assert repr(first) == repr(second)
    assert isinstance(first, timm.layers.Mlp)
    x = rows(2, 3, 5).float()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for trains in (False, True):
        outs = []
        for layer, leaf in zip((first, second), leaves, strict=True):
            torch.manual_seed(1)  # of the dropout
            outs.append(layer.train(trains)(leaf))
            outs[-1].backward(outs[-1].detach().cos())
        torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bias": (True, False), "drop": 0.5}], ids=str)
def test_the_operator_computes_what_the_parts_do(options: dict[str, Any], on_request: None) -> None:
    first, second = alike(**options)
    x = rows(2, 3, 5)
    assert runs_fused(first, x)
    exact = copy.deepcopy(second).double()(x.double())
    errors = [(layer(x) - exact).norm() for layer in (first, second)]
    assert errors[0] <= 2 * errors[1] + 1e-3 * exact.norm()
    assert first(x).dtype == torch.float16


@needs_triton
def test_where_the_operator_runs(on_request: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = alike()[0], rows(3)
    with torch.no_grad():
        assert runs_fused(layer, x)
    assert runs_fused(layer, x)  # gradients are recorded
    assert runs_fused(layer.train(), x)
    assert not runs_fused(layer.float(), x.float())
    dropping = alike(drop=(0.0, 0.5))[0]
    assert runs_fused(dropping, x)
    assert not runs_fused(dropping.train(), x)
    assert runs_fused(dropping.eval(), x)
    monkeypatch.setattr(settings, "default_backend", "eager")
    assert not runs_fused(layer.half(), x)


@needs_triton
@pytest.mark.parametrize("frozen", [(), ("x",), ("fc1.weight", "fc2.bias"), ("x", "fc1.weight", "fc1.bias")], ids=str)
@pytest.mark.parametrize("casts", [False, True], ids=["float16", "autocast"])
def test_gradients_of_the_operator_are_the_parts_own(on_request: None, casts: bool, frozen: tuple[str, ...]) -> None:
    """Under autocast of float32 weights as well; at most twice as far from the truth as PyTorch's parts."""
    layers = [layer.train() for layer in alike()]
    exact = copy.deepcopy(layers[1]).double()
    x = rows(2, 3, 5)
    grad = torch.randn((2, 3, 5, 20), device=DEVICE, dtype=torch.float16)
    if casts:
        layers, x = [layer.float() for layer in layers], x.float()
    found = []
    for layer in (*layers, exact):
        leaf = x.detach().to(torch.float64 if layer is exact else x.dtype).requires_grad_("x" not in frozen)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        with torch.autocast(DEVICE, torch.float16, enabled=casts and layer is not exact):
            out = layer(leaf)
        out.backward(grad.to(out.dtype))
        found.append({"x": leaf.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()})
    for name, (ours, theirs, truth) in zip(found[0], zip(*(one.values() for one in found), strict=True), strict=True):
        assert (ours is None) is (theirs is None) is (name in frozen)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            errors = [(gradient - truth).norm() for gradient in (ours, theirs)]
            assert errors[0] <= 2 * errors[1] + 1e-3 * truth.norm()


class _Quantised(Tensor):
    """A tensor that says to be of half precision."""


def _replace(layer: Mlp, name: str, kind: Callable[..., nn.Module]) -> None:
    part = getattr(layer, name)
    setattr(layer, name, kind(part.in_features, part.out_features, device=DEVICE, dtype=torch.float16))


class _Adapted(nn.Linear):
    """What adapters put in the place of a linear layer."""


def _parametrised(layer: Mlp) -> None:
    parametrize.register_parametrization(layer.fc1, "weight", nn.Identity())


def _quantised(layer: Mlp) -> None:
    layer.fc2.weight = nn.Parameter(layer.fc2.weight.detach().as_subclass(_Quantised), requires_grad=False)


CHANGES: dict[str, Callable[[Mlp], Any]] = {
    "hook on fc1": lambda layer: layer.fc1.register_forward_hook(lambda *_: None),
    "hook on act": lambda layer: layer.act.register_forward_hook(lambda *_: None),
    "hook on norm": lambda layer: layer.norm.register_forward_hook(lambda *_: None),
    "hook before drop1": lambda layer: layer.drop1.register_forward_pre_hook(lambda *_: None),
    "hook before fc2": lambda layer: layer.fc2.register_forward_pre_hook(lambda *_: None),
    "hook on drop2": lambda layer: layer.drop2.register_forward_hook(lambda *_: None),
    "hook on gradients of fc1": lambda layer: layer.fc1.register_full_backward_hook(lambda *_: None),
    "hook before gradients of act": lambda layer: layer.act.register_full_backward_pre_hook(lambda *_: None),
    "adapter": lambda layer: _replace(layer, "fc1", _Adapted),
    "parametrisation": _parametrised,
    "quantised weight": _quantised,
    "another activation": lambda layer: setattr(layer, "act", nn.ReLU()),
    "GELU by tanh": lambda layer: setattr(layer, "act", nn.GELU("tanh")),
    "norm": lambda layer: setattr(layer, "norm", nn.LayerNorm(24, device=DEVICE, dtype=torch.float16)),
}


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_are_replaced_or_watched_are_called(change: str, on_request: None) -> None:
    layer, x = alike()[0], rows(3)
    assert runs_fused(layer, x)
    CHANGES[change](layer)
    assert not runs_fused(layer, x)


@needs_triton
@torch.no_grad()
def test_hooks_see_what_they_see_in_timms_layer(on_request: None) -> None:
    layers, x = alike(), rows(3)
    seen: list[Tensor] = []
    for layer in layers:
        layer.act.register_forward_hook(lambda module, inputs, output: seen.append(output))
        layer(x)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


@needs_triton
@torch.no_grad()
def test_a_compiled_layer_holds_the_operator(on_request: None) -> None:
    layer, x = alike()[0], rows(2, 3)
    backend, graphs = keep_graphs()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
    assert graphs == [["vitrail.mlp.default"]]
    compiled(rows(5, 7))
    assert len(graphs) == 1  # any size


@needs_triton
def test_training_compiles_in_one_graph_of_any_size(on_request: None) -> None:
    layer = alike()[0].train()
    layer.fc1.weight.requires_grad_(False)
    backend, graphs = keep_graphs()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    wanted = [layer.fc1.bias, layer.fc2.weight, layer.fc2.bias]
    for leading in ((2, 3), (5, 7)):
        x = rows(*leading).requires_grad_()
        found, want = (torch.autograd.grad(run(x).square().sum(), [x, *wanted]) for run in (compiled, layer))
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert len(graphs) == 2  # forward and backward
    for graph, name in zip(graphs, ("mlp", "mlp_backward"), strict=True):
        assert graph.count(f"vitrail.{name}.default") == 1


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_training_is_checkpointed(on_request: None, dtype: torch.dtype, reentrant: bool) -> None:
    """By the parts and by the operator."""
    layer = alike()[0].to(dtype).train()
    x = rows(2, 3).to(dtype).requires_grad_()
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, want)


@torch.no_grad()
def test_exports_scripts_and_traces_hold_the_parts(on_request: None) -> None:
    first, second = alike()
    x = rows(2, 3)
    graphs = [str(torch.export.export(layer, (x,)).graph) for layer in (first, second)]
    assert graphs[0] == graphs[1]
    for recorded in (torch.jit.script(first), torch.jit.trace(first, (x,), check_trace=False)):
        torch.testing.assert_close(recorded(x), second(x), rtol=0, atol=0)
    assert is_notrace_module(Mlp)


@needs_triton
@torch.no_grad()
def test_hooks_of_all_modules_see_the_parts(on_request: None) -> None:
    layer, x = alike()[0], rows(2, 3)
    seen: list[nn.Module] = []
    hook = register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    assert not runs_fused(layer, x)
    assert set(seen) == set(layer.modules())
    hook.remove()
    assert runs_fused(layer, x)
    with FlopCounterMode(display=False) as counter:  # has such hooks
        layer(x)
    assert counter.flop_counts["Mlp.fc2"] == {torch.ops.aten.addmm: 2 * 6 * 24 * 20}


@needs_triton
@torch.no_grad()
def test_few_rows_are_not_worth_it() -> None:
    """On a GPU, without data."""
    with FakeTensorMode():
        layer = Mlp(16, 24, 20, device="cuda", dtype=torch.float16).eval()
        for leading, fused in (((3,), False), ((8, 32, 31), False), ((8, 32, 32), True), ((9000,), True)):
            x = torch.empty((*leading, 16), device="cuda", dtype=torch.float16)
            assert layer._runs_fused(x) is fused
            assert layer(x).shape == (*leading, 20)


@needs_triton
def test_wide_rows_are_worth_it_in_inference_alone() -> None:
    """On a GPU, without data; what counts is whether anything needs a gradient."""
    with FakeTensorMode():
        layer = Mlp(256, 8, device="cuda", dtype=torch.float16)
        x = torch.empty((9000, 256), device="cuda", dtype=torch.float16)
        assert not layer._runs_fused(x)
        layer.requires_grad_(False)
        assert layer._runs_fused(x)
        assert not layer._runs_fused(x.requires_grad_())
        with torch.no_grad():
            assert layer._runs_fused(x)
        narrow = Mlp(192, 8, device="cuda", dtype=torch.float16)
        assert narrow._runs_fused(x[:, :192])


@torch.no_grad()
def test_shapes_on_meta() -> None:
    layer = Mlp(16, 24, 20, device="meta", dtype=torch.float16).eval()
    assert layer(torch.empty(2, 3, 16, device="meta", dtype=torch.float16)).shape == (2, 3, 20)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dim", [96, 192])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inference_on_a_gpu(dtype: torch.dtype, dim: int) -> None:
    first, second = (kind(dim, 4 * dim).to("cuda", dtype).eval() for kind in (Mlp, timm.layers.Mlp))
    first.load_state_dict(second.state_dict())
    x = torch.randn(4, 56, 56, dim, device="cuda", dtype=dtype)
    want = second(x)
    assert runs_fused(first, x)
    for run in (first, torch.compile(first, fullgraph=True)):
        torch.testing.assert_close(run(x), want, rtol=2e-2, atol=2e-2)
    with torch.autocast("cuda", dtype):
        layer = first.float()
        assert runs_fused(layer, x.float())
        torch.testing.assert_close(layer(x.float()), want, rtol=2e-2, atol=2e-2)
