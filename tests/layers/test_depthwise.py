"""The depth-wise convolution layer against PyTorch's convolution, scripted, traced, explained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import is_notrace_module
from torch import Tensor, nn

from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.explain import explain


def _plain(layer: DepthwiseConv2d, x: Tensor) -> Tensor:
    """The layer's convolution by PyTorch."""
    y = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=layer.padding, groups=x.shape[3])
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_added(kernel_size: int, bias: bool) -> None:
    x, residual = torch.randn(2, 2, 5, 4, 3, dtype=torch.float64).unbind(0)
    for options in ({}, {"skip": True}, {"gelu": True}, {"skip": True, "gelu": True}):
        layer = DepthwiseConv2d(3, kernel_size, bias=bias, dtype=torch.float64, **options)
        want = _plain(layer, x)
        want = F.gelu(want) if layer.gelu else want
        want = want + x if layer.skip else want
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer(x, residual), want + residual)


def test_padding_goes_on_behind_the_map() -> None:
    layer = DepthwiseConv2d(3, 5, dtype=torch.float64)
    x, value = torch.randn(2, 4, 6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole = value.expand(2, 7, 7, 3).clone()
    whole[:, :4, :6] = x
    torch.testing.assert_close(layer(x, pad_value=value, pads=(3, 1)), _plain(layer, whole)[:, :4, :6])


def test_parameters_are_those_of_a_convolution() -> None:
    layer, plain = DepthwiseConv2d(6, 5, skip=True), nn.Conv2d(6, 6, 5, groups=6)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("bias", [False, True])
def test_scripts_and_is_a_leaf_for_tracing(bias: bool) -> None:
    layer = DepthwiseConv2d(4, 3, bias=bias, skip=True)
    x, residual = torch.randn(2, 2, 5, 6, 4).unbind(0)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x), layer(x))
    torch.testing.assert_close(
        scripted(x, residual, torch.ones(4), (1, 0)), layer(x, residual, torch.ones(4), (1, 0))
    )  # fmt: skip
    assert is_notrace_module(DepthwiseConv2d)


def test_is_explained() -> None:
    ((name, choice),) = explain(DepthwiseConv2d(4), torch.randn(1, 3, 3, 4)).rows
    assert (name, choice.op, choice.shape) == ("(model)", "depthwise_conv", (1, 3, 3, 4))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kernel_size is 4"):
        DepthwiseConv2d(8, 4)
