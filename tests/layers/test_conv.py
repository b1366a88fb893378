"""Dense convolutions that keep compiled networks channels-last, against PyTorch's own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _families import SMALLEST, build
from _graphs import keep_graphs
from _seeds import seeds
from timm.layers import is_notrace_module
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitrail.layers.conv import Conv2d, _backward, _run_conv2d

CHANNELS_FIRST = ("mobilenetv2_ela_b", "resnet18_ela_t")


def _random_layer(seed: int) -> tuple[Conv2d, torch.Tensor]:
    draw = random.Random(seed)
    groups = draw.choice([1, 1, 2, 3])
    kernel, dilation = ((draw.randint(1, 4), draw.randint(1, 4)) for _ in range(2))
    layer = Conv2d(
        groups * draw.randint(1, 4),
        groups * draw.randint(1, 4),
        kernel,
        (draw.randint(1, 3), draw.randint(1, 3)),
        (draw.randint(0, 3), draw.randint(0, 3)),
        dilation,
        groups,
        bias=draw.random() < 0.5,
        dtype=torch.float64,
    )
    size = [dilation[i] * (kernel[i] - 1) + draw.randint(1, 12) for i in (0, 1)]
    image = torch.randn(draw.randint(1, 3), layer.in_channels, *size, dtype=torch.float64, requires_grad=True)
    return layer, image


@pytest.mark.parametrize("seed", seeds(12))
def test_compiled_computes_the_convolution_and_its_gradients(seed: int) -> None:
    layer, image = _random_layer(seed)
    backend, graphs = keep_graphs()
    found, want = torch.compile(layer, fullgraph=True, backend=backend)(image), nn.Conv2d.forward(layer, image)
    torch.testing.assert_close(found, want)
    assert found.permute(0, 2, 3, 1).is_contiguous()
    inputs = (image, *layer.parameters())
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)
    assert [("vitrail" in name, "convolution" in name) for name in graphs[0] if "conv" in name] == [(True, False)]


@pytest.mark.parametrize("seed", seeds(4))
def test_operator_is_registered_as_pytorch_wants_it(seed: int) -> None:
    layer, image = _random_layer(seed)
    x = image.detach().permute(0, 2, 3, 1).requires_grad_()
    weight = layer.weight.detach().requires_grad_()
    constants = (layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.library.opcheck(torch.ops.vitrail.conv2d.default, (x, weight, *constants))
    torch.library.opcheck(torch.ops.vitrail.conv2d.default, (x.detach(), weight, *constants))  # of an image


@pytest.mark.parametrize("name", [name for name in SMALLEST if name not in CHANNELS_FIRST])
def test_no_dense_convolution_is_left_to_the_compiler(name: str) -> None:
    """Any would make it lay all (B, H, W, C) maps with their rows innermost."""
    groups = []

    def backend(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        nodes = [node for node in module.graph.nodes if node.target in (torch.conv2d, F.conv2d)]
        groups.extend(node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1) for node in nodes)
        return module.forward

    torch.compile(build(name).eval(), backend=backend)(torch.randn(1, 3, 64, 64))
    assert all(n > 1 for n in groups)  # depth-wise ones, by their definition on CPUs


def test_inference_is_left_to_the_compiler() -> None:
    backend, graphs = keep_graphs()
    layer, image = Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(image), layer(image))
    assert graphs == [["aten.convolution.default"]]


def test_mixed_precision_is_pytorchs() -> None:
    layer, image = Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    backend, _ = keep_graphs()
    with torch.autocast("cpu", torch.bfloat16):
        found, want = torch.compile(layer, fullgraph=True, backend=backend)(image), layer(image)
    assert found.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(found, want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_other_dtypes_are_refused_by_name(name: str) -> None:
    layer = Conv2d(4, 6, 3)
    parameter = getattr(layer, name)
    parameter.data = parameter.data.double()
    with pytest.raises(Exception, match=f"{name} has dtype torch.float64, x has torch.float32"):
        torch.compile(layer, fullgraph=True, backend=keep_graphs()[0])(torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_other_paddings_stay_as_they_are(options: dict[str, Any]) -> None:
    layer, image = Conv2d(4, 6, 3, **options), torch.randn(2, 4, 8, 8)
    backend, graphs = keep_graphs()
    torch.testing.assert_close(torch.compile(layer, backend=backend)(image), nn.Conv2d.forward(layer, image))
    assert not any("vitrail" in name for name in graphs[0])


def test_eager_exported_and_scripted_are_pytorchs() -> None:
    layer, image = Conv2d(4, 6, 3, 2, 1), torch.randn(2, 4, 9, 8)
    want = nn.Conv2d.forward(layer, image)
    assert is_notrace_module(Conv2d)
    assert torch.equal(layer(image), want)
    assert torch.equal(torch.jit.script(layer)(image), want)
    exported = torch.export.export(layer, (image,))
    assert torch.equal(exported.module()(image), want)
    assert "vitrail" not in str(exported.graph)
    with pytest.raises(RuntimeError, match="channels"):
        layer(torch.randn(2, 5, 9, 8))


def test_wrong_channels_are_refused_by_name() -> None:
    backend, _ = keep_graphs()
    with pytest.raises(Exception, match="x has 5 channels, weight takes 4"):
        torch.compile(Conv2d(4, 6, 3), fullgraph=True, backend=backend)(torch.randn(2, 5, 9, 8))


def test_one_compilation_for_all_sizes() -> None:
    compilations = CompileCounter()
    run = torch.compile(Conv2d(3, 8, 3, 2, 1), fullgraph=True, dynamic=True, backend=compilations)
    for size in range(8, 40, 3):
        run(torch.randn(2, 3, size, size + 5))
    assert compilations.frame_count == 1


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_gradients_that_nobody_needs_are_not_computed(needed: tuple[bool, bool]) -> None:
    masks = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    x, weight, grad = torch.randn(2, 9, 8, 4), torch.randn(6, 4, 3, 3), torch.randn(2, 7, 6, 6)
    with Watch():
        found = _backward(grad, x, weight, (1, 1), (0, 0), (1, 1), 1, needed)
    assert masks == [(*needed, False)]
    assert tuple(one.numel() > 0 for one in found) == needed


@pytest.mark.parametrize("of_a_map", [True, False])
def test_flops_are_those_of_pytorchs_own(of_a_map: bool) -> None:
    layer, image = Conv2d(4, 6, 3, 2, 1), torch.randn(2, 4, 9, 8, requires_grad=of_a_map)
    counts = []
    for convolve in (
        lambda: F.conv2d(image, layer.weight, None, 2, 1),
        lambda: _run_conv2d(image.permute(0, 2, 3, 1), layer.weight, (2, 2), (1, 1), (1, 1), 1),
    ):
        with FlopCounterMode(display=False) as counter:
            convolve().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 32])
def test_compiled_is_as_exact_on_a_gpu(channels: int, dtype: torch.dtype) -> None:
    layer = Conv2d(channels, 64, 3, 2, 1, device="cuda", dtype=dtype)
    image = torch.randn(2, channels, 57, 62, device="cuda", dtype=dtype, requires_grad=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain, found = (_output_and_gradients(run, layer, image) for run in (layer, torch.compile(layer)))
        layer.double()
        want = _output_and_gradients(layer, layer, image.detach().double().requires_grad_())
    for a, b, c in zip(found, plain, want, strict=True):
        error, bound = ((y.double() - c).norm() / c.norm() for y in (a, b))
        assert error <= 2 * bound + torch.finfo(dtype).eps


def _output_and_gradients(run: Any, layer: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    out = run(image)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, (image, *layer.parameters()), weights)]
