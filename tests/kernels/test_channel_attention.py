"""Channel attention: the reference against the written-out definition, the operator against the reference."""

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
from vitrail.kernels.channel_attention import channel_attention, channel_attention_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
shapes = st.tuples(*(st.integers(1, high) for high in (3, 9, 9, 4, 8)))


def by_definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`y[n, i] = sum_j softmax_j(scale * sum_n k[n, i] v[n, j]) q[n, j]`, one image and group at a time."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for g in range(q.shape[3]):
            keys, values = k[b, :, :, g].flatten(0, 1), v[b, :, :, g].flatten(0, 1)
            weights = torch.stack([(scale * (key[:, None] * values).sum(0)).softmax(0) for key in keys.T])
            out[b, :, :, g] = (weights[None, None] * q[b, :, :, g, None, :]).sum(-1)
    return out


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, n: int = 3) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(n)]


@settings(max_examples=40)
@given(shape=shapes, scale=st.sampled_from([None, 0.3, 2.0]))
def test_reference_is_the_definition(shape: tuple[int, ...], scale: float | None) -> None:
    q, k, v = make_inputs(shape)
    want = by_definition(q, k, v, shape[-1] ** -0.5 if scale is None else scale)
    torch.testing.assert_close(channel_attention(q, k, v, scale=scale), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(shape=shapes)
def test_operator_and_packed_forms_agree_with_the_reference(shape: tuple[int, ...]) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(shape)]
    grad = torch.randn(shape, dtype=torch.float64)
    packed = torch.stack([x.detach() for x in inputs], 3).requires_grad_()
    want = channel_attention(*inputs)
    want_gradients = torch.autograd.grad(want, inputs, grad)
    by_op = torch.ops.vitrail.channel_attention(*inputs, shape[-1] ** -0.5)
    assert torch.equal(by_op, want)
    for got, gradient in zip(torch.autograd.grad(by_op, inputs, grad), want_gradients, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-12)
    by_packed_op = torch.ops.vitrail.channel_attention_packed(packed, shape[-1] ** -0.5)
    for out in (channel_attention_packed(packed), by_packed_op):
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        (got,) = torch.autograd.grad(out, packed, grad)
        torch.testing.assert_close(got, torch.stack(want_gradients, 3), rtol=1e-12, atol=1e-12)


def test_gradients_are_the_derivatives() -> None:
    inputs = [x.requires_grad_() for x in make_inputs((2, 3, 2, 2, 3))]
    assert torch.autograd.gradcheck(channel_attention, inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: torch.ops.vitrail.channel_attention(q, k, v, 0.7), inputs)


def test_only_wanted_gradients_are_returned() -> None:
    q, k, v = make_inputs((1, 3, 4, 2, 4))
    k.requires_grad_()
    torch.ops.vitrail.channel_attention(q, k, v, 0.5).sum().backward()
    assert k.grad is not None
    assert q.grad is None


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_registration(contiguous: bool) -> None:
    shape = (2, 3, 5, 2, 4)
    inputs = [x if contiguous else x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_inputs(shape)]
    packed = torch.randn(2, 3, 5, 3, 2, 4)
    packed = packed if contiguous else packed.transpose(1, 2).contiguous().transpose(1, 2)
    for tensors, op in ((inputs, "channel_attention"), ([packed], "channel_attention_packed")):
        leaves = [x.detach().requires_grad_() for x in tensors]
        torch.library.opcheck(getattr(torch.ops.vitrail, op), (*leaves, 0.5))


