"""The neighborhood layer: padding as the released models do it, scripting, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitrail.kernels.neighborhood_attention import neighborhood_attention
from vitrail.layers.neighborhood import NeighborhoodAttention


@settings(max_examples=25)
@given(
    height=st.integers(1, 12), width=st.integers(1, 12), dilation=st.sampled_from([1, 2, (1, 3)]), bias=st.booleans()
)
def test_small_maps_are_padded_before_the_projection(height: int, width: int, dilation: Any, bias: bool) -> None:
    layer = NeighborhoodAttention(8, 2, kernel_size=(3, 5), dilation=dilation, qkv_bias=bias, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    needed = [k * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    padded = nn.functional.pad(x, (0, 0, 0, max(0, needed[1] - width), 0, max(0, needed[0] - height)))
    q, k, v = layer.qkv(padded).unflatten(3, (3, 2, 4)).unbind(3)
    whole = neighborhood_attention(q, k, v, kernel_size=(3, 5), dilation=dilation, rpb=layer.rpb)
    want = layer.proj(whole[:, :height, :width].flatten(3))
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)


def test_scripts() -> None:
    layer = NeighborhoodAttention(8, 2, kernel_size=3, dilation=2, is_causal=(True, False)).eval()
    x = torch.randn(1, 4, 9, 8)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "dim is 8, num_heads 3"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"dilation": (1, 0)}, r"dilation is \(1, 0\)"),
        ({"kernel_size": 3, "stride": 4}, r"stride is \(4, 4\); allowed: at most kernel_size \(3, 3\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(8, **{"num_heads": 2, **kwargs}, device="meta")
