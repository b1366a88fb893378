"""Context window attention: the reference against the written-out definition, the operator against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import record_choices
from vitrail.kernels.context_window_attention import context_window_attention


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
    inputs = [x.requires_grad_() for x in small_inputs()]
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


def test_choice_is_recorded_and_the_missing_kernel_is_named() -> None:
    inputs = small_inputs()
    with record_choices() as choices:
        context_window_attention(*inputs, **PLACES)
    assert [(c.op, c.backend) for c in choices] == [("context_window_attention", "eager")]
    with pytest.raises(NotImplementedError, match=r"context_window_attention.*Triton"):
        context_window_attention(*inputs, **PLACES, backend="triton")


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
