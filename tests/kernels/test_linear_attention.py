"""Linear attention: the reference against the written-out definition, the operator against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from _seeds import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.linear_attention import linear_attention, linear_attention_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
shapes = st.tuples(*(st.integers(1, high) for high in (3, 7, 7, 3, 6)))


def by_definition(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, floor: float) -> Tensor:
    """One query at a time: a weighted sum of the values, its weights summed up to at least the floor."""
    out = torch.empty_like(q)
    for b, y, x, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:4])).tolist():
        keys, values = k[b, :, :, h].flatten(0, 1).clamp(min=0), v[b, :, :, h].flatten(0, 1)
        weights = (q[b, y, x, h].clamp(min=0) * keys).sum(-1)
        total = max(floor, weights.sum().item())
        out[b, y, x, h] = temperature[h] * (weights[:, None] * values).sum(0) / total
    return out


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [*(torch.randn(shape, dtype=dtype) for _ in range(3)), torch.randn(shape[3], dtype=dtype)]


@settings(max_examples=30)
@given(shape=shapes, floor=st.sampled_from([0.1, 3.0, 100.0]))
def test_reference_is_the_definition(shape: tuple[int, ...], floor: float) -> None:
    inputs = make_inputs(shape)
    want = by_definition(*inputs, floor)
    torch.testing.assert_close(linear_attention(*inputs, floor=floor), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(shape=shapes, floor=st.sampled_from([0.1, 3.0, 100.0]))
def test_operator_and_packed_forms_agree_with_the_reference(shape: tuple[int, ...], floor: float) -> None:
    *inputs, temperature = (x.requires_grad_() for x in make_inputs(shape))
    grad = torch.randn(shape, dtype=torch.float64)
    packed = torch.stack([x.detach() for x in inputs], 3).requires_grad_()
    want = linear_attention(*inputs, temperature, floor=floor)
    *want_maps, want_temperature = torch.autograd.grad(want, [*inputs, temperature], grad)
    by_op = torch.ops.vitrail.linear_attention(*inputs, temperature, floor)
    assert torch.equal(by_op, want)
    gradients = torch.autograd.grad(by_op, [*inputs, temperature], grad)
    torch.testing.assert_close(gradients, (*want_maps, want_temperature), rtol=1e-10, atol=1e-10)
    by_packed_op = torch.ops.vitrail.linear_attention_packed(packed, temperature, floor)
    for out in (linear_attention_packed(packed, temperature, floor=floor), by_packed_op):
        assert torch.equal(out, want)
        gradients = torch.autograd.grad(out, [packed, temperature], grad)
        torch.testing.assert_close(gradients, (torch.stack(want_maps, 3), want_temperature), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("floor", [0.5, 100.0], ids=["free", "floored"])
def test_gradients_are_the_derivatives(floor: float) -> None:
    inputs = [x.requires_grad_() for x in make_inputs((2, 3, 2, 2, 3))]
    assert torch.autograd.gradcheck(lambda *x: torch.ops.vitrail.linear_attention(*x, floor), inputs)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_registration(contiguous: bool) -> None:
    *inputs, temperature = make_inputs((2, 3, 5, 2, 4), torch.float32)
    packed = torch.randn(2, 3, 5, 3, 2, 4)
    if not contiguous:
        *inputs, packed = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*inputs, packed))
    for tensors, op in ((inputs, "linear_attention"), ([packed], "linear_attention_packed")):
        leaves = [x.detach().requires_grad_() for x in (*tensors, temperature)]
        torch.library.opcheck(getattr(torch.ops.vitrail, op), (*leaves, 3.0))


def test_float16_survives_the_tokens_of_a_street_scene() -> None:
    # 128 x 512 positions, those of a 512 x 2048 image at stride 4.
    q, k, v = (x.half() for x in make_inputs((1, 128, 512, 1, 16))[:3])
    q, k = q + 2, k + 2
    temperature = torch.tensor([0.25])
    total = (q.double() * k.double().sum((1, 2), keepdim=True)).sum(-1)
    assert total.max() > torch.finfo(torch.float16).max
    leaves = [x.detach().requires_grad_() for x in (q, k, v, temperature)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, temperature)]
    got, want = linear_attention(*leaves), linear_attention(*wide)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-5)
    got.sum().backward()
    want.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    torch.testing.assert_close(leaves[2].grad.double(), wide[2].grad, rtol=5e-3, atol=1e-4)


def test_autocast_rounds_the_inputs_and_nothing_else() -> None:
    *inputs, temperature = make_inputs((1, 20, 30, 2, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(*inputs, temperature)
        packed = linear_attention_packed(torch.stack(inputs, 3), temperature)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear_attention(*(x.bfloat16() for x in inputs), temperature))
    assert torch.equal(out, packed)


def test_empty_batch_and_compilation_with_any_batch() -> None:
    temperature = torch.ones(2)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 7):  # of no other axis
        inputs = [torch.randn(batch, 3, 4, 2, 8) for _ in range(3)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(*inputs, temperature), linear_attention(*inputs, temperature))
    empty = torch.randn(0, 3, 4, 2, 8, requires_grad=True)
    out = linear_attention(empty, empty, empty, temperature)
    out.sum().backward()
    assert empty.grad.shape == out.shape == (0, 3, 4, 2, 8)
    assert torch.ops.vitrail.linear_attention(empty, empty, empty, temperature, 1.0).shape == out.shape


def test_flops_of_the_operator_are_those_of_the_reference() -> None:
    inputs = make_inputs((2, 5, 7, 3, 8), torch.float32)
    counts = []
    for function in (linear_attention, lambda *x: torch.ops.vitrail.linear_attention(*x, 100.0)):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * (2 * 5 * 7 * 3 * 8 * 8)] * 2
    *inputs, temperature = inputs
    qkv = torch.stack(inputs, 3).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        torch.ops.vitrail.linear_attention_packed(qkv, temperature, 100.0).sum().backward()
    assert counter.get_total_flops() == counts[0] * 7 // 2


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the kernels cut a small map into several chunks of several tiles."""
    triton = pytest.importorskip("vitrail.kernels.linear_attention.triton")
    monkeypatch.setattr(triton, "_BLOCK_BYTES", 1024)
    monkeypatch.setattr(triton, "_LEAST_CHUNK", 32)
    monkeypatch.setattr(triton, "_MOST_CHUNKS", 3)


