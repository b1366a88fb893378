"""The channel attention layer against timm's, and through TorchScript and tracing."""

from __future__ import annotations

import pytest
import torch
from timm.models._features_fx import is_notrace_module
from timm.models.davit import ChannelAttention as TimmChannelAttention

from vitrail.layers.channel import ChannelAttention


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (14, 14)], ids=str)
def test_equals_timm(size: tuple[int, int], qkv_bias: bool) -> None:
    theirs = TimmChannelAttention(24, 3, qkv_bias=qkv_bias, dtype=torch.float64)
    ours = ChannelAttention(24, 3, qkv_bias=qkv_bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    got, want = ours(x), theirs(x.flatten(1, 2)).view_as(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.square().sum().backward()
    want.square().sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_scripts_and_is_a_leaf_for_tracing() -> None:
    layer = ChannelAttention(16, 2)
    x = torch.randn(2, 5, 6, 16)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    assert is_notrace_module(ChannelAttention)


def test_factory_arguments_reach_every_parameter() -> None:
    layer = ChannelAttention(16, 2, proj_bias=False, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer.proj.bias is None


def test_indivisible_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="dim is 10, num_heads 4"):
        ChannelAttention(10, 4)
