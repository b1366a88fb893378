"""Varying window attention: the shared grid against unfolded contexts, at any size of the map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features_fx import is_notrace_module
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.layers.varying_window import VaryingWindowAttention, context_grid, copy_shift_pad
from vitrail.tools._common.literal_vwformer import literal_attention

RATIOS = st.sampled_from([2, 4, 8])


def make_layer(ratio: int, **kwargs: object) -> VaryingWindowAttention:
    """64 channels in float64; every parameter and statistic is drawn, so that nothing is hidden behind a zero."""
    layer = VaryingWindowAttention(64, ratio, dtype=torch.float64, **kwargs).eval()
    for name, value in layer.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.3)
    return layer


@settings(max_examples=25)
@given(
    ratio=RATIOS,
    window=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads=st.sampled_from([1, 4]),
    flags=st.tuples(*[st.booleans()] * 3),
)
def test_equals_unfolded_contexts(
    ratio: int, window: tuple[int, int], heads: int, flags: tuple[bool, bool, bool]
) -> None:
    layer = make_layer(ratio, num_heads=heads, reduce_bias=flags[0], out_norm=flags[1], shortcut=flags[2])
    x = torch.randn(2, 64, 8 * window[0], 8 * window[1], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), literal_attention(layer, x), rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(ratio=RATIOS, height=st.integers(1, 40), width=st.integers(1, 40))
def test_other_sizes_continue_the_map(ratio: int, height: int, width: int) -> None:
    layer = make_layer(ratio, shortcut=True)
    x = torch.randn(1, 64, height, width, dtype=torch.float64)
    continued = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    with torch.no_grad():
        want = literal_attention(layer, continued)[:, :, :height, :width]
        torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(16, 24), (13, 21)], ids=str)
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_gradients_equal_those_of_unfolded_contexts(ratio: int, size: tuple[int, int]) -> None:
    layer = make_layer(ratio, out_norm=True, num_heads=2)
    x = torch.randn(2, 64, *size, dtype=torch.float64, requires_grad=True)
    height, width = size
    continued = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    grad = torch.randn(2, 64, *size, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x), leaves, grad)
    want = torch.autograd.grad(literal_attention(layer, continued)[:, :, :height, :width], leaves, grad)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("window", "ratio", "left", "right"),
    [  # the windows that the authors' code copies, as (first, last) index
        (8, 2, (12, 15), (48, 51)),
        (8, 4, (20, 31), (32, 43)),
        (8, 8, (36, 63), (0, 27)),
        (5, 2, (7, 9), (30, 32)),
    ],
)
def test_copy_shift_padding(window: int, ratio: int, left: tuple[int, int], right: tuple[int, int]) -> None:
    x = torch.arange(8 * window)
    want = [*range(left[0], left[1] + 1), *x.tolist(), *range(right[0], right[1] + 1)]
    assert copy_shift_pad(x, window, ratio, 0).tolist() == want
    assert torch.equal(copy_shift_pad(x.expand(2, -1), window, ratio, 1), torch.tensor(want).expand(2, -1))


@settings(max_examples=60)
@given(window=st.integers(1, 40), ratio=RATIOS, n_windows=st.integers(1, 8))
def test_grid_gives_each_window_its_own_pixels(window: int, ratio: int, n_windows: int) -> None:
    grid = context_grid(window, ratio, n_windows)
    first_pixels = [start + ratio * i for start, length in grid.pieces for i in range(length // ratio)]
    for index, token in enumerate(grid.token_starts):
        own = first_pixels[token : token + window]
        assert own == [index * window + ratio * i for i in range(window)]
    assert len(first_pixels) == len(set(first_pixels))  # no token is computed twice
    assert all(start + length <= (n_windows - 1 + ratio) * window for start, length in grid.pieces)


@pytest.mark.parametrize(("ratio", "tokens"), [(2, 36), (4, 22), (8, 15)])
def test_keys_and_values_are_shared(ratio: int, tokens: int) -> None:
    # 64 x 64 pixels in windows of 8: the contexts alone would have 64 x 64 tokens.
    assert context_grid(8, ratio, 8).pieces == [(0, tokens * ratio)]
    layer, x = make_layer(ratio), torch.randn(1, 64, 64, 64, dtype=torch.float64)
    shared = {}
    layer.kv.register_forward_hook(lambda _, __, out: shared.update(out=out))
    with torch.no_grad():
        layer(x)
    assert shared["out"].shape == (1, 128, tokens, tokens)


def test_flops() -> None:
    layer = VaryingWindowAttention(512, 4, device="meta")
    x = torch.randn(1, 512, 64, 64, device="meta")
    counts = []
    for function in (layer, lambda x: literal_attention(layer, x)):
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            function(x)
        counts.append(counter.get_total_flops())
    pixelwise, attention = 2 * 512 * 512 * 64 * 64, 2 * 512 * 64**3
    assert counts[1] == 5 * pixelwise + 2 * attention  # reduction, queries, keys, values, projection
    assert counts[0] == counts[1] - 2 * pixelwise + 2 * 2 * 512 * 512 * 22 * 22


def test_trains_in_half_precision_and_with_batch_statistics() -> None:
    layer = VaryingWindowAttention(64, 2, out_norm=True).train()
    nn.init.ones_(layer.norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 64, 19, 16))
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_initially_a_normed_attention_adds_nothing() -> None:
    layer, x = VaryingWindowAttention(64, 4, out_norm=True, shortcut=True), torch.randn(2, 64, 16, 16)
    assert torch.equal(layer(x), x)
    layer = VaryingWindowAttention(512, 2)
    assert layer.q.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.kv.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)


def _compiled(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


def _exported(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()(x)


@pytest.mark.parametrize("run", [_compiled, _exported])
def test_compiles_and_exports(run: object) -> None:
    layer, x = VaryingWindowAttention(64, 4, 2).eval(), torch.randn(2, 64, 17, 24)
    with torch.no_grad():
        torch.testing.assert_close(run(layer, x), layer(x))


def test_is_a_leaf_for_tracing() -> None:
    assert is_notrace_module(VaryingWindowAttention)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 3), "ratio is 3"),
        ((64, 16), "n_windows 8"),
        ((60, 4), "dim 60"),
        ((64, 2, 5), "num_heads 5"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VaryingWindowAttention(*arguments)