@needs_triton
@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("seed", seeds(10))
def test_fused_is_as_exact_as_eager(seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    shape = (*(draw.randint(1, high) for high in (2, 17, 17, 3)), draw.choice([16, 32]))
    floor, packed, strided = draw.choice([0.5, 40.0, 100.0]), draw.random() < 0.5, draw.random() < 0.5
    *inputs, temperature = (x.to(DEVICE) for x in make_inputs(shape))
    # The larger factor makes sums that float16 cannot hold, and gradients divided by them that it cannot either.
    factor = draw.choice([1, 30])
    inputs = [(factor * inputs[0]).to(dtype), (factor * inputs[1]).to(dtype), inputs[2].to(dtype)]
    temperature, grad = temperature.float(), torch.randn(shape, device=DEVICE).to(dtype)
    if strided:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        t = temperature.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = (
            linear_attention_packed(torch.stack(leaves, 3), t, floor=floor, backend=backend)
            if packed
            else linear_attention(*leaves, t, floor=floor, backend=backend)
        )
        return [out, *torch.autograd.grad(out, [*leaves, t], grad.to(dtype))]

    runs = run(torch.float64, "eager"), run(dtype, "triton"), run(dtype, "eager")
    scales = [exact.norm() for exact in runs[0]]
    # The temperature's gradient is a sum over the map of terms that cancel: it is as exact as they are. So are the
    # gradients of a single token's query and key, which cancel altogether.
    terms = grad.double() * runs[0][0]
    scales[-1] = (terms / temperature.double()[:, None]).abs().sum()
    if shape[1] * shape[2] == 1:
        q, k = (x.double().relu() for x in inputs[:2])
        share = terms.abs().sum(-1, keepdim=True) / (q * k).sum(-1, keepdim=True).clamp(min=floor)
        scales[1:3] = [(share * k).norm(), (share * q).norm()]
    for scale, exact, ours, theirs in zip(scales, *runs, strict=True):
        assert ours.isfinite().all()
        bound = 2 * (theirs.double() - exact).norm() + torch.finfo(dtype).eps * (scale + 1e-12)
        assert (ours.double() - exact).norm() <= bound


@needs_triton
@pytest.mark.usefixtures("many_chunks")
def test_fused_reads_views_of_the_projection_and_passes_nan_on() -> None:
    qkv, temperature = torch.randn(2, 5, 9, 3, 2, 16, device=DEVICE), torch.randn(2, device=DEVICE)
    wide = torch.randn(2, 4, device=DEVICE)
    q, k, v = qkv.unbind(3)
    want = linear_attention(q, k, v, temperature, backend="eager")
    torch.testing.assert_close(
        linear_attention(q, k, v, wide[:, 0], backend="triton"), linear_attention(q, k, v, wide[:, 0], backend="eager")
    )
    torch.testing.assert_close(linear_attention_packed(qkv, temperature, backend="triton"), want)
    for place in (q, k):
        place[1, 2, 3, 0, 4] = torch.nan
        fused, eager = (linear_attention(q, k, v, temperature, backend=name) for name in ("triton", "eager"))
        assert torch.equal(fused.isnan(), eager.isnan())
        assert fused[0].isfinite().all()


@needs_triton
@pytest.mark.usefixtures("many_chunks")
def test_fused_writes_every_gradient_and_the_same_one_each_time() -> None:
    from vitrail.kernels.linear_attention.triton import linear_attention_backward

    *inputs, temperature = (x.to(DEVICE) for x in make_inputs((2, 7, 11, 2, 16), torch.float32))
    grad = torch.randn_like(inputs[0])
    runs = []
    for _ in range(2):
        gradients = [torch.full_like(x, torch.nan) for x in inputs]
        d_temperature = linear_attention_backward(grad, *inputs, temperature, *gradients, 3.0)
        runs.append([*gradients, d_temperature])
    assert all(x.isfinite().all() for x in runs[0])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_choice_is_recorded_and_bad_arguments_are_named() -> None:
    q, k, v, temperature = make_inputs((1, 2, 3, 2, 4))
    with record_choices() as choices:
        linear_attention(q, k, v, temperature)
    assert [(c.op, c.backend) for c in choices] == [("linear_attention", "eager")]
    with pytest.raises(NotImplementedError, match=r"linear_attention.*Triton"):
        linear_attention(q, k, v, temperature, backend="triton")
    with pytest.raises(ValueError, match="floor is 0"):
        linear_attention(q, k, v, temperature, floor=0)
    with pytest.raises(ValueError, match=r"temperature has shape \(3,\)"):
        linear_attention(q, k, v, torch.ones(3))
    with pytest.raises(ValueError, match=r"k has shape \(1, 1, 3, 2, 4\)"):
        linear_attention(q, k[:, :1], v, temperature)
    with pytest.raises(TypeError, match=r"q is torch\.int64"):
        linear_attention(q.long(), k.long(), v.long(), temperature)
    with pytest.raises(ValueError, match="temperature is on meta"):
        linear_attention(q, k, v, temperature.to("meta"))
    with pytest.raises(ValueError, match="qkv has shape"):
        linear_attention_packed(torch.stack((q, k), 3), temperature)
