"""Context window attention: the reference against the written-out definition, operator and kernels against it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from _cuda_graphs import assert_a_cuda_graph_repeats
from _exactness import allowed_error, error_in_norm
from _seeds import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.context_window_attention import context_window_attention
from vitrail.layers.varying_window import context_grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    """Shapes of q and k, the window and the context windows' places, in any order and overlapping at will."""
    window = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    size = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    context = tuple(draw(st.integers(n, n + 5)) for n in window)
    starts = [
        draw(st.lists(st.integers(0, c - n), min_size=math.ceil(s / n), max_size=math.ceil(s / n)))
        for n, s, c in zip(window, size, context, strict=True)
    ]
    batch, heads, dim = (draw(st.integers(1, high)) for high in (2, 3, 5))
    return {
        "q": (batch, *size, heads, dim),
        "k": (batch, *context, heads, dim),
        "places": {"window_size": window, "row_starts": starts[0], "column_starts": starts[1]},
    }


def make_inputs(call: dict[str, object], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(call[name], dtype=dtype) for name in ("q", "k", "k")]


def by_definition(q: Tensor, k: Tensor, v: Tensor, scale: float, places: dict[str, object]) -> Tensor:
    """One query at a time: softmax over the keys of the context window that its own window is given."""
    (height, width), rows, columns = places["window_size"], places["row_starts"], places["column_starts"]
    out = torch.empty_like(q)
    for y in range(q.shape[1]):
        for x in range(q.shape[2]):
            top, left = rows[y // height], columns[x // width]
            keys = k[:, top : top + height, left : left + width]
            values = v[:, top : top + height, left : left + width]
            logits = scale * (q[:, y, x, None, None] * keys).sum(-1)  # (B, height, width, heads)
            weights = logits.exp() / logits.exp().sum((1, 2), keepdim=True)
            out[:, y, x] = (weights[..., None] * values).sum((1, 2))
    return out


@settings(max_examples=60)
@given(call=calls(), scale=st.sampled_from([None, 0.3, 2.0]))
def test_reference_is_the_definition(call: dict[str, object], scale: float | None) -> None:
    q, k, v = make_inputs(call)
    want = by_definition(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, call["places"])
    got = context_window_attention(q, k, v, **call["places"], scale=scale)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(call=calls())
def test_operator_and_its_gradients_agree_with_the_reference(call: dict[str, object]) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(call)]
    want = context_window_attention(*inputs, **call["places"], scale=0.7)
    by_op = torch.ops.vitrail.context_window_attention(*inputs, *call["places"].values(), 0.7)
    assert torch.equal(by_op, want)
    grad = torch.randn_like(want)
    for got, gradient in zip(
        torch.autograd.grad(by_op, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-12)


PLACES = {"window_size": (2, 3), "row_starts": [1, 0, 3], "column_starts": [2, 0]}


def small_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Windows cut off at the bottom and right, contexts that overlap and that are read twice."""
    return [torch.randn(shape, dtype=dtype) for shape in ((2, 5, 4, 2, 4), (2, 6, 5, 2, 4), (2, 6, 5, 2, 4))]


def by_op(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> Tensor:
    return torch.ops.vitrail.context_window_attention(q, k, v, *PLACES.values(), scale)


def test_gradients_are_the_derivatives() -> None:
    inputs = [x[..., :2].contiguous().requires_grad_() for x in small_inputs()]
    assert torch.autograd.gradcheck(lambda *x: context_window_attention(*x, **PLACES), inputs)
    assert torch.autograd.gradcheck(by_op, inputs)


def test_only_wanted_gradients_are_returned() -> None:
    q, k, v = small_inputs()
    k.requires_grad_()
    by_op(q, k, v).sum().backward()
    assert k.grad is not None
    assert q.grad is None


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_registration(contiguous: bool) -> None:
    inputs = [x if contiguous else x.transpose(1, 2).contiguous().transpose(1, 2) for x in small_inputs(torch.float32)]
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.vitrail.context_window_attention, (*leaves, *PLACES.values(), 0.5))


def test_shared_keys_and_values_may_be_slices_of_one_map() -> None:
    q, k, v = small_inputs()
    packed = torch.stack((k, v), 3)
    out = context_window_attention(q, *packed.unbind(3), **PLACES)
    assert torch.equal(out, context_window_attention(q, k, v, **PLACES))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_sums_overlapping_gradients_in_float32(dtype: torch.dtype) -> None:
    # 64 windows read the same context: its gradient is a sum of 64 terms.
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in ((1, 16, 16, 1, 8), (1, 2, 2, 1, 8), (1, 2, 2, 1, 8)))
    places = ((2, 2), [0] * 8, [0] * 8, 0.5)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    torch.ops.vitrail.context_window_attention(*leaves, *places).sum().backward()
    torch.ops.vitrail.context_window_attention(*wide, *places).sum().backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_autocast_rounds_the_inputs_and_nothing_else() -> None:
    q, k, v = small_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = context_window_attention(q, k, v, **PLACES)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, context_window_attention(*(x.bfloat16() for x in (q, k, v)), **PLACES))


def test_empty_batch() -> None:
    inputs = [x[:0].requires_grad_() for x in small_inputs()]
    out = context_window_attention(*inputs, **PLACES)
    assert out.shape == (0, 5, 4, 2, 4)
    out.sum().backward()
    assert by_op(*inputs).shape == out.shape


def test_compiles_in_one_graph_with_any_batch() -> None:
    compiled = torch.compile(lambda *x: context_window_attention(*x, **PLACES), fullgraph=True, backend="aot_eager")
    for batch in (2, 5):
        inputs = [x[:1].repeat(batch, 1, 1, 1, 1) for x in small_inputs()]
        torch.testing.assert_close(compiled(*inputs), context_window_attention(*inputs, **PLACES))


@needs_triton
def test_fused_compiles_in_one_graph(small_tiles: None) -> None:
    (q, k, v), grad, places = random_call(random.Random(2), (2, 3), 1, 16, torch.float32)

    def run(*inputs: Tensor) -> Tensor:
        return context_window_attention(*inputs, **places, backend="triton")

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    assert all(torch.equal(a, b) for a, b in zip(got, results([q, k, v], grad, places, "triton"), strict=True))


def test_flops_are_those_of_whole_windows() -> None:
    inputs = [x.float().requires_grad_() for x in small_inputs()]
    product = 2 * (2 * 6) * 2 * 6 * 6 * 4  # multiply-adds of windows, heads, tokens, tokens, channels
    for function in (lambda *x: context_window_attention(*x, **PLACES), by_op):
        with FlopCounterMode(display=False) as counter:
            out = function(*inputs)
        assert counter.get_total_flops() == 2 * product
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 5 * product


def test_choice_is_recorded_and_what_the_kernels_do_not_take_is_named() -> None:
    inputs = small_inputs()
    with record_choices() as choices:
        context_window_attention(*inputs, **PLACES)
    assert [(c.op, c.backend) for c in choices] == [("context_window_attention", "eager")]
    with pytest.raises(NotImplementedError, match=r"context_window_attention.*Triton"):
        context_window_attention(*inputs, **PLACES, backend="triton")


@needs_triton
def test_too_many_windows_are_named_and_computed_by_the_reference() -> None:
    q, k, v = (torch.randn(1, 1, width, 1, 16, device=DEVICE, requires_grad=True) for width in (33, 2, 2))
    places = {"window_size": (1, 1), "row_starts": [0], "column_starts": [0, 1, 1] * 11}
    with pytest.raises(NotImplementedError, match=r"up to 32 windows along an axis, the map has \(1, 33\)"):
        context_window_attention(q, k, v, **places, backend="triton")
    out = torch.ops.vitrail.context_window_attention(q, k, v, *places.values(), 0.25)
    assert torch.equal(out, context_window_attention(q, k, v, **places))
    out.sum().backward()


def results(inputs: list[Tensor], grad: Tensor, places: dict[str, object], backend: str) -> list[Tensor]:
    """The result and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = context_window_attention(*leaves, **places, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_exact(inputs: list[Tensor], grad: Tensor, places: dict[str, object]) -> None:
    """The fused operator is at most twice as far from the truth as the eager one; a schedule changes nothing."""
    truth = results([x.double() for x in inputs], grad.double(), places, "eager")
    eager, fused = (results(inputs, grad, places, backend) for backend in ("eager", "triton"))
    for exact, ours, theirs in zip(truth, fused, eager, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()
        assert ours.isfinite().all()
        assert error_in_norm(ours, exact) <= allowed_error(exact, theirs, grad.dtype)
    if DEVICE == "cuda":
        assert all(torch.equal(a, b) for a, b in zip(fused, results(inputs, grad, places, "triton"), strict=True))


def random_call(
    draw: random.Random, window: tuple[int, int], most_windows: int, dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, dict[str, object]]:
    """Inputs, gradient and places: windows cut off, contexts at will, k and v slices of one map or of any strides."""
    n_windows = [draw.randint(1, most_windows) for _ in window]
    size = [(n - 1) * length + draw.randint(1, length) for n, length in zip(n_windows, window, strict=True)]
    context = [length + draw.randint(0, 2) for length in window]
    starts = [
        [draw.randint(0, c - length) for _ in range(n)]
        for n, length, c in zip(n_windows, window, context, strict=True)
    ]  # fmt: skip
    batch, heads = draw.choice([(1, 3), (2, 1)])
    q, grad = torch.randn(2, batch, *size, heads, dim, dtype=torch.float64).to(DEVICE, dtype).unbind(0)
    k, v = torch.randn(batch, *context, 2, heads, dim, dtype=torch.float64).to(DEVICE, dtype).unbind(3)
    if draw.random() < 0.3:
        q, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, grad))
    if draw.random() < 0.2:
        k = k.transpose(3, 4).contiguous().transpose(3, 4)
    return [q, k, v], grad, {"window_size": window, "row_starts": starts[0], "column_starts": starts[1]}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and blocks of channels on a small map."""
    triton = pytest.importorskip("vitrail.kernels.context_window_attention.triton")
    small = {16: triton.Tiles(16, 16, triton.Config(1, 1))}
    tiles = {dtype: dict.fromkeys(by_kernel, small) for dtype, by_kernel in triton.TILES.items()}
    monkeypatch.setattr(triton, "TILES", tiles)
    monkeypatch.setattr(triton, "_LEAST_STARTS", 2)
    monkeypatch.setattr(triton, "_SUM_TILE", 64)


_DTYPES = pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)


@needs_triton
@_DTYPES
@pytest.mark.parametrize("window", [(2, 3), (3, 7), (1, 16)], ids=str)
@pytest.mark.parametrize("seed", seeds(1))
def test_fused_is_as_exact_as_eager(
    seed: int, window: tuple[int, int], dtype: torch.dtype, poison: None, small_tiles: None
) -> None:
    assert_exact(*random_call(random.Random(f"{seed}{window}"), window, 3 if window == (2, 3) else 2, 16, dtype))


@needs_triton
def test_fused_adds_up_what_many_windows_see(poison: None) -> None:
    # 16 windows, 9 keys that up to all of them see, with the tiles of large maps.
    q, grad = torch.randn(2, 1, 8, 8, 1, 16, device=DEVICE).unbind(0)
    k, v = torch.randn(2, 1, 3, 3, 1, 16, device=DEVICE).unbind(0)
    assert_exact([q, k, v], grad, {"window_size": 2, "row_starts": [0, 1, 0, 1], "column_starts": [1, 0, 0, 0]})


@needs_triton
@pytest.mark.parametrize("seen", ["nothing", "no image"])
def test_fused_of_empty_maps(seen: str) -> None:
    shapes = ((1, 0, 4, 1, 16), (1, 2, 2, 1, 16)) if seen == "nothing" else ((0, 2, 4, 1, 16), (0, 2, 2, 1, 16))
    q, k = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    places = {"window_size": 2, "row_starts": [0] * (shapes[0][1] // 2), "column_starts": [0, 0]}
    out = context_window_attention(q, k, k, **places, backend="triton")
    out.sum().backward()
    assert out.shape == q.shape
    assert torch.equal(k.grad, torch.zeros_like(k))


@needs_triton
def test_every_supported_call_has_tiles() -> None:
    from vitrail.kernels.context_window_attention import op, triton

    for dtype, by_kernel in triton.TILES.items():
        for dim in op.HEAD_DIMS:
            q = torch.zeros(1, 9, 9, 1, dim, dtype=dtype, device=DEVICE)
            assert op.fused_support(q, [0], [0]).ok
            problem = triton._Problem(q, (9, 9), [0], [0], 1.0)
            assert all(min(problem.tiles(kernel)[:2]) >= 16 for kernel in by_kernel)


@needs_triton
def test_registration_of_the_kernels(small_tiles: None) -> None:
    (q, k, v), _, places = random_call(random.Random(1), (2, 3), 1, 16, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.vitrail.context_window_attention, (*leaves, *places.values(), 0.5))


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("seed", seeds(60))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    draw = random.Random(seed)
    window = (draw.randint(1, 17), draw.randint(1, 17))
    assert_exact(*random_call(draw, window, 9, draw.choice([16, 32, 64, 128, 256, 512]), dtype))


def vwformer_call(
    size: tuple[int, int], ratio: int, heads: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, dict[str, object]]:
    """Inputs, gradient and places of VWFormer's attention with one of its ratios on a map of 512 channels."""
    window = tuple(math.ceil(n / 8) for n in size)
    grids = [context_grid(w, ratio, math.ceil(n / w)) for w, n in zip(window, size, strict=True)]
    context = [max(grid.token_starts) + w for grid, w in zip(grids, window, strict=True)]
    q, grad = torch.randn(2, 2, *size, heads, 512 // heads, device=DEVICE).to(dtype).unbind(0)
    k, v = torch.randn(2, *context, 2, heads, 512 // heads, device=DEVICE).to(dtype).unbind(3)
    places = {"window_size": window, "row_starts": grids[0].token_starts, "column_starts": grids[1].token_starts}
    return [q, k, v], grad, places


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 64), (64, 256), (61, 83)], ids=str)
@pytest.mark.parametrize("heads", [1, 16])
def test_fused_on_vwformers_maps(heads: int, size: tuple[int, int], ratio: int, dtype: torch.dtype) -> None:
    assert_exact(*vwformer_call(size, ratio, heads, dtype))


