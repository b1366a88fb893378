"""The gated forms of retention: every open choice against a literal form in one window, and what windows must keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features_fx import is_notrace_module
from torch import Tensor, nn

from vitrail.layers.gated_retention import GatedRetention, SwatRetention, balanced_slopes

DIM, HEADS, WIDTH = 24, 4, 6  # WIDTH: of a head


def distances(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64)[:, None] - torch.arange(size, dtype=torch.float64)


def literal_swat(layer: SwatRetention, h: Tensor, heads: int = HEADS, **choices: Any) -> Tensor:
    """The SWAT form on a map that one window covers."""
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in layer.qkv(h).chunk(3, -1))
    gate = F.silu(layer.gate(h)).view(v.shape)
    on_output = choices.get("gate_target") == "output"
    v = v if on_output else v * gate
    half = (heads + 1) // 2
    base = [2.0**-i if choices.get("slope_base") == "halving" else 2 ** (-8 * i / half) for i in range(1, half + 1)]
    slopes = torch.tensor((base + [-s for s in base])[:heads], dtype=h.dtype)[:, None, None]
    m = torch.tensor([math.log(1 - 2 ** (-2 - 4 * i / heads)) for i in range(heads)], dtype=h.dtype)[:, None, None]

    def weights(logits: Tensor, steps: Tensor) -> Tensor:
        if choices.get("decay_form") == "slopes":
            return logits.sigmoid() * torch.exp(-slopes * steps.abs())
        if choices.get("length_offset"):
            logits = logits - math.log(steps.numel() if choices.get("decomposed") is False else len(steps))
        return (logits - slopes * (steps if choices.get("signed_slopes") else steps.abs())).sigmoid() * torch.exp(
            m * steps.abs()
        )

    scale = q.shape[-1] ** -0.5
    rows = weights(scale * torch.einsum("byxnd,byznd->bynxz", q, k), distances(h.shape[2]))
    columns = weights(scale * torch.einsum("byxnd,bzxnd->bxnyz", q, k), distances(h.shape[1]))

    def passes(values: Tensor) -> Tensor:
        by_row = torch.einsum("bynxz,byznd->byxnd", rows, values)
        return torch.einsum("bxnyz,bzxnd->byxnd", columns, by_row)

    y, norm = passes(v), choices.get("output_norm", "head")
    if norm == "weight_sum":
        y = y / passes(torch.ones_like(v))
    elif norm == "head":
        y = F.layer_norm(y, y.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-6)
    y = y.flatten(3)
    if norm == "channel":
        y = F.layer_norm(y, y.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-6)
    y = y + layer.lce(v.flatten(3))
    if norm == "after_lce":
        y = F.layer_norm(y, y.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-6)
    return layer.proj(y * gate.flatten(3) if on_output else y)


def with_random_norms(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return layer


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"decay_form": "slopes"},
        {"slope_base": "halving"},
        {"signed_slopes": True},
        {"length_offset": True},
        {"output_norm": "channel"},
        {"output_norm": "after_lce"},
        {"output_norm": "weight_sum"},
        {"gate_target": "output"},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [4, 3], ids=["even", "odd"])
def test_swat_choices(choices: dict[str, Any], heads: int) -> None:
    layer = with_random_norms(SwatRetention(DIM, heads, 7, 3, dtype=torch.float64, **choices))
    h = torch.randn(2, 5, 7, DIM, dtype=torch.float64)
    want = literal_swat(layer, h, heads, **choices)
    torch.testing.assert_close(layer(h, torch.full_like(h, torch.nan)), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate_input", ["normalised", "block"])
@pytest.mark.parametrize("gate_granularity", ["channel", "head"])
def test_gate_of_the_retention_form(gate_input: str, gate_granularity: str) -> None:
    layer = GatedRetention(
        DIM, HEADS, gate_input=gate_input, gate_granularity=gate_granularity, gate_bias=1.0, dtype=torch.float64
    )
    assert torch.equal(layer.gate.bias, torch.ones(HEADS if gate_granularity == "head" else DIM, dtype=torch.float64))
    h, x = torch.randn(2, 2, 4, 6, DIM, dtype=torch.float64).unbind(0)
    q, k, v = (part.unflatten(-1, (HEADS, WIDTH)) for part in layer.qkv(h).chunk(3, -1))
    m = torch.tensor([math.log(1 - 2 ** (-2 - i)) for i in range(HEADS)], dtype=h.dtype)[:, None, None]
    rows = torch.einsum("byxnd,byznd->bynxz", q, k) * WIDTH**-0.5 + m * distances(6).abs()
    columns = torch.einsum("byxnd,bzxnd->bxnyz", q, k) * WIDTH**-0.5 + m * distances(4).abs()
    y = torch.einsum("bynxz,byznd->byxnd", rows.softmax(-1), v)
    y = torch.einsum("bxnyz,bzxnd->byxnd", columns.softmax(-1), y).flatten(3) + layer.lce(v.flatten(3))
    gate = layer.gate(x if gate_input == "block" else h).sigmoid()
    if gate_granularity == "head":
        gate = gate.repeat_interleave(WIDTH, -1)
    torch.testing.assert_close(layer(h, x), layer.proj(y * gate), rtol=1e-10, atol=1e-10)


@settings(max_examples=15)
@given(height=st.integers(1, 13), width=st.integers(1, 13), shifted=st.booleans(), swat=st.booleans())
def test_windows_are_cut_as_defined(height: int, width: int, shifted: bool, swat: bool) -> None:
    """A token reaches exactly the tokens of its window, through attention, and of the 5x5 filter's field."""
    kind = SwatRetention if swat else GatedRetention
    layer = with_random_norms(kind(8, 2, 4, 2 if shifted else 0, dtype=torch.float64))
    nn.init.dirac_(layer.lce.weight, groups=8)  # the filter then reads the token alone
    h = torch.randn(1, height, width, 8, dtype=torch.float64, requires_grad=True)
    y, x = height // 2, width // 2
    layer(h, h)[0, y, x].square().sum().backward()
    reached = h.grad[0].abs().sum(-1) > 1e-12

    def window(i: int, size: int) -> tuple[int, bool]:
        shift = 2 if shifted and size > 4 else 0
        return (i - shift) % (math.ceil(size / 4) * 4) // 4, i < shift

    rows = torch.tensor([window(i, height) == window(y, height) for i in range(height)])
    columns = torch.tensor([window(i, width) == window(x, width) for i in range(width)])
    assert torch.equal(reached, rows[:, None] & columns)


