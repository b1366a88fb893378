"""The varied-size window layer against the three forms of the authors, written out in their normalised coordinates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features_fx import is_notrace_module
from torch import Tensor, nn

from vitrail.layers.varied_window import OFFSET_NORMS, PADDINGS, VariedWindowAttention
from vitrail.layers.window import WindowAttention

FORMS = [("end", "padded"), ("end", "floor"), ("center", "floor_swapped")]
WINDOW = 3


def make_layer(dim: int = 8, heads: int = 2, window: int = WINDOW, **kwargs: object) -> VariedWindowAttention:
    """A layer in float64 whose windows vary as much as a trained one's may."""
    layer = VariedWindowAttention(dim, heads, window, dtype=torch.float64, **kwargs)
    nn.init.normal_(layer.transform.weight)
    nn.init.normal_(layer.transform.bias, std=0.5)
    nn.init.normal_(layer.relative_position_bias_table)
    return layer


def as_released(layer: VariedWindowAttention, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C'), by padding, a grid in [-1, 1], `grid_sample` and a table index."""
    (batch, h, w, _), n, heads = x.shape, layer.window_size[0], layer.num_heads
    pad_h, pad_w = -h % n, -w % n
    top, left = (pad_h // 2, pad_w // 2) if layer.padding == "center" else (0, 0)
    pads = (left, pad_w - left, top, pad_h - top)
    full_h, full_w = h + pad_h, w + pad_w
    rows, columns = full_h // n, full_w // n
    over_x, over_y = {
        "padded": (columns, rows),
        "floor": (w // n, h // n),
        "floor_swapped": (h // n, w // n),
    }[layer.offset_norm]

    image = x.permute(0, 3, 1, 2)
    pooled = F.leaky_relu(F.avg_pool2d(F.pad(image, pads), n), 0.01)
    predicted = F.conv2d(pooled, layer.transform.weight[..., None, None], layer.transform.bias)
    predicted = predicted.reshape(batch * heads, 4, rows, columns)
    grids = []
    for axis, (count, size) in enumerate(((columns, full_w), (rows, full_h))):
        pixels = torch.linspace(-1, 1, size, dtype=x.dtype).view(count, n)
        centre = pixels.mean(1)
        inner = (2 * torch.arange(n, dtype=x.dtype) - (n - 1)) / (size - 1)
        shift = predicted[:, axis] / (over_x, over_y)[axis]
        scale = 1 + predicted[:, 2 + axis]
        where = centre if axis == 0 else centre[:, None]
        grids.append((where + shift)[..., None] + scale[..., None] * inner)  # (B * heads, rows, columns, n)
    grid_x = grids[0][:, :, None].expand(-1, -1, n, -1, -1).reshape(batch * heads, full_h, full_w)
    grid_y = grids[1].transpose(2, 3).reshape(batch * heads, full_h, columns).repeat_interleave(n, 2)

    qkv = F.conv2d(image, layer.qkv.weight[..., None, None], layer.qkv.bias)
    q, k, v = F.pad(qkv, pads).reshape(batch, 3, heads, -1, full_h, full_w).unbind(1)
    k, v = (
        F.grid_sample(y.flatten(0, 1), torch.stack((grid_x, grid_y), -1), align_corners=True).view_as(y) for y in (k, v)
    )

    def cut(y: Tensor) -> Tensor:  # (B, heads, D, H', W') -> (B, heads, rows, columns, n * n, D)
        return y.unflatten(4, (columns, n)).unflatten(3, (rows, n)).permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5)

    places = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    delta = places[:, None] - places[None] + n - 1
    bias = layer.relative_position_bias_table[delta[..., 0] * (2 * n - 1) + delta[..., 1]].permute(2, 0, 1)
    logits = cut(q) @ cut(k).transpose(-2, -1) * (x.shape[3] // heads) ** -0.5 + bias[:, None, None]
    out = (logits.softmax(-1) @ cut(v)).unflatten(4, (n, n)).permute(0, 2, 4, 3, 5, 1, 6)
    out = out.reshape(batch, full_h, full_w, -1)[:, top : top + h, left : left + w]
    return F.linear(out, layer.proj.weight, layer.proj.bias)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@settings(max_examples=12)
@given(size=st.tuples(st.integers(WINDOW, 13), st.integers(WINDOW, 13)), out_dim=st.sampled_from([None, 4, 12]))
def test_computes_what_the_authors_release(form: tuple[str, str], size: tuple[int, int], out_dim: int | None) -> None:
    layer = make_layer(out_dim=out_dim, padding=form[0], offset_norm=form[1])
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), as_released(layer, x), rtol=1e-10, atol=1e-10)


def test_default_form_takes_maps_below_one_window() -> None:
    layer = make_layer(window=7)
    for size in ((1, 1), (6, 8), (2, 40)):
        x = torch.randn(1, *size, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), as_released(layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS[1:], ids="-".join)
@pytest.mark.parametrize("size", [(6, 8), (8, 6)], ids=str)
def test_released_forms_refuse_maps_below_one_window(form: tuple[str, str], size: tuple[int, int]) -> None:
    layer = make_layer(window=7, padding=form[0], offset_norm=form[1])
    with pytest.raises(ValueError, match=rf"map is {size[0]} x {size[1]}, smaller than the window.*'{form[1]}'"):
        layer(torch.randn(1, *size, 8, dtype=torch.float64))


def test_forms_differ_only_where_the_map_is_no_multiple_of_the_window() -> None:
    layers = [make_layer(padding=p, offset_norm=n) for p, n in FORMS]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    square, other = (torch.randn(1, *size, 8, dtype=torch.float64) for size in ((9, 9), (10, 14)))
    for layer in layers[1:]:
        torch.testing.assert_close(layer(square), layers[0](square), rtol=1e-12, atol=1e-12)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (layers[a](other) - layers[b](other)).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(9, 12), (7, 7), (2, 5)], ids=str)