@pytest.mark.gpu
def test_fused_runs_in_a_cuda_graph() -> None:
    call = vwformer_call((64, 64), 8, 16, torch.bfloat16)
    assert_a_cuda_graph_repeats(lambda: results(*call, "triton"))


def test_bad_arguments_are_named() -> None:
    q, k, v = small_inputs()
    with pytest.raises(ValueError, match=r"q has shape \(5, 4, 2, 4\)"):
        context_window_attention(q[0], k, v, **PLACES)
    with pytest.raises(ValueError, match=r"k has shape \(1, 6, 5, 2, 4\)"):
        context_window_attention(q, k[:1], v[:1], **PLACES)
    with pytest.raises(ValueError, match=r"v has shape \(2, 5, 5, 2, 4\)"):
        context_window_attention(q, k, v[:, 1:], **PLACES)
    with pytest.raises(ValueError, match=r"k has dtype torch\.float32"):
        context_window_attention(q, k.float(), v.float(), **PLACES)
    with pytest.raises(TypeError, match=r"q is torch\.int64"):
        context_window_attention(q.long(), k.long(), v.long(), **PLACES)
    with pytest.raises(ValueError, match="window_size is 0"):
        context_window_attention(q, k, v, **{**PLACES, "window_size": 0})
    with pytest.raises(ValueError, match="row_starts has 2 entries; expected 3"):
        context_window_attention(q, k, v, **{**PLACES, "row_starts": [0, 1]})
    with pytest.raises(ValueError, match=r"row_starts is \[0, 1, 5\]; allowed: 0 to 4"):
        context_window_attention(q, k, v, **{**PLACES, "row_starts": [0, 1, 5]})
    with pytest.raises(ValueError, match=r"column_starts is \[-1, 0\]; allowed: 0 to 2"):
        context_window_attention(q, k, v, **{**PLACES, "column_starts": [-1, 0]})
