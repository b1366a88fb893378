"""Retention: the reference against the written-out definition, the operator against the reference."""

from __future__ import annotations

import math
import random

import pytest
import torch
from _exactness import allowed_error, error_in_norm
from _seeds import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.retention import decomposed_retention, retention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
shapes = st.tuples(*(st.integers(1, high) for high in (2, 7, 7, 3, 4)))
windows = st.one_of(
    st.none(),
    st.tuples(*(st.integers(1, 8).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, w - 1))) for _ in "hw")),
)
forms = st.sampled_from(
    [
        {"activation": "softmax"},
        {"activation": "sigmoid"},
        {"activation": "sigmoid", "slopes": True},
        {"activation": "sigmoid", "slopes": True, "signed_slopes": True, "length_offset": True},
    ]
)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and decay; as slopes the tests take the decay too."""
    heads = torch.float64 if dtype == torch.float64 else torch.float32
    return [*(torch.randn(shape, dtype=dtype) for _ in range(3)), -2 * torch.rand(shape[3], dtype=heads)]


def arguments(window: object, form: dict[str, object], decay: Tensor) -> dict[str, object]:
    given_arguments = dict(form)
    if form.get("slopes"):
        given_arguments["slopes"] = -0.7 * decay + 0.1
    if window is not None:
        given_arguments["window_size"] = (window[0][0], window[1][0])
        given_arguments["shift_size"] = (window[0][1], window[1][1])
    return given_arguments


def places(size: int, window: int, shift: int) -> list[tuple[int, bool]]:
    """For each index of an axis: the number of its window after the shift, and whether it was carried around."""
    padded = math.ceil(size / window) * window
    return [((i - shift) % padded // window, i < shift) for i in range(size)]


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    window_size: tuple[int, int] | None = None,
    shift_size: tuple[int, int] = (0, 0),
    activation: str = "softmax",
    slopes: Tensor | None = None,
    signed_slopes: bool = False,
    length_offset: bool = False,
    scale: float | None = None,
    only_axis: int | None = None,
) -> Tensor:
    """One query at a time, over the keys of its window that were its neighbours before the shift.

    `only_axis` keeps of these the keys of the query's own column (0) or row (1).
    """
    height, width = q.shape[1:3]
    window = (height, width) if window_size is None else window_size
    length = math.prod(window) if only_axis is None else window[only_axis]
    rows, columns = (places(q.shape[axis + 1], window[axis], shift_size[axis]) for axis in (0, 1))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(v)
    for y in range(height):
        for x in range(width):
            seen = [
                (r, c) for r in range(height) for c in range(width) if rows[r] == rows[y] and columns[c] == columns[x]
            ]
            seen = [(r, c) for r, c in seen if (only_axis != 0 or c == x) and (only_axis != 1 or r == y)]
            at = torch.tensor(seen)
            keys, values = k[:, at[:, 0], at[:, 1]], v[:, at[:, 0], at[:, 1]]  # (B, n, heads, D)
            distance = torch.tensor([abs(y - r) + abs(x - c) for r, c in seen], dtype=q.dtype)[:, None]
            offset = torch.tensor([y - r + x - c for r, c in seen], dtype=q.dtype)[:, None]
            logits = scale * (q[:, y, x, None] * keys).sum(-1)  # (B, n, heads)
            if activation == "softmax":
                weights = (logits + decay * distance).softmax(1)
            else:
                if slopes is not None:
                    logits = logits - slopes * (offset if signed_slopes else distance)
                if length_offset:
                    logits = logits - math.log(length)
                weights = logits.sigmoid() * torch.exp(decay * distance)
            out[:, y, x] = (weights[..., None] * values).sum(1)
    return out


@settings(max_examples=40)
@given(shape=shapes, window=windows, form=forms, scale=st.sampled_from([None, 0.3]))
def test_reference_is_the_definition(shape: tuple, window: object, form: dict, scale: float | None) -> None:
    q, k, v, decay = make_inputs(shape)
    given_arguments = {**arguments(window, form, decay), "scale": scale}
    out = retention(q, k, v, decay, **given_arguments)
    assert out.is_contiguous()
    torch.testing.assert_close(out, by_definition(q, k, v, decay, **given_arguments), rtol=1e-11, atol=1e-11)


@settings(max_examples=40)
@given(shape=shapes, window=windows, form=forms)
def test_decomposed_form_is_the_definition_along_rows_then_columns(shape: tuple, window: object, form: dict) -> None:
    q, k, v, decay = make_inputs(shape)
    given_arguments = arguments(window, form, decay)
    by_row = by_definition(q, k, v, decay, **given_arguments, only_axis=1)
    want = by_definition(q, k, by_row, decay, **given_arguments, only_axis=0)
    got = decomposed_retention(q, k, v, decay, **given_arguments)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def operator_arguments(q: Tensor, given_arguments: dict) -> tuple[object, ...]:
    return (
        given_arguments.get("slopes"),
        given_arguments.get("window_size", (q.shape[1], q.shape[2])),
        given_arguments.get("shift_size", (0, 0)),
        given_arguments["activation"],
        given_arguments.get("signed_slopes", False),
        given_arguments.get("length_offset", False),
        q.shape[-1] ** -0.5,
    )


@settings(max_examples=25)
@given(shape=shapes, window=windows, form=forms)
def test_operator_agrees_with_the_reference(shape: tuple, window: object, form: dict) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(shape)]
    given_arguments = arguments(window, form, inputs[3])
    grad = torch.randn(shape, dtype=torch.float64)
    want = retention(*inputs, **given_arguments)
    got = torch.ops.vitrail.retention(*inputs, *operator_arguments(inputs[0], given_arguments))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, inputs, grad, retain_graph=True), torch.autograd.grad(want, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", [{"activation": "softmax"}, {"activation": "sigmoid", "signed_slopes": True}], ids=str)
def test_gradients_are_the_derivatives(form: dict) -> None:
    q, k, v, decay = make_inputs((2, 3, 5, 2, 2))
    slopes = decay + 1 if form["activation"] == "sigmoid" else None
    tensors = [x.requires_grad_() for x in (q, k, v, decay, *([] if slopes is None else [slopes.detach()]))]
    window = {"window_size": (2, 3), "shift_size": (1, 1)}

    def api(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, slopes: Tensor | None = None) -> Tensor:
        return decomposed_retention(q, k, v, decay, slopes=slopes, **window, **form)

    def operator(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, slopes: Tensor | None = None) -> Tensor:
        return torch.ops.vitrail.retention(
            q,
            k,
            v,
            decay,
            *operator_arguments(q, {**window, **form, "slopes": slopes, "length_offset": slopes is not None}),
        )

    assert torch.autograd.gradcheck(api, tensors)
    assert torch.autograd.gradcheck(operator, tensors)


def test_only_wanted_gradients_are_returned() -> None:
    q, k, v, decay = make_inputs((1, 3, 4, 2, 4))
    k.requires_grad_()
    torch.ops.vitrail.retention(q, k, v, decay, None, [3, 4], [0, 0], "softmax", False, False, 0.5).sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert decay.grad is None


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_registration(activation: str, contiguous: bool) -> None:
    q, k, v, decay = make_inputs((2, 3, 5, 2, 4), torch.float32)
    if not contiguous:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    slopes = None if activation == "softmax" else torch.randn(2, requires_grad=True)
    tensors = [x.detach().requires_grad_() for x in (q, k, v, decay)]
    constants = ([2, 3], [1, 0], activation, False, slopes is not None, 0.5)
    torch.library.opcheck(torch.ops.vitrail.retention.default, (*tensors, slopes, *constants))


def test_a_single_token_returns_its_value() -> None:
    q, k, v, decay = make_inputs((2, 4, 5, 2, 3))
    for function in (retention, decomposed_retention):
        torch.testing.assert_close(function(q, k, v, decay, window_size=1), v)


def test_strong_decay_leaves_the_token_itself() -> None:
    q, k, v, decay = make_inputs((1, 6, 7, 2, 3))
    torch.testing.assert_close(retention(q, k, v, torch.full_like(decay, -1e4)), v)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_as_close_as_its_rounding(dtype: torch.dtype, activation: str) -> None:
    # A row of 334 tokens, as an image of 1333 pixels has at stride 4; half of the heads hardly decay.
    inputs = [x.to(dtype) for x in make_inputs((1, 3, 334, 2, 16))[:3]]
    decay = torch.tensor([-0.28, -0.004])
    leaves, wide = ([x.detach().to(t, copy=True).requires_grad_() for x in inputs] for t in (dtype, torch.float64))
    kwargs = {"activation": activation, "length_offset": activation == "sigmoid"}
    out, want = decomposed_retention(*leaves, decay, **kwargs), decomposed_retention(*wide, decay.double(), **kwargs)
    assert out.dtype == dtype
    assert (out - want).abs().max() < 16 * torch.finfo(dtype).eps * want.abs().max()
    out.float().square().sum().backward()
    want.square().sum().backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        assert (leaf.grad - exact.grad).abs().max() < 32 * torch.finfo(dtype).eps * exact.grad.abs().max()


def test_half_precision_windows_with_padding_are_finite() -> None:
    leaves = [x.half().requires_grad_() for x in make_inputs((2, 9, 11, 2, 16))[:3]]
    for activation in ("softmax", "sigmoid"):
        out = retention(*leaves, torch.tensor([-0.28, -0.1]), window_size=4, shift_size=2, activation=activation)
        out.float().sum().backward()
        assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_autocast_rounds_the_inputs_and_not_the_decay() -> None:
    q, k, v, decay = make_inputs((1, 4, 50, 2, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = decomposed_retention(q, k, v, decay)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, decomposed_retention(*(x.bfloat16() for x in (q, k, v)), decay))
    with pytest.raises(TypeError, match=r"decay is torch\.bfloat16"):
        retention(q, k, v, decay.bfloat16())


def test_strided_inputs_change_nothing() -> None:
    q, k, v = (torch.randn(2, 4, 10, 6, 5, dtype=torch.float64).permute(0, 2, 3, 1, 4)[:, ::2] for _ in range(3))
    decay = -torch.rand(4, dtype=torch.float64)
    for function in (retention, decomposed_retention):
        out = function(q, k, v, decay, window_size=3, shift_size=1)
        want = function(q.contiguous(), k.contiguous(), v.contiguous(), decay, window_size=3, shift_size=1)
        torch.testing.assert_close(out, want)


def test_empty_batch() -> None:
    inputs = [torch.randn(0, 3, 4, 2, 8, requires_grad=True) for _ in range(3)]
    for window in (None, 2):
        out = decomposed_retention(*inputs, -torch.rand(2), window_size=window)
        assert out.shape == (0, 3, 4, 2, 8)
        out.sum().backward()
    assert inputs[0].grad.shape == out.shape


def test_compiles_in_one_graph_with_any_batch() -> None:
    compiled = torch.compile(decomposed_retention, fullgraph=True, backend="aot_eager")
    decay, window = -torch.rand(2), {"window_size": (2, 3), "shift_size": (1, 1)}
    for batch in (2, 5, 7):  # the second batch makes it dynamic
        with torch.compiler.set_stance("default" if batch < 7 else "fail_on_recompile"):
            inputs = [torch.randn(batch, 3, 5, 2, 8) for _ in range(3)]
            got = compiled(*inputs, decay, **window)
        torch.testing.assert_close(got, decomposed_retention(*inputs, decay, **window))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_flops_of_the_operator_are_those_of_the_reference(activation: str) -> None:
    *inputs, decay = make_inputs((2, 5, 7, 3, 8), torch.float32)
    counts = []
    rest = (None, (2, 3), (1, 1), activation, False, False, 0.5)
    operator = torch.ops.vitrail.retention
    kwargs = {"window_size": (2, 3), "shift_size": 1, "activation": activation, "scale": 0.5}
    for function in (lambda: retention(*inputs, decay, **kwargs), lambda: operator(*inputs, decay, *rest)):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    # 3 x 3 windows of 6 tokens in each of 2 images, padding included.
    assert counts == [2 * 2 * (2 * 9 * 3 * 6 * 6 * 8)] * 2
    leaves = [x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        operator(*leaves, decay, *rest).sum().backward()
    assert counter.get_total_flops() == counts[0] * 7 // 2


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("seed", seeds(9))
def test_fused_is_as_exact_as_eager(seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    shape = (*(draw.randint(1, high) for high in (2, 9, 9, 3)), draw.choice([16, 32]))
    operator = (retention, decomposed_retention)[seed % 2]
    options = draw.choice([{}, {}, {"window_size": (3, 5), "shift_size": (1, 2)}])
    *inputs, decay = (x.to(DEVICE) for x in make_inputs(shape))
    grad = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)

    def run(wide: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(dtype).to(wide).requires_grad_() for x in inputs]
        leaves.append(decay.float().to(torch.promote_types(wide, torch.float32)).requires_grad_())
        out = operator(*leaves, **options, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad.to(wide))]

    for exact, ours, theirs in zip(run(torch.float64, "eager"), run(dtype, "triton"), run(dtype, "eager"), strict=True):
        assert ours.isfinite().all()
        assert error_in_norm(ours, exact) <= allowed_error(exact, theirs, dtype)


def test_choice_is_recorded_and_the_missing_kernel_is_named() -> None:
    *inputs, decay = make_inputs((1, 2, 2, 1, 4))
    with record_choices() as choices:
        decomposed_retention(*inputs, decay)
    assert [(c.op, c.backend) for c in choices] == [("retention", "eager")] * 2
    with pytest.raises(NotImplementedError, match=r"retention.*Triton"):
        retention(*inputs, decay, backend="triton")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"slopes": torch.zeros(2)}, "need activation 'sigmoid'"),
        ({"length_offset": True}, "need activation 'sigmoid'"),
        ({"activation": "sigmoid", "signed_slopes": True}, "signed_slopes is True without slopes"),
        ({"activation": "sigmoid", "slopes": torch.zeros(3)}, r"slopes has shape \(3,\)"),
        ({"shift_size": 1}, r"shift_size is \(1, 1\) without window_size"),
        ({"window_size": 2, "shift_size": 2}, r"shift_size is \(2, 2\)"),
        ({"window_size": 0}, "window_size is 0"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    *inputs, decay = make_inputs((1, 3, 4, 2, 4))
    for function in (retention, decomposed_retention):
        with pytest.raises(ValueError, match=message):
            function(*inputs, decay, **kwargs)


def test_bad_tensors_are_named() -> None:
    q, k, v, decay = make_inputs((1, 2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 2, 4\)"):
        decomposed_retention(q[0], k[0], v[0], decay)
    with pytest.raises(ValueError, match=r"k has shape \(1, 1, 3, 2, 4\)"):
        retention(q, k[:, :1], v, decay)
    with pytest.raises(ValueError, match=r"v has dtype torch\.float32"):
        retention(q, k, v.float(), decay)
    with pytest.raises(ValueError, match=r"decay has shape \(3,\)"):
        retention(q, k, v, torch.zeros(3))
    with pytest.raises(TypeError, match=r"q is torch\.int64"):
        retention(q.long(), k.long(), v.long(), decay)