def test_new_layers_are_plain_windows(size: tuple[int, int]) -> None:
    varied = VariedWindowAttention(8, 2, WINDOW, qkv_bias=False, dtype=torch.float64)
    plain = WindowAttention(8, 2, WINDOW, qkv_bias=False, rel_pos_bias=True, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in varied.state_dict().items() if not k.startswith("transform.")})
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(varied(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 9), (7, 11)], ids=str)
def test_every_parameter_learns_from_the_start(size: tuple[int, int]) -> None:
    layer = VariedWindowAttention(8, 2, WINDOW)
    layer(torch.randn(2, *size, 8)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_gradients_are_those_of_the_released_form() -> None:
    layer = make_layer(padding="center", offset_norm="floor_swapped")
    x = torch.randn(2, 7, 10, 8, dtype=torch.float64)
    parameters = list(layer.parameters())
    got = torch.autograd.grad(layer(x).square().sum(), parameters)
    want = torch.autograd.grad(as_released(layer, x).square().sum(), parameters)
    for (name, _), a, b in zip(layer.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_coordinates_stay_in_float32(dtype: torch.dtype) -> None:
    layer = make_layer(dim=32, heads=4, window=7).float()
    x = torch.randn(1, 14, 333, 32)
    want = layer.predict_windows(x)
    with torch.autocast("cpu", dtype):
        got = layer.predict_windows(x)
        assert layer(x).dtype == dtype
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert {y.dtype for y in layer.to(dtype).predict_windows(x.to(dtype))} == {torch.float32}


def test_half_precision_forward_and_backward_are_finite() -> None:
    layer = make_layer(dim=16).to(torch.bfloat16)
    out = layer(torch.randn(2, 5, 8, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_scripts_and_is_a_leaf_for_tracing(form: tuple[str, str]) -> None:
    layer = make_layer(padding=form[0], offset_norm=form[1])
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    assert is_notrace_module(VariedWindowAttention)


def test_compiles_in_one_graph() -> None:
    layer = make_layer(padding="center").float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 7, 8)
    torch.testing.assert_close(compiled(x), layer(x))


def test_factory_arguments_reach_every_parameter() -> None:
    layer = VariedWindowAttention(16, 2, qkv_bias=False, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer.qkv.bias is None
    assert layer(torch.empty(2, 9, 5, 16, device="meta", dtype=torch.bfloat16)).shape == (2, 9, 5, 16)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "dim is 16, num_heads 3"),
        ({"out_dim": 9}, "dim is 9, num_heads 2"),
        ({"window_size": (7, 0)}, r"window_size is \(7, 0\)"),
        ({"padding": "right"}, f"padding is 'right'; allowed: {', '.join(PADDINGS)}"),
        ({"offset_norm": "ceil"}, f"offset_norm is 'ceil'; allowed: {', '.join(OFFSET_NORMS)}"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariedWindowAttention(**{"dim": 16, "num_heads": 2, **kwargs})
