"""Varied-size window attention: reference against written-out definition, operator and kernels against reference."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from _cuda_graphs import assert_a_cuda_graph_repeats
from _seeds import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.varied_window_attention import varied_window_attention, varied_window_attention_packed
from vitrail.kernels.window_attention import window_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


class Case(NamedTuple):
    batch: int
    size: tuple[int, int]
    heads: int
    dim: int
    window: tuple[int, int]
    start: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(math.ceil((n + s) / w) for n, s, w in zip(self.size, self.start, self.window, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    start = tuple(draw(st.integers(0, w - 1)) for w in window)
    sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
    return Case(draw(st.integers(1, 2)), draw(sizes), draw(st.integers(1, 3)), draw(st.integers(1, 4)), window, start)


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Inputs whose windows lie anywhere: inside, across a border, far outside; stretched, shrunk, mirrored."""
    generator = torch.Generator().manual_seed(seed)
    grid = (case.batch, *case.grid, case.heads, 2)
    tokens = case.window[0] * case.window[1]
    shapes = dict.fromkeys("qkv", (case.batch, *case.size, case.heads, case.dim))
    shapes |= {"offsets": grid, "stretch": grid, "bias": (case.heads, tokens, tokens)}
    inputs = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["offsets"] *= 3
    inputs["stretch"] += 1
    return {name: x.to(dtype) for name, x in inputs.items()}


def run(case: Case, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return varied_window_attention(**inputs, window_size=case.window, pad_start=case.start, **kwargs)


def run_op(case: Case, inputs: dict[str, Tensor], scale: float) -> Tensor:
    names = ("q", "k", "v", "offsets", "stretch", "bias")
    tensors = [inputs.get(name) for name in names]
    return torch.ops.vitrail.varied_window_attention(*tensors, case.window, case.start, scale)


def interpolate(image: Tensor, y: float, x: float) -> Tensor:
    """Value of (H, W, D) at (y, x): a sum over all pixels, each weighing 1 at its place and 0 a pixel away."""
    rows, columns = torch.arange(image.shape[0]), torch.arange(image.shape[1])
    weights = (1 - (rows - y).abs()).clamp(min=0)[:, None] * (1 - (columns - x).abs()).clamp(min=0)
    return (weights[..., None] * image).sum((0, 1))


def by_definition(case: Case, inputs: dict[str, Tensor], scale: float) -> Tensor:
    """One query at a time."""
    q, k, v, offsets, stretch = (inputs[name] for name in ("q", "k", "v", "offsets", "stretch"))
    (height, width), (top, left), bias = case.window, case.start, inputs.get("bias")
    out = torch.empty_like(q)
    places = [(i, j) for i in range(height) for j in range(width)]
    for b, head, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (case.batch, case.heads, *case.size))):
        row, column = (y + top) // height, (x + left) // width
        token = ((y + top) % height) * width + (x + left) % width
        move, factor = offsets[b, row, column, head], stretch[b, row, column, head]
        centre = (row * height - top + (height - 1) / 2, column * width - left + (width - 1) / 2)
        keys, values = [], []
        for i, j in places:
            at_y = centre[0] + move[0] + factor[0] * (i - (height - 1) / 2)
            at_x = centre[1] + move[1] + factor[1] * (j - (width - 1) / 2)
            keys.append(interpolate(k[b, :, :, head], at_y, at_x))
            values.append(interpolate(v[b, :, :, head], at_y, at_x))
        logits = scale * torch.stack(keys) @ q[b, y, x, head]
        logits = logits if bias is None else logits + bias[head, token]
        out[b, y, x, head] = logits.softmax(0) @ torch.stack(values)
    return out


@settings(max_examples=25)
@given(case=cases(), scale=st.sampled_from([None, 0.3, 2.0]), with_bias=st.booleans(), seed=st.integers(0, 99))
def test_reference_is_the_definition(case: Case, scale: float | None, with_bias: bool, seed: int) -> None:
    inputs = make_inputs(case, seed=seed)
    if not with_bias:
        del inputs["bias"]
    want = by_definition(case, inputs, case.dim**-0.5 if scale is None else scale)
    torch.testing.assert_close(run(case, inputs, scale=scale), want, rtol=1e-11, atol=1e-11)