@pytest.mark.parametrize("kind", [SwatRetention, GatedRetention])
def test_small_maps_are_attended_whole(kind: type) -> None:
    layer, wide = kind(DIM, HEADS, 7, 3), kind(DIM, HEADS, (5, 6))
    wide.load_state_dict(layer.state_dict())
    h = torch.randn(2, 5, 6, DIM)
    torch.testing.assert_close(layer(h, h), wide(h, h))


def test_window_grows_to_a_divisor() -> None:
    layer, fixed = (
        SwatRetention(DIM, HEADS, 4, 2, adaptive_window="divisor"),
        SwatRetention(DIM, HEADS, (5, 11), (2, 0)),
    )
    fixed.load_state_dict(layer.state_dict())
    h = torch.randn(1, 10, 11, DIM)
    torch.testing.assert_close(layer(h, h), fixed(h, h))


def test_padding_before_the_projection_takes_part() -> None:
    after, before = GatedRetention(DIM, HEADS, 4), GatedRetention(DIM, HEADS, 4, pad_first=True)
    nn.init.normal_(after.qkv.bias)
    before.load_state_dict(after.state_dict())
    h, x = torch.randn(2, 1, 6, 7, DIM).unbind(0)
    assert not torch.allclose(before(h, x), after(h, x), atol=1e-3)
    padded = F.pad(h, (0, 0, 0, 1, 0, 2))
    want = after(padded, padded)[:, :6, :7]
    torch.testing.assert_close(before(h, x), want)
    whole = torch.randn(1, 8, 4, DIM)
    torch.testing.assert_close(before(whole, whole), after(whole, whole))


