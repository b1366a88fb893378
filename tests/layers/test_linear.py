"""The linear attention layers: shapes, scripting, tracing, factory arguments, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models._features_fx import is_notrace_module

from vitrail.layers.linear import LinearAttention, LocalConcentration


def test_scripts_and_is_a_leaf_for_tracing() -> None:
    layer = LinearAttention(16, 2)
    x = torch.randn(2, 5, 6, 16)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    assert is_notrace_module(LinearAttention)


def test_starts_with_the_usual_scale_and_the_released_shape() -> None:
    temperature = LinearAttention(32, 2).temperature
    assert temperature.shape == (2, 1, 1)
    assert torch.equal(temperature, torch.full((2, 1, 1), 0.25))


def test_local_concentration_is_two_convolutions_around_a_norm() -> None:
    layer = LocalConcentration(6, dtype=torch.float64).eval()
    layer.bn.running_mean.normal_()
    x = torch.randn(2, 9, 4, 6, dtype=torch.float64)
    y = F.conv2d(x.permute(0, 3, 1, 2), layer.conv1.weight, layer.conv1.bias, padding=3, groups=6)
    y = (F.gelu(y) - layer.bn.running_mean[:, None, None]) / (layer.bn.running_var + layer.bn.eps)[:, None, None].sqrt()
    y = F.conv2d(y, layer.conv2.weight, layer.conv2.bias, padding=3, groups=6).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


def test_factory_arguments_and_errors() -> None:
    for layer in (LinearAttention(16, 2, device="meta", dtype=torch.bfloat16), LocalConcentration(4, device="meta")):
        assert {p.device.type for p in layer.parameters()} == {"meta"}
    with pytest.raises(ValueError, match="dim is 10, num_heads 4"):
        LinearAttention(10, 4)
    with pytest.raises(ValueError, match="floor is -1"):
        LinearAttention(8, 2, floor=-1)