@settings(max_examples=25)
@given(case=cases(), seed=st.integers(0, 99))
def test_unmoved_windows_are_ordinary_ones_padded_with_zeros(case: Case, seed: int) -> None:
    inputs = make_inputs(case._replace(start=(0, 0)), seed=seed)
    inputs["offsets"], inputs["stretch"] = torch.zeros_like(inputs["offsets"]), torch.ones_like(inputs["stretch"])
    got = varied_window_attention(**inputs, window_size=case.window)
    zeros = torch.zeros(case.heads, case.dim, dtype=torch.float64)
    plain = {name: inputs[name] for name in ("q", "k", "v", "bias")}
    want = window_attention(**plain, window_size=case.window, pad_k=zeros, pad_v=zeros)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(case=cases(), with_bias=st.booleans(), seed=st.integers(0, 99))
def test_operator_and_its_gradients_agree_with_the_reference(case: Case, with_bias: bool, seed: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs(case, seed=seed).items()}
    if not with_bias:
        del inputs["bias"]
    want, got = run(case, inputs, scale=0.7), run_op(case, inputs, 0.7)
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    leaves = list(inputs.values())
    for name, a, b in zip(
        inputs, torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("start", [(0, 0), (1, 2)], ids=str)
def test_gradients_are_the_derivatives(start: tuple[int, int]) -> None:
    case = Case(2, (3, 5), 2, 2, (2, 3), start)
    inputs = make_inputs(case, seed=3)
    names, leaves = list(inputs), [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *xs: run(case, dict(zip(names, xs, strict=True))), leaves)
    assert torch.autograd.gradcheck(lambda *xs: run_op(case, dict(zip(names, xs, strict=True)), 0.7), leaves)


@pytest.mark.parametrize("by_op", [True, False], ids=["op", "reference"])
def test_at_whole_coordinates_the_gradient_is_that_from_above(by_op: bool) -> None:
    # A freshly made layer predicts ordinary windows: all samples lie on pixels, where interpolation has a kink.
    case = Case(1, (6, 6), 1, 3, (3, 3), (0, 0))
    inputs = make_inputs(case)
    inputs["stretch"] = torch.ones_like(inputs["stretch"])
    inputs["offsets"] = torch.zeros_like(inputs["offsets"]).requires_grad_()
    function = run_op if by_op else lambda case, inputs, scale: run(case, inputs, scale=scale)
    (gradient,) = torch.autograd.grad(function(case, inputs, 0.7).sum(), inputs["offsets"])
    step = 1e-7
    for axis in (0, 1):
        moved = torch.zeros_like(gradient)
        moved[0, 1, 0, 0, axis] = step
        difference = run(case, {**inputs, "offsets": moved}, scale=0.7) - run(case, inputs, scale=0.7)
        assert gradient[0, 1, 0, 0, axis].item() == pytest.approx(difference.sum().item() / step, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("far", [7.5, 1e6, 1e30, math.inf])
@pytest.mark.parametrize("sign", [-1, 1])
def test_windows_outside_the_map_read_zeros(far: float, sign: int) -> None:
    case = Case(1, (4, 5), 2, 3, (2, 2), (0, 0))
    inputs = {name: x.requires_grad_() for name, x in make_inputs(case, torch.float32).items()}
    with torch.no_grad():
        inputs["offsets"].fill_(sign * far)
        inputs["stretch"].fill_(1)
    for out in (run(case, inputs), run_op(case, inputs, 0.5)):
        assert not out.any()
        for gradient in torch.autograd.grad(out.sum(), list(inputs.values())):
            assert not gradient.any()


def test_a_missing_coordinate_spoils_its_own_window_only() -> None:
    case = Case(1, (4, 4), 1, 2, (2, 2), (0, 0))
    inputs = make_inputs(case)
    inputs["offsets"][0, 0, 1] = math.nan
    bad = run(case, inputs).isnan()
    assert bad[:, :2, 2:].all()
    assert bad.sum() == 2 * 2 * 2


def test_only_wanted_gradients_are_returned() -> None:
    case = Case(1, (3, 4), 2, 4, (2, 2), (0, 0))
    inputs = make_inputs(case)
    inputs["offsets"].requires_grad_()
    run_op(case, inputs, 0.5).sum().backward()
    assert [name for name, x in inputs.items() if x.grad is not None] == ["offsets"]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_registration(contiguous: bool, with_bias: bool) -> None:
    case = Case(2, (3, 5), 2, 4, (2, 3), (1, 0))
    inputs = list(make_inputs(case, torch.float32).values())
    if not contiguous:
        inputs[:5] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:5]]
    leaves = [x.detach().requires_grad_() for x in inputs]
    arguments = (*leaves[:5], leaves[5] if with_bias else None, case.window, case.start, 0.5)
    torch.library.opcheck(torch.ops.vitrail.varied_window_attention, arguments)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
