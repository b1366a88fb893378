"""The ELA layer against the author's outputs and a literal definition; its forms, numbers and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _golden import load_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features_fx import is_notrace_module
from torch import Tensor, nn

from vitrail.layers.strip import FORMS, EfficientLocalAttention

# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 3.0


@pytest.mark.parametrize("form", FORMS)
def test_golden(golden_dir: Path, form: str) -> None:
    case = load_case(golden_dir, f"ela_{form}_256")
    for dtype in (torch.float64, torch.float32):
        layer = EfficientLocalAttention(256, form, dtype=dtype)
        layer.load_state_dict({name: value.to(dtype) for name, value in case.weights.items()})
        with torch.no_grad():
            logits = layer.strip_logits(case.image.to(dtype))
            output = layer(case.image.to(dtype))
        if dtype == torch.float64:
            errors = case.relative_errors({"output": output})
            for name, strip in zip(("gate_h", "gate_w"), logits, strict=True):
                errors[name] = relative_error(strip.sigmoid()[:, ::5], case.expected[name], 1.0)
            assert max(errors.values()) < 1e-8, errors
        else:
            difference = (output[:, ::5, ::3, ::3].double() - case.expected["output"]).abs().max().item()
            assert difference < FLOAT32_FACTOR * case.info["float32_max_abs_diff"]["output"]


def convolve_and_normalise(strip: Tensor, layer: EfficientLocalAttention) -> Tensor:
    """The strip of one image, (C, L), through the shared convolution and normalisation, written out."""
    channels, length = strip.shape
    per_group, kernel_size = layer.conv.weight.shape[1:]
    padded = F.pad(strip, (kernel_size // 2, kernel_size // 2))
    convolved = torch.empty_like(strip)
    for c in range(channels):
        first = c // per_group * per_group
        for i in range(length):
            convolved[c, i] = (layer.conv.weight[c] * padded[first : first + per_group, i : i + kernel_size]).sum()
    groups = convolved.reshape(layer.gn.num_groups, -1)
    centred = groups - groups.mean(1, keepdim=True)
    normalised = (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()).reshape(channels, length)
    return normalised * layer.gn.weight[:, None] + layer.gn.bias[:, None]


def randomised(dim: int, form: str, skip: bool = False) -> EfficientLocalAttention:
    layer = EfficientLocalAttention(dim, form, skip, dtype=torch.float64)
    nn.init.normal_(layer.gn.weight)
    nn.init.normal_(layer.gn.bias)
    return layer


@settings(max_examples=10)
@given(
    form=st.sampled_from(sorted(FORMS)),
    groups=st.integers(1, 2),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    skip=st.booleans(),
)
def test_layer_is_the_definition(form: str, groups: int, size: tuple[int, int], skip: bool) -> None:
    layer = randomised(32 * groups, form, skip)
    x = torch.randn(2, 32 * groups, *size, dtype=torch.float64) + torch.randn(2, 32 * groups, 1, 1).double()
    with torch.no_grad():
        for image, got in zip(x, layer(x), strict=True):
            gate_h = 1 / (1 + (-convolve_and_normalise(image.mean(2), layer)).exp())
            gate_w = 1 / (1 + (-convolve_and_normalise(image.mean(1), layer)).exp())
            want = image * gate_h[:, :, None] * gate_w[:, None, :] + (image if skip else 0)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=10)
@given(form=st.sampled_from(sorted(FORMS)), size=st.tuples(st.integers(2, 20), st.integers(2, 20)))
def test_rows_and_columns_are_treated_alike(form: str, size: tuple[int, int]) -> None:
    layer = randomised(32, form)
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x.mT), layer(x).mT, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_derivatives() -> None:
    layer = randomised(16, "l", skip=True)
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize(("form", "parameters"), [("t", 1792), ("b", 2304), ("s", 10752), ("l", 14848)])
def test_parameters_are_the_authors(form: str, parameters: int) -> None:
    layer = EfficientLocalAttention(256, form, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert list(layer.state_dict()) == ["conv.weight", "gn.weight", "gn.bias"]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (400, 3)], ids=str)
def test_any_size(size: tuple[int, int]) -> None:
    layer = randomised(32, "s")
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    assert layer(x).isfinite().all()
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_means_of_long_float16_rows_keep_their_digits() -> None:
    # Sums of 400 values of 300 leave float16's range; their means differ by 1/2, where float16 has steps of 1/4.
    # The zeros beyond the ends of a strip make most of the deviation that the logits are divided by.
    x = 300 + 10 * torch.randn(1, 16, 400, 420)
    layer = EfficientLocalAttention(16, "b")
    for got, want in zip(layer.strip_logits(x.half()), layer.strip_logits(x), strict=True):
        assert (got - want).abs().mean() < 1e-3


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_scripts_and_is_a_leaf_for_tracing(skip: bool) -> None:
    layer = EfficientLocalAttention(32, "t", skip)
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    assert is_notrace_module(EfficientLocalAttention)


def test_bfloat16_and_autocast_return_the_dtype_of_the_map() -> None:
    layer = EfficientLocalAttention(32, "l")
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    for got in (out, layer.bfloat16()(x.bfloat16())):
        assert got.dtype == torch.bfloat16
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_factory_arguments_reach_every_parameter() -> None:
    layer = EfficientLocalAttention(32, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((144, "t"), "dim is 144; form 't' takes multiples of 32"),
        ((24, "b"), "dim is 24; form 'b' takes multiples of 16"),
        ((8, "l"), "dim is 8; form 'l' takes multiples of 16"),
        ((0, "s"), "dim is 0"),
        ((32, "x"), "form is 'x'; allowed: 't', 'b', 's', 'l'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: tuple[int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientLocalAttention(*arguments)
