"""The strip gate: the reference against the written-out definition, operator and kernel against the reference."""

from __future__ import annotations

import math
import random

import pytest
import torch
from _cuda_graphs import assert_a_cuda_graph_repeats
from _seeds import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.strip_gate import strip_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
shapes = st.tuples(*(st.integers(1, high) for high in (3, 5, 9, 9)))
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, channels, height, width = shape
    return [
        torch.randn(shape, dtype=dtype),
        2 * torch.randn(batch, channels, height, dtype=dtype),
        2 * torch.randn(batch, channels, width, dtype=dtype),
    ]


def by_definition(x: Tensor, logits_h: Tensor, logits_w: Tensor, skip: bool) -> Tensor:
    """One value at a time, in Python's own numbers."""
    out = torch.empty_like(x)
    for b, c, i, j in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        gate = 1 / (1 + math.exp(-logits_h[b, c, i])) / (1 + math.exp(-logits_w[b, c, j]))
        out[b, c, i, j] = x[b, c, i, j] * (gate + skip)
    return out


@settings(max_examples=20)
@given(shape=shapes, skip=st.booleans())
def test_reference_is_the_definition(shape: tuple[int, ...], skip: bool) -> None:
    inputs = make_inputs(shape)
    want = by_definition(*inputs, skip)
    torch.testing.assert_close(strip_gate(*inputs, skip=skip), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(shape=shapes, skip=st.booleans(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_operator_agrees_with_the_reference(shape: tuple[int, ...], skip: bool, layout: str) -> None:
    x, *logits = make_inputs(shape)
    inputs = [t.detach().requires_grad_() for t in (LAYOUTS[layout](x), *logits)]
    grad = torch.randn(shape, dtype=torch.float64)
    want = strip_gate(*inputs, skip=skip)
    got = torch.ops.vitrail.strip_gate(*inputs, skip)
    assert torch.equal(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_gradients_are_the_derivatives(skip: bool) -> None:
    inputs = [x.requires_grad_() for x in make_inputs((2, 3, 4, 5))]
    assert torch.autograd.gradcheck(lambda *args: strip_gate(*args, skip=skip), inputs)
    assert torch.autograd.gradcheck(lambda *args: torch.ops.vitrail.strip_gate(*args, skip), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strips", [torch.float32, torch.bfloat16], ids=str)
def test_registration(layout: str, strips: torch.dtype) -> None:
    x, *logits = make_inputs((2, 3, 4, 5), torch.bfloat16)
    inputs = [t.detach().requires_grad_() for t in (LAYOUTS[layout](x), *(strip.to(strips) for strip in logits))]
    torch.library.opcheck(torch.ops.vitrail.strip_gate, (*inputs, True))


def test_map_keeps_its_layout_and_dtype() -> None:
    x, *logits = make_inputs((2, 3, 4, 5), torch.float32)
    nhwc = x.contiguous(memory_format=torch.channels_last).bfloat16()
    for function in (strip_gate, lambda *args: torch.ops.vitrail.strip_gate(*args, False)):
        out = function(nhwc, *logits)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert out.dtype == torch.bfloat16
        assert function(x, *logits).is_contiguous()


def test_only_wanted_gradients_are_returned() -> None:
    x, logits_h, logits_w = make_inputs((1, 2, 3, 4))
    logits_w.requires_grad_()
    torch.ops.vitrail.strip_gate(x, logits_h, logits_w, False).sum().backward()
    assert logits_w.grad is not None
    assert x.grad is logits_h.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_keeps_its_digits(dtype: torch.dtype) -> None:
    x, logits_h, logits_w = make_inputs((1, 2, 200, 334), torch.float32)
    inputs = [t.detach().requires_grad_() for t in ((x + 2).to(dtype), logits_h, logits_w)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    # A scaled loss: the sum over a row of the products leaves float16's range, that of float32 strips does not.
    grad = torch.full(x.shape, 512.0, dtype=dtype)
    out, want = torch.ops.vitrail.strip_gate(*inputs, False), strip_gate(*wide)
    out.backward(grad)
    want.backward(grad.double())
    eps = torch.finfo(dtype).eps
    # Both gates and both products are rounded.
    assert (out.double() - want).abs().max() < 4 * eps * want.abs().max()
    for got, reference in zip(inputs, wide, strict=True):
        assert (got.grad.double() - reference.grad).abs().max() < 4 * eps * reference.grad.abs().max()


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs((2, 3, 4, 5), torch.float32)
    for function in (strip_gate, lambda *args: torch.ops.vitrail.strip_gate(*args, False)):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*inputs)
        assert torch.equal(out, function(*inputs))


def test_empty_batch() -> None:
    inputs = [x.requires_grad_() for x in make_inputs((0, 3, 4, 5))]
    for out in (strip_gate(*inputs), torch.ops.vitrail.strip_gate(*inputs, True)):
        assert out.shape == (0, 3, 4, 5)
        out.sum().backward()
    assert inputs[1].grad.shape == (0, 3, 4)


def test_compiles_in_one_graph_at_any_size() -> None:
    compiled = torch.compile(strip_gate, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 4, 5), (3, 3, 7, 6)):
        inputs = make_inputs(shape)
        torch.testing.assert_close(compiled(*inputs), strip_gate(*inputs))


def test_choice_is_recorded_and_what_the_kernel_does_not_take_is_named() -> None:
    inputs = make_inputs((1, 2, 3, 4))
    with record_choices() as choices:
        strip_gate(*inputs)
    assert [(c.op, c.backend) for c in choices] == [("strip_gate", "eager")]
    with pytest.raises(NotImplementedError, match=r"strip_gate.*Triton"):
        strip_gate(*inputs, backend="triton")


def results(inputs: list[Tensor], grad: Tensor, skip: bool, backend: str) -> list[Tensor]:
    """The result and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = strip_gate(*leaves, skip=skip, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_exact(inputs: list[Tensor], grad: Tensor, skip: bool) -> None:
    """The fused operator is at most twice as far from the truth as the eager one."""
    truth = results([x.double() for x in inputs], grad.double(), skip, "eager")
    eager, fused = (results(inputs, grad, skip, backend) for backend in ("eager", "triton"))
    for exact, ours, theirs in zip(truth, fused, eager, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        scale = exact.norm() + 1e-12
        bound = 2 * (theirs.double() - exact).norm() / scale + torch.finfo(grad.dtype).eps
        assert (ours.double() - exact).norm() / scale <= bound


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", seeds(10))
def test_fused_is_as_exact_as_eager(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vitrail.kernels.strip_gate.triton")
    draw = random.Random(seed)
    # Several tiles, runs of rows and blocks of columns on a small map.
    monkeypatch.setattr(triton, "_TILE", draw.choice([16, 64]))
    monkeypatch.setattr(triton, "_MOST_COLUMNS", draw.choice([4, 16]))
    monkeypatch.setattr(triton, "_CHANNELS", draw.choice([2, 8]))
    monkeypatch.setattr(triton, "_PROGRAMS", draw.choice([1, 99]))
    shape = tuple(draw.randint(1, high) for high in (2, 9, 7, 9))
    x, *strips = make_inputs(shape, torch.float32)
    x, grad = (LAYOUTS[draw.choice(sorted(LAYOUTS))](t.to(DEVICE, dtype)) for t in (x, torch.randn(shape)))
    strips = [strip.to(DEVICE, draw.choice([dtype, torch.float32])) for strip in strips]
    strips[1] = strips[1].to(strips[0].dtype)
    assert_exact([x, *strips], grad, draw.random() < 0.5)


@needs_triton
def test_fused_repeats_itself() -> None:
    x, *strips = (t.to(DEVICE) for t in make_inputs((2, 3, 9, 7), torch.float32))
    first, second = (results([x, *strips], x.cos(), True, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (2, 130, 200, 304), (4, 512, 7, 7), (2, 3, 14, 600)], ids=str)
def test_fused_on_a_gpu(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, *strips = (t.cuda() for t in make_inputs(shape, torch.float32))
    x, grad = (LAYOUTS[layout](t.to(dtype)) for t in (x, torch.randn(shape, device="cuda")))
    assert_exact([x, *strips], grad, True)


@pytest.mark.gpu
def test_fused_runs_in_a_cuda_graph() -> None:
    x, *strips = (t.cuda() for t in make_inputs((2, 3, 30, 40), torch.float32))
    assert_a_cuda_graph_repeats(lambda: results([x, *strips], x.cos(), True, "triton"))


def test_bad_arguments_are_named() -> None:
    x, logits_h, logits_w = make_inputs((2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 5\)"):
        strip_gate(x[0], logits_h, logits_w)
    with pytest.raises(ValueError, match=r"logits_h has shape \(2, 3, 5\); expected \(2, 3, 4\)"):
        strip_gate(x, logits_w, logits_h)
    with pytest.raises(ValueError, match=r"logits_w has shape \(2, 3, 4\); expected \(2, 3, 5\)"):
        strip_gate(x, logits_h, logits_h)
    with pytest.raises(ValueError, match=r"logits_w has dtype torch\.float32"):
        strip_gate(x, logits_h, logits_w.float())
    with pytest.raises(ValueError, match="logits_w on meta"):
        strip_gate(x, logits_h, logits_w.to("meta"))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        strip_gate(x.long(), logits_h, logits_w)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        strip_gate(x, logits_h, logits_w, backend="cuda")