def test_packed_is_the_same_as_separate(backend: str) -> None:
    case = Case(1, (4, 5), 2, 16, (2, 3), (1, 0))
    inputs = {name: x.to(DEVICE).requires_grad_() for name, x in make_inputs(case, torch.float32).items()}
    tail = {name: inputs[name] for name in ("offsets", "stretch", "bias")}
    qkv = torch.stack([inputs[name] for name in "qkv"], 3).detach().requires_grad_()
    sizes = {"window_size": case.window, "pad_start": case.start, "scale": 0.7}
    got = varied_window_attention_packed(qkv, **tail, **sizes, backend=backend)
    want = varied_window_attention(**inputs, **sizes, backend=backend)
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    d_qkv, *d_tail = torch.autograd.grad(got, [qkv, *tail.values()], grad)
    d_inputs = torch.autograd.grad(want, list(inputs.values()), grad)
    for ours, theirs in zip((*d_qkv.unbind(3), *d_tail), d_inputs, strict=True):
        assert torch.equal(ours, theirs)


def test_packed_operator() -> None:
    case = Case(2, (3, 5), 2, 4, (2, 3), (1, 0))
    inputs = make_inputs(case, torch.float64)
    qkv = torch.stack([inputs[name] for name in "qkv"], 3)
    tail = [inputs[name].requires_grad_() for name in ("offsets", "stretch", "bias")]
    torch.library.opcheck(
        torch.ops.vitrail.varied_window_attention_packed,
        (qkv.requires_grad_(), *tail, case.window, case.start, 0.5),
    )
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 3, 5, 2, 2, 4\); expected \(2, 3, 5, 3, 2, 4\)"):
        varied_window_attention_packed(qkv[:, :, :, :2], *tail[:2], window_size=case.window)


