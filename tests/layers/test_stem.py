"""Strided convolutions over blocks of pixels against PyTorch's own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from _seeds import seeds
from timm.layers import is_notrace_module
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrail.layers.stem import ImageConv2d, _to_blocks


@pytest.mark.parametrize("seed", seeds(30))
def test_blocks_compute_the_convolution_and_its_gradients(seed: int) -> None:
    draw = random.Random(seed)
    stride, channels = draw.choice([2, 3, 4]), draw.randint(1, 4)
    kernel = (draw.randint(1, 8), draw.randint(1, 8))
    pad = (draw.randint(0, 5), draw.randint(0, 5))
    size = [draw.randint(max(1, k - 2 * p), 30) for k, p in zip(kernel, pad, strict=True)]
    layer = ImageConv2d(channels, 5, kernel, stride, pad, bias=draw.random() < 0.5, dtype=torch.float64)
    image = torch.randn(draw.randint(1, 3), channels, *size, dtype=torch.float64, requires_grad=True)
    assert layer._gains(image)
    want, found = nn.Conv2d.forward(layer, image), layer._convolve_blocks(image)
    torch.testing.assert_close(found, want)
    inputs = (image, *layer.parameters())
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 5, "stride": 2},
        {"in_channels": 3, "stride": 1},
        {"in_channels": 3, "stride": (2, 4)},
        {"in_channels": 4, "stride": 2, "groups": 2},
        {"in_channels": 3, "stride": 2, "dilation": 2},
        {"in_channels": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
        {"in_channels": 3, "stride": 2, "padding": "valid"},
    ],
)
def test_other_convolutions_stay_as_they_are(arguments: dict[str, Any]) -> None:
    layer = ImageConv2d(out_channels=8, kernel_size=3, **arguments)
    assert not layer._gains(torch.randn(1, layer.in_channels, 9, 9))


def test_scripted_and_left_whole_by_tracers() -> None:
    layer = ImageConv2d(3, 8, 3, 2, 1)
    assert is_notrace_module(ImageConv2d)
    image = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(torch.jit.script(layer)(image), layer(image))
    torch.testing.assert_close(layer(image), nn.Conv2d.forward(layer, image))
    assert layer(image).is_contiguous(memory_format=torch.channels_last)


def test_one_compilation_for_all_sizes() -> None:
    compilations = CompileCounter()
    run = torch.compile(ImageConv2d(3, 8, 7, 4, 3)._convolve_blocks, fullgraph=True, dynamic=True, backend=compilations)
    for size in range(8, 40, 3):
        run(torch.randn(2, 3, size, size + 5))
    assert compilations.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(7, 4, 3), (3, 2, 1), (4, 4, 0)])
def test_gpus_are_as_exact(kernel: int, stride: int, pad: int, dtype: torch.dtype) -> None:
    layer = ImageConv2d(3, 32, kernel, stride, pad, device="cuda", dtype=dtype)
    image = torch.randn(4, 3, 57, 62, device="cuda", dtype=dtype)
    want = nn.Conv2d.forward(layer.double(), image.double())
    layer.to(dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, plain = layer(image), nn.Conv2d.forward(layer, image)
    assert found.is_contiguous(memory_format=torch.channels_last)
    error, bound = ((y.double() - want).norm() / want.norm() for y in (found, plain))
    assert error <= 2 * bound + torch.finfo(dtype).eps


def test_blocks_have_what_the_tensor_cores_take_at_once() -> None:
    blocks = _to_blocks(torch.randn(2, 3, 8, 6), [(0, 0), (0, 0)], 2)  # 12 channels, and zeros
    assert blocks.shape == (2, 16, 4, 3)
    assert blocks.is_contiguous(memory_format=torch.channels_last)
    assert blocks[:, :12].abs().min() > 0
    assert blocks[:, 12:].abs().max() == 0


def test_gpus_take_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ImageConv2d(3, 8, 3, 2, 1)
    monkeypatch.setattr(layer, "_convolve_blocks", lambda x: x.device.type)
    with FakeTensorMode():
        assert layer(torch.empty(2, 3, 8, 8, device="cuda")) == "cuda"
    assert layer(torch.randn(2, 3, 8, 8)).shape == (2, 8, 4, 4)