def test_strided_inputs_change_nothing() -> None:
    q, k, v = (torch.randn(2, 4, 10, 6, 5, dtype=torch.float64).permute(0, 2, 3, 1, 4)[:, ::2] for _ in range(3))
    out = channel_attention(q, k, v)
    assert out.is_contiguous()
    torch.testing.assert_close(out, channel_attention(q.contiguous(), k.contiguous(), v.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_survives_the_tokens_of_a_detection_image(dtype: torch.dtype) -> None:
    # 200 x 334 positions, those of an 800 x 1333 image at stride 4: the unscaled sums leave float16's range.
    q, k, v = (x.to(dtype) for x in make_inputs((1, 200, 334, 1, 16)))
    k = k + 2
    v = v + 2
    plain_sums = torch.einsum("bhwgi,bhwgj->bgij", k.double(), v.double())
    assert plain_sums.abs().max() > torch.finfo(torch.float16).max
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    wide_leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, wide = channel_attention(*leaves), channel_attention(*wide_leaves)
    assert out.dtype == dtype
    # The map's weights and the result are each rounded once; a float32 logit of 1e5 is off by up to 4e-3.
    limit = (2 * torch.finfo(dtype).eps + 1e-2) * q.double().abs().max()
    assert (out.double() - wide).abs().max() < limit
    out.sum().backward()
    wide.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    torch.testing.assert_close(leaves[0].grad.double(), wide_leaves[0].grad, rtol=0.02, atol=0.02)


def test_autocast_rounds_the_inputs_and_nothing_else() -> None:
    q, k, v = make_inputs((1, 40, 50, 2, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = channel_attention(q, k, v)
        packed = channel_attention_packed(torch.stack((q, k, v), 3))
    want = channel_attention(*(x.bfloat16() for x in (q, k, v)))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert torch.equal(packed, want)


def test_empty_batch() -> None:
    inputs = [torch.randn(0, 3, 4, 2, 8, requires_grad=True) for _ in range(3)]
    out = channel_attention(*inputs)
    assert out.shape == (0, 3, 4, 2, 8)
    out.sum().backward()
    assert inputs[0].grad.shape == out.shape
    assert torch.ops.vitrail.channel_attention(*inputs, 0.5).shape == out.shape


def test_compiles_in_one_graph_with_any_batch() -> None:
    compiled = torch.compile(channel_attention_packed, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 7):  # of no other axis
        qkv = torch.randn(batch, 3, 4, 3, 2, 8)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(qkv), channel_attention_packed(qkv))


def test_flops_of_the_operator_are_those_of_the_reference() -> None:
    q, k, v = make_inputs((2, 5, 7, 3, 8), torch.float32)
    counts = []
    for function in (channel_attention, lambda q, k, v: torch.ops.vitrail.channel_attention(q, k, v, 0.5)):
        with FlopCounterMode(display=False) as counter:
            function(q, k, v)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * (2 * 5 * 7 * 3 * 8 * 8)] * 2
    qkv = torch.stack((q, k, v), 3).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        torch.ops.vitrail.channel_attention_packed(qkv, 0.5).sum().backward()
    assert counter.get_total_flops() == counts[0] * 7 // 2


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("seed", seeds(12))
def test_fused_is_as_exact_as_eager(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vitrail.kernels.channel_attention.triton")
    monkeypatch.setattr(triton, "_BLOCK_BYTES", 1024)  # several chunks and tiles on a small map
    monkeypatch.setattr(triton, "_LEAST_CHUNK", 32)
    monkeypatch.setattr(triton, "_MOST_CHUNKS", 3)
    draw = random.Random(seed)
    shape = (*(draw.randint(1, high) for high in (2, 17, 17, 3)), draw.choice([16, 32]))
    inputs, grad = make_inputs(shape), torch.randn(shape, dtype=torch.float64)
    inputs, grad = [x.to(DEVICE, dtype) for x in inputs], grad.to(DEVICE, dtype)
    packed, strided = draw.random() < 0.5, draw.random() < 0.5
    if strided:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = (
            channel_attention_packed(torch.stack(leaves, 3), backend=backend)
            if packed
            else channel_attention(*leaves, backend=backend)
        )
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    for exact, ours, theirs in zip(run(torch.float64, "eager"), run(dtype, "triton"), run(dtype, "eager"), strict=True):
        scale = exact.norm() + 1e-12
        bound = 2 * (theirs.double() - exact).norm() / scale + torch.finfo(dtype).eps
        assert ours.isfinite().all()
        assert (ours.double() - exact).norm() / scale <= bound


def test_choice_is_recorded_and_the_missing_kernel_is_named() -> None:
    q, k, v = make_inputs((1, 2, 2, 1, 4))
    with record_choices() as choices:
        channel_attention(q, k, v)
    assert [(c.op, c.backend) for c in choices] == [("channel_attention", "eager")]
    with pytest.raises(NotImplementedError, match=r"channel_attention.*Triton"):
        channel_attention(q, k, v, backend="triton")


def test_bad_arguments_are_named() -> None:
    q, k, v = make_inputs((1, 2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 2, 4\)"):
        channel_attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=r"k has shape \(1, 1, 3, 2, 4\)"):
        channel_attention(q, k[:, :1], v)
    with pytest.raises(ValueError, match=r"v has dtype torch\.float32"):
        channel_attention(q, k, v.float())
    with pytest.raises(TypeError, match=r"q is torch\.int64"):
        channel_attention(q.long(), k.long(), v.long())
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        channel_attention(q, k, v, backend="cuda")
    with pytest.raises(ValueError, match="qkv has shape"):
        channel_attention_packed(torch.stack((q, k), 3))