def test_strided_inputs_change_nothing() -> None:
    case = Case(2, (5, 6), 3, 4, (2, 3), (1, 1))
    inputs = make_inputs(case)
    packed = torch.stack([inputs[name] for name in "qkv"], 3)
    strided = inputs | dict(zip("qkv", packed.unbind(3), strict=True))
    out = run(case, strided)
    assert out.is_contiguous()
    assert torch.equal(out, run(case, inputs))
    assert torch.equal(run_op(case, strided, 0.5), run_op(case, inputs, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_does_not_blur_coordinates(dtype: torch.dtype) -> None:
    # On a ramp 400 pixels wide, a coordinate in half precision would be off by up to a pixel, the sampled value too.
    case = Case(1, (1, 400), 1, 2, (1, 4), (0, 0))
    inputs = make_inputs(case)
    inputs["v"] = (torch.arange(400, dtype=torch.float64) % 8).view(1, 1, 400, 1, 1).expand(1, 1, 400, 1, 2)
    rounded = {name: x.to(dtype if name in "qkv" else torch.float32) for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in rounded.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in rounded.items()}
    out, want = run(case, leaves), run(case, wide)
    assert out.dtype == dtype
    assert (out.double() - want).abs().max() < 8 * 4 * torch.finfo(dtype).eps
    out.sum().backward()
    want.sum().backward()
    for name in ("offsets", "stretch"):
        assert leaves[name].grad.dtype == torch.float32
        scale = wide[name].grad.abs().max()
        torch.testing.assert_close(leaves[name].grad / scale, wide[name].grad.float() / scale, rtol=0, atol=0.05)


def test_autocast_rounds_q_k_and_v_only() -> None:
    case = Case(1, (6, 8), 2, 8, (3, 4), (0, 0))
    inputs = make_inputs(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(case, inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, run(case, inputs | {name: inputs[name].bfloat16() for name in "qkv"}))


def test_empty_batch() -> None:
    case = Case(0, (3, 4), 2, 8, (2, 2), (0, 0))
    inputs = {name: x.requires_grad_() for name, x in make_inputs(case).items()}
    for out in (run(case, inputs), run_op(case, inputs, 0.5)):
        assert out.shape == (0, 3, 4, 2, 8)
        out.sum().backward()
    assert inputs["offsets"].grad.shape == (0, 2, 2, 2, 2)


def test_compiles_in_one_graph_with_any_batch() -> None:
    compiled = torch.compile(varied_window_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 7):  # of no other axis
        case = Case(batch, (3, 4), 2, 8, (2, 2), (1, 0))
        inputs = make_inputs(case, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = compiled(**inputs, window_size=case.window, pad_start=case.start)
        torch.testing.assert_close(got, run(case, inputs))


def run_packed_op(case: Case, inputs: dict[str, Tensor], scale: float) -> Tensor:
    qkv = torch.stack([inputs[name] for name in "qkv"], 3)
    tail = (inputs["offsets"], inputs["stretch"], inputs["bias"])
    return torch.ops.vitrail.varied_window_attention_packed(qkv, *tail, case.window, case.start, scale)


@pytest.mark.parametrize("operator", [run_op, run_packed_op])
def test_flops_of_the_operator_are_those_of_the_reference(operator: Any) -> None:
    case = Case(2, (5, 7), 3, 8, (2, 3), (1, 0))
    inputs = {name: x.requires_grad_() for name, x in make_inputs(case, torch.float32).items()}
    counts = []
    for function in (run, lambda case, inputs: operator(case, inputs, 0.5)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(case, inputs)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * (2 * 3 * 3 * 3 * 6 * 6 * 8)] * 2
    with FlopCounterMode(display=False) as counter:
        operator(case, inputs, 0.5).sum().backward()
    assert counter.get_total_flops() == counts[0] * 7 // 2


# Between them tiles of pixels cut windows, windows are cut into chunks, and lists of windows end midway.
_FUSED = [
    Case(1, (9, 15), 2, 16, (7, 7), (3, 0)),
    Case(1, (10, 7), 1, 32, (5, 4), (0, 1)),
    Case(1, (4, 21), 2, 16, (2, 20), (1, 5)),
    Case(2, (3, 3), 2, 16, (2, 2), (0, 1)),
    Case(1, (13, 16), 1, 16, (8, 8), (2, 7)),
    Case(1, (2, 9), 2, 32, (1, 5), (0, 4)),
]


def fused_case(seed: int, dtype: torch.dtype) -> tuple[Case, dict[str, Tensor], Tensor]:
    """A case, its inputs as a call in `dtype` would have them, and the gradient of the result."""
    draw = random.Random(seed)
    case = _FUSED[seed % len(_FUSED)]
    if seed >= len(_FUSED):
        sizes = tuple(draw.randint(1, 2 * w) for w in case.window)
        case = case._replace(batch=draw.randint(1, 2), size=sizes, heads=draw.randint(1, 3))
    inputs = make_inputs(case, seed=seed)
    if draw.random() < 0.5:
        inputs["stretch"] = (inputs["stretch"] * 2).round() / 2
        inputs["offsets"] = inputs["offsets"].round()
    inputs = {
        name: x.to(DEVICE, torch.float32 if name in ("offsets", "stretch") else dtype) for name, x in inputs.items()
    }
    if draw.random() < 0.3:
        del inputs["bias"]
    grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(seed))
    return case, inputs, grad.to(DEVICE, dtype)


def gradients(case: Case, inputs: dict[str, Tensor], grad: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The result and, under the inputs' names, their gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = run(case, leaves, **kwargs)
    return {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of pixels, and lists of windows, on small maps."""
    triton = pytest.importorskip("vitrail.kernels.varied_window_attention.triton")
    monkeypatch.setattr(triton, "_TILE", (4, 8))
    monkeypatch.setattr(triton, "_LIST", 2)


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("seed", seeds(len(_FUSED)))
@pytest.mark.usefixtures("small_tiles")
def test_fused_is_as_exact_as_eager(seed: int, dtype: torch.dtype) -> None:
    assert_exact(*fused_case(seed, dtype))


def assert_exact(case: Case, inputs: dict[str, Tensor], grad: Tensor) -> None:
    """The fused operator is at most twice as far from the truth as the eager one."""
    truth = gradients(case, {name: x.double() for name, x in inputs.items()}, grad.double())
    eager = gradients(case, inputs, grad, backend="eager")
    fused = gradients(case, inputs, grad, backend="triton")
    for name, exact in truth.items():
        assert fused[name].dtype == eager[name].dtype
        assert fused[name].isfinite().all()
        scale = exact.norm() + 1e-12
        bound = 2 * (eager[name].double() - exact).norm() / scale + torch.finfo(grad.dtype).eps
        assert (fused[name].double() - exact).norm() / scale <= bound, name


@needs_triton
@pytest.mark.parametrize(("constant", "value"), [("_NARROW", 0), ("_INT32", 1)], ids=["wide", "far"])
def test_fused_is_exact_in_other_ways(constant: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vitrail.kernels.varied_window_attention.triton")
    monkeypatch.setattr(triton, constant, value)
    assert_exact(*fused_case(3, torch.float16))


@needs_triton
@pytest.mark.usefixtures("small_tiles")
def test_fused_gradients_where_all_samples_fall_on_one_pixel() -> None:
    case = Case(1, (5, 9), 1, 16, (4, 4), (0, 0))
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(case, torch.float32).items()}
    rows, columns = (torch.arange(n, dtype=torch.float32, device=DEVICE) for n in case.grid)
    inputs["stretch"].zero_()
    inputs["offsets"][..., 0] = 2 - (4 * rows + 1.5)[:, None, None]
    inputs["offsets"][..., 1] = 7 - (4 * columns + 1.5)[:, None]
    grad = torch.randn_like(inputs["q"])
    truth = gradients(case, {name: x.double() for name, x in inputs.items()}, grad.double())
    fused = gradients(case, inputs, grad, backend="triton")
    assert truth["v"].count_nonzero() == case.dim  # one pixel's
    for name, exact in truth.items():
        torch.testing.assert_close(fused[name].double(), exact, rtol=1e-5, atol=1e-5, msg=name)


@needs_triton
def test_fused_repeats_itself_whatever_the_strides() -> None:
    case, inputs, grad = fused_case(1, torch.float32)
    packed = torch.stack([inputs[name] for name in "qkv"], 3)
    strided = inputs | dict(zip("qkv", packed.unbind(3), strict=True))
    strided["offsets"] = inputs["offsets"].transpose(1, 2).contiguous().transpose(1, 2)
    first, second = gradients(case, inputs, grad, backend="triton"), gradients(case, strided, grad, backend="triton")
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@needs_triton
@pytest.mark.parametrize("far", [7.5, math.inf, -1e30])
def test_fused_reads_zeros_outside_the_map(far: float) -> None:
    case = Case(1, (4, 5), 1, 16, (2, 3), (0, 0))
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(case, torch.float32).items()}
    inputs["offsets"].fill_(far)
    inputs["stretch"].fill_(1)
    for x in gradients(case, inputs, torch.ones_like(inputs["q"]), backend="triton").values():
        assert not x.any()


@needs_triton
def test_fused_keeps_a_missing_coordinate_to_its_window() -> None:
    case = Case(1, (4, 4), 1, 16, (2, 2), (0, 0))
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(case, torch.float32).items()}
    inputs["offsets"][0, 0, 1] = math.nan
    found = gradients(case, inputs, torch.ones_like(inputs["q"]), backend="triton")
    for bad in (found["out"].isnan(), found["q"].isnan()):
        assert bad[:, :2, 2:].all()
        assert bad.sum() == 2 * 2 * 16
    for name in ("offsets", "stretch"):
        assert found[name].isnan().sum(dim=(0, 3, 4)).tolist() == [[0, 2], [0, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_on_a_gpu(dim: int, dtype: torch.dtype) -> None:
    case = Case(3, (33, 61), 2, dim, (7, 7), (1, 0))
    inputs = {
        name: x.to("cuda", torch.float32 if name in ("offsets", "stretch") else dtype)
        for name, x in make_inputs(case).items()
    }
    assert_exact(case, inputs, torch.randn_like(inputs["q"]))


@pytest.mark.gpu
def test_fused_runs_in_a_cuda_graph() -> None:
    case = Case(2, (14, 15), 2, 32, (7, 7), (0, 0))
    inputs = {name: x.cuda().requires_grad_() for name, x in make_inputs(case, torch.float32).items()}
    leaves, grad = list(inputs.values()), torch.randn_like(inputs["q"])

    def step() -> list[Tensor]:
        out = run(case, inputs, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, grad)]

    assert_a_cuda_graph_repeats(step)


def test_choice_is_recorded() -> None:
    case = Case(1, (2, 2), 1, 4, (2, 2), (0, 0))
    with record_choices() as choices:
        run(case, make_inputs(case))
    assert [(c.op, c.backend) for c in choices] == [("varied_window_attention", "eager")]


@needs_triton
@pytest.mark.parametrize(
    ("case", "dtypes", "reason"),
    [
        (Case(1, (2, 2), 1, 4, (2, 2), (0, 0)), (torch.float32, torch.float32), "head widths"),
        (Case(1, (2, 2), 1, 16, (9, 8), (0, 0)), (torch.float32, torch.float32), r"up to 64 tokens.*\(9, 8\)"),
        (Case(1, (2, 2), 1, 16, (2, 2), (0, 0)), (torch.float32, torch.float64), "offsets and stretch are float64"),
    ],
    ids=["width", "window", "coordinates"],
)
def test_what_the_kernels_do_not_take_is_named(case: Case, dtypes: tuple[torch.dtype, ...], reason: str) -> None:
    inputs = {name: x.to(DEVICE, dtypes[name in ("offsets", "stretch")]) for name, x in make_inputs(case).items()}
    with pytest.raises(NotImplementedError, match=f"varied_window_attention.*{reason}"):
        run(case, inputs, backend="triton")
    with record_choices() as choices:
        run(case, inputs)
    assert choices[0].backend == "eager"
    torch.testing.assert_close(run_op(case, inputs, case.dim**-0.5), run(case, inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 2)}, ValueError, r"q has shape \(2, 3, 4, 2\)"),
        ({"k": torch.zeros(1, 3, 4, 2, 5)}, ValueError, r"k has shape \(1, 3, 4, 2, 5\)"),
        ({"v": torch.zeros(1, 3, 4, 2, 4).double()}, ValueError, r"v has dtype torch\.float64"),
        ({"offsets": torch.zeros(1, 1, 2, 2, 2)}, ValueError, r"stretch has shape"),
        ({"stretch": torch.ones(1, 2, 2, 2, 2).double()}, ValueError, r"stretch has dtype torch\.float64"),
        ({"bias": torch.zeros(2, 4, 5)}, ValueError, r"bias has shape \(2, 4, 5\); expected \(2, 4, 4\)"),
        ({"bias": torch.zeros(2, 4, 4).long()}, TypeError, r"bias is torch\.int64"),
        ({"window_size": 0}, ValueError, "window_size is 0"),
        ({"window_size": 3}, ValueError, r"offsets has shape \(1, 2, 2, 2, 2\); expected \(1, 1, 2, 2, 2\)"),
        ({"pad_start": (0, 2)}, ValueError, r"pad_start is \(0, 2\); allowed: smaller than window_size \(2, 2\)"),
        ({"pad_start": -1}, ValueError, "pad_start is -1"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, (dict, str)) else None,
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case(1, (3, 4), 2, 4, (2, 2), (0, 0))
    arguments = {**make_inputs(case, torch.float32), "window_size": 2, **change}
    with pytest.raises(error, match=message):
        varied_window_attention(**arguments)


def test_integer_coordinates_are_refused() -> None:
    case = Case(1, (3, 4), 2, 4, (2, 2), (0, 0))
    inputs = make_inputs(case)
    inputs |= {name: inputs[name].long() for name in ("offsets", "stretch")}
    with pytest.raises(TypeError, match=r"offsets is torch\.int64"):
        run(case, inputs)
