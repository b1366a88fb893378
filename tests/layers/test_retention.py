"""RMT's retention layer against a literal form with complex rotations; what must stay in float32."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models._features_fx import is_notrace_module
from torch import Tensor

from vitrail.layers.retention import Retention, RetentionPosition, manhattan_decay, rotate, rotation_of


def turned(x: Tensor, dim: int) -> Tensor:
    """Pairs of channels of (B, H, W, heads, D) as complex numbers, (B, H, W, heads, D / 2), turned by the raster."""
    height, width = x.shape[1:3]
    angles = [10000 ** (-j / (dim // 2 - 1)) for j in range(dim // 2)]
    index = torch.arange(height * width, dtype=x.dtype).view(height, width, 1, 1)
    turns = index * torch.tensor(angles, dtype=x.dtype)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(turns), turns)


def literal_retention(layer: Retention, x: Tensor, initial_value: float, heads_range: float) -> Tensor:
    height, width, channels = x.shape[1:]
    heads, dim = layer.num_heads, layer.head_dim
    q, k, v = (part.unflatten(-1, (heads, dim)) for part in layer.qkv(x).chunk(3, -1))
    lce = torch.nn.functional.conv2d(
        v.flatten(3).permute(0, 3, 1, 2), layer.lepe.weight, layer.lepe.bias, padding=2, groups=channels
    )
    q, k = turned(q, dim), turned(k * dim**-0.5, dim)
    decay = [math.log(1 - 2 ** (-initial_value - heads_range * i / heads)) for i in range(heads)]
    m = torch.tensor(decay, dtype=x.dtype)
    dy = (torch.arange(height)[:, None] - torch.arange(height)).abs()
    dx = (torch.arange(width)[:, None] - torch.arange(width)).abs()
    if layer.decomposed:
        rows = torch.einsum("byxnd,byznd->byxzn", q, k.conj()).real + dx[:, :, None] * m
        v = torch.einsum("byxzn,byznd->byxnd", rows.softmax(3), v)
        columns = torch.einsum("byxnd,bzxnd->byxzn", q, k.conj()).real + dy[:, None, :, None] * m
        v = torch.einsum("byxzn,bzxnd->byxnd", columns.softmax(3), v)
    else:
        distance = dy[:, None, :, None] + dx[None, :, None, :]  # (y, x, y', x')
        logits = torch.einsum("byxnd,bzwnd->byxzwn", q, k.conj()).real + distance[..., None] * m
        weights = logits.flatten(3, 4).softmax(3)
        v = torch.einsum("byxtn,btnd->byxnd", weights, v.flatten(1, 2))
    return layer.proj(v.flatten(3) + lce.permute(0, 2, 3, 1))


@pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "full"])
@pytest.mark.parametrize("size", [(1, 1), (4, 7), (6, 3)], ids=str)
def test_is_the_literal_form(size: tuple[int, int], decomposed: bool) -> None:
    layer = Retention(24, 3, decomposed, dtype=torch.float64)
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    got = layer(x, *RetentionPosition(3, 8, 2.0, 6.0)(x))
    torch.testing.assert_close(got, literal_retention(layer, x, 2.0, 6.0), rtol=1e-11, atol=1e-11)


def test_forms_differ() -> None:
    decomposed, full = Retention(16, 2), Retention(16, 2, decomposed=False)
    full.load_state_dict(decomposed.state_dict())
    x = torch.randn(1, 5, 6, 16)
    shared = RetentionPosition(2, 8)(x)
    assert (decomposed(x, *shared) - full(x, *shared)).abs().max() > 1e-3


def test_decay_is_the_formula() -> None:
    got = manhattan_decay(5, 2.0, 6.0, torch.zeros(1, dtype=torch.float64))
    want = [math.log(1 - 2 ** (-2 - 6 * i / 5)) for i in range(5)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)
    # Where 1 - 2^-x leaves few digits, the float32 form keeps them.
    slow = manhattan_decay(2, 12.0, 2.0, torch.zeros(1))
    exact = manhattan_decay(2, 12.0, 2.0, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(slow.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_never_reaches_angles_and_decays(dtype: torch.dtype) -> None:
    position = RetentionPosition(4, 16)
    x = torch.randn(1, 40, 70, 64)
    want = position(x)
    got = position.to(dtype)(x.to(dtype))
    with torch.autocast("cpu", dtype):
        cast = position(x.to(dtype))
    for a, b, c in zip(got, want, cast, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert torch.equal(c, b)
    assert not list(position.buffers())
    # An index of 2799 in half precision would be off by whole steps, that is by radians for the first pair.
    q = torch.randn(1, 40, 70, 4, 16)
    error = (rotate(q.to(dtype), got[0]).float() - rotate(q, want[0])).abs().max()
    assert error < 4 * torch.finfo(dtype).eps * q.abs().max()


def test_rotation_of_a_width_of_two_is_the_index() -> None:
    index = torch.arange(6).view(2, 3)
    turns = rotation_of(index, 2, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(turns[0, :, :, 0, 0], index.double().cos())
    torch.testing.assert_close(turns[1, :, :, 0, 0], index.double().sin())


def test_scripts_and_is_a_leaf_for_tracing() -> None:
    x = torch.randn(2, 5, 6, 16)
    position = RetentionPosition(2, 8)
    for decomposed in (True, False):
        layer = Retention(16, 2, decomposed)
        want = layer(x, *position(x))
        torch.testing.assert_close(torch.jit.script(layer)(x, *torch.jit.script(position)(x)), want)
    assert is_notrace_module(Retention)
    assert is_notrace_module(RetentionPosition)


def test_factory_arguments_reach_every_parameter() -> None:
    layer = Retention(16, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert not list(layer.buffers())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dim is 10, num_heads 4"):
        Retention(10, 4)
    with pytest.raises(ValueError, match="head_dim is 3"):
        RetentionPosition(2, 3)
    with pytest.raises(ValueError, match="initial_value is 0"):
        RetentionPosition(2, 4, initial_value=0)
    with pytest.raises(ValueError, match="heads_range -1"):
        RetentionPosition(2, 4, heads_range=-1)