def test_whole_windows_at_once() -> None:
    layer = GatedRetention(DIM, HEADS, 7, decomposed=False, dtype=torch.float64)
    h = torch.randn(2, 3, 4, DIM, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).flatten(1, 2) for part in layer.qkv(h).chunk(3, -1))
    place = torch.cartesian_prod(torch.arange(3), torch.arange(4)).double()
    m = torch.tensor([math.log(1 - 2 ** (-2 - i)) for i in range(HEADS)], dtype=h.dtype)[:, None, None]
    logits = torch.einsum("bsnd,btnd->bnst", q, k) * WIDTH**-0.5 + m * torch.cdist(place, place, p=1)
    y = torch.einsum("bnst,btnd->bsnd", logits.softmax(-1), v).reshape(h.shape) + layer.lce(v.reshape(h.shape))
    torch.testing.assert_close(layer(h, h), layer.proj(y * layer.gate(h).sigmoid()), rtol=1e-10, atol=1e-10)


def test_rotation_depends_on_the_place_in_the_window() -> None:
    layer = GatedRetention(DIM, HEADS, 3, 1, rotation=True, dtype=torch.float64)
    plain = GatedRetention(DIM, HEADS, 3, 1, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    h = torch.randn(1, 9, 9, DIM, dtype=torch.float64)
    got = layer(h, h)
    assert not torch.allclose(got, plain(h, h), atol=1e-4)
    nn.init.zeros_(layer.lce.weight)  # it would see the tokens around the window
    # Moved by whole windows, an inner window's tokens come out the same.
    rolled = h.roll((3, 3), (1, 2))
    got, moved = layer(h, h), layer(rolled, rolled)
    torch.testing.assert_close(moved[:, 4:7, 4:7], got[:, 1:4, 1:4])


def test_slopes_are_balanced() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    want = torch.tensor([2**-4, 2**-8, -(2**-4), -(2**-8)], dtype=torch.float64)
    torch.testing.assert_close(balanced_slopes(4, False, like), want)
    want = torch.tensor([0.5, 0.25, -0.5], dtype=torch.float64)
    torch.testing.assert_close(balanced_slopes(3, True, like), want)
    assert balanced_slopes(8, False, like.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", [SwatRetention, GatedRetention])
@pytest.mark.parametrize(
    "choices", [{}, {"rotation": True, "pad_first": True}, {"decomposed": False, "adaptive_window": "divisor"}], ids=str
)
def test_scripts_and_is_a_leaf_for_tracing(kind: type, choices: dict[str, Any]) -> None:
    layer = kind(16, 2, 3, 1, **choices)
    h, x = torch.randn(2, 2, 5, 8, 16).unbind(0)
    torch.testing.assert_close(torch.jit.script(layer)(h, x), layer(h, x))
    assert is_notrace_module(kind)


@pytest.mark.parametrize("kind", [SwatRetention, GatedRetention])
def test_factory_arguments_reach_every_parameter(kind: type) -> None:
    layer = kind(16, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert not list(layer.buffers())


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (SwatRetention, {"num_heads": 5}, "dim is 24, num_heads 5"),
        (SwatRetention, {"num_heads": 3, "odd_heads": False}, "num_heads is 3"),
        (SwatRetention, {"decay_form": "both"}, "decay_form is 'both'; allowed: bias_and_decay, slopes"),
        (SwatRetention, {"slope_base": "linear"}, "slope_base is 'linear'"),
        (SwatRetention, {"output_norm": "batch"}, "output_norm is 'batch'"),
        (SwatRetention, {"gate_target": "key"}, "gate_target is 'key'"),
        (SwatRetention, {"signed_slopes": True, "decay_form": "slopes"}, "signed_slopes is True"),
        (SwatRetention, {"shift_size": 7}, r"shift_size is \(7, 7\)"),
        (SwatRetention, {"num_heads": 8, "rotation": True}, "even width"),
        (GatedRetention, {"window_size": 0}, "window_size is 0"),
        (GatedRetention, {"adaptive_window": "shrink"}, "adaptive_window is 'shrink'"),
        (GatedRetention, {"gate_input": "raw"}, "gate_input is 'raw'"),
        (GatedRetention, {"gate_granularity": "token"}, "gate_granularity is 'token'"),
        (GatedRetention, {"initial_value": 0}, "initial_value is 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_named(kind: type, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(DIM, **{"num_heads": HEADS, **kwargs})
