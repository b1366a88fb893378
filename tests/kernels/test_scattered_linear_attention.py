"""Scattered linear attention: the reference against the written-out definition, operator and kernels against it."""

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
from vitrail.kernels.scattered_linear_attention import (
    Windows,
    scattered_linear_attention,
    scattered_linear_attention_packed,
    sort_windows,
)
from vitrail.kernels.scattered_linear_attention import windows as windows_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def by_definition(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, eps: float) -> Tensor:
    """One voxel and head at a time, summing over all voxels of the same window."""
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        mates = (ids == ids[i]).nonzero().flatten().tolist()
        for h in range(q.shape[1]):
            weights = [(q[i, h].relu() * k[j, h].relu()).sum() for j in mates]
            out[i, h] = sum(w * v[j, h] for w, j in zip(weights, mates, strict=True)) / (sum(weights) + eps)
    return out


def make_inputs(n: int, heads: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, heads, dim, dtype=dtype) for _ in range(3)]


def draw_ids(draw: random.Random, n: int, kind: str) -> Tensor:
    """Windows of every kind: one for all, one each, crowded and tiny ones mixed, in no order."""
    if kind == "one":
        return torch.full((n,), 7)
    if kind == "each":
        return torch.randperm(n) * 3
    sizes = [draw.choice([1, 1, 2, 3, 40, 90]) for _ in range(n)]
    ids = torch.arange(n).repeat_interleave(torch.tensor(sizes, dtype=torch.long))[:n] * 5 - 11
    return ids[torch.randperm(len(ids))]


@settings(max_examples=30)
@given(n=st.integers(1, 40), heads=st.integers(1, 3), dim=st.integers(1, 5), spread=st.integers(1, 12))
def test_reference_is_the_definition(n: int, heads: int, dim: int, spread: int) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(n, heads, dim)]
    ids = torch.randint(-spread, spread, (n,))
    want = by_definition(*inputs, ids, EPS)
    got = scattered_linear_attention(*inputs, sort_windows(ids), eps=EPS)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["one", "each", "mixed"])
def test_operator_and_packed_forms_agree_with_the_reference(kind: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(150, 2, 4)]
    windows = sort_windows(draw_ids(random.Random(0), 150, kind))
    want = scattered_linear_attention(*inputs, windows, eps=EPS)
    grad = torch.randn_like(want)
    gradients = torch.autograd.grad(want, inputs, grad)
    by_op = torch.ops.vitrail.scattered_linear_attention(*inputs, *windows, EPS)
    assert torch.equal(by_op, want)
    for got, gradient in zip(torch.autograd.grad(by_op, inputs, grad), gradients, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-11, atol=1e-11)
    packed = torch.stack([x.detach() for x in inputs], 1).requires_grad_()
    by_packed_op = torch.ops.vitrail.scattered_linear_attention_packed(packed, *windows, EPS)
    for out in (scattered_linear_attention_packed(packed, windows, eps=EPS), by_packed_op):
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        (got,) = torch.autograd.grad(out, packed, grad)
        torch.testing.assert_close(got, torch.stack(gradients, 1), rtol=1e-11, atol=1e-11)


def test_gradients_are_the_derivatives() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(9, 2, 3)]
    windows = sort_windows(torch.tensor([4, 4, 1, 4, 1, 9, 4, 1, 4]))
    assert torch.autograd.gradcheck(lambda *x: scattered_linear_attention(*x, windows, eps=EPS), inputs)
    assert torch.autograd.gradcheck(lambda *x: torch.ops.vitrail.scattered_linear_attention(*x, *windows, EPS), inputs)


def test_registration() -> None:
    windows = sort_windows(torch.randint(0, 3, (12,)))
    leaves = [x.requires_grad_() for x in make_inputs(12, 2, 4)]
    torch.library.opcheck(torch.ops.vitrail.scattered_linear_attention, (*leaves, *windows, EPS))
    packed = torch.randn(12, 3, 2, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.vitrail.scattered_linear_attention_packed, (packed, *windows, EPS))


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of few voxels, so that small inputs have all kinds of them."""
    monkeypatch.setattr(windows_module, "_LEAST_CHUNK", 32)
    monkeypatch.setattr(windows_module, "_SMALL", 8)
    monkeypatch.setattr(windows_module, "_BUNDLE", 20)


def test_windows_are_found_whatever_their_numbers() -> None:
    windows = sort_windows(torch.tensor([5, -2, 5, 9, -2, 5]))
    assert windows.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert windows.starts.tolist() == [0, 0, 2, 2, 2, 5]
    assert windows.ends.tolist() == [2, 2, 5, 5, 5, 6]
    assert windows.parts[:2].tolist() == [[1, 0, 0, 0], [0, 6, 0, 2]]
    assert all(x.dtype == torch.int32 for x in windows)


def cut_literally(starts: list[int], ends: list[int], chunk: int, small: int, bundle: int) -> list[list[int]]:
    """Parts, window by window: first, end, start and end of the first's window."""
    found: list[list[int]] = []
    extends, last = False, 0
    for start, end in sorted(set(zip(starts, ends, strict=True))):
        if end - start > small:
            firsts = [p for p in range(start, end, chunk) if p == start or end - p >= chunk / 2]
            found += [[p, q, start, end] for p, q in zip(firsts, [*firsts[1:], end], strict=True)]
        elif extends and last // bundle == start // bundle:
            found[-1][1] = end
        else:
            found.append([start, end, start, end])
        extends, last = end - start <= small, start
    return found


@pytest.mark.parametrize("kind", ["one", "each", "mixed"])
@pytest.mark.parametrize("n", [1, 31, 200, 700])
def test_parts_are_those_of_a_loop_over_windows(n: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    found = sort_windows(draw_ids(random.Random(n), n, kind))
    want = cut_literally(found.starts.tolist(), found.ends.tolist(), windows_module.chunk_size(n), 8, 20)
    assert found.parts[0].tolist() == [len(want), 0, 0, 0]
    assert found.parts[1 : len(want) + 1].tolist() == want
    assert not found.parts[len(want) + 1 :].any()
    assert want[0][0] == 0
    assert want[-1][1] == n


@needs_triton
@pytest.mark.parametrize("kind", ["one", "each", "mixed"])
def test_fused_windows_are_those_of_the_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vitrail.kernels.scattered_linear_attention.triton_windows")
    shrink(monkeypatch)
    ids = draw_ids(random.Random(1), 300, kind).to(DEVICE)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(windows_module, "runs_kernels", lambda _, fused=fused: fused)
        results.append(sort_windows(ids))
    for name, ours, theirs in zip(Windows._fields, *results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name


def test_no_voxels() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(0, 2, 16)]
    windows = sort_windows(torch.empty(0, dtype=torch.long))
    for out in (
        scattered_linear_attention(*inputs, windows),
        torch.ops.vitrail.scattered_linear_attention(*inputs, *windows, EPS),
    ):
        assert out.shape == (0, 2, 16)
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert all(d.shape == (0, 2, 16) for d in gradients)


def test_queries_without_a_positive_weight_give_zero() -> None:
    q, k, v = make_inputs(20, 2, 4)
    windows = sort_windows(torch.zeros(20, dtype=torch.long))
    leaves = [x.requires_grad_() for x in (-q.abs(), k, v)]
    out = scattered_linear_attention(*leaves, windows)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(d.isfinite().all() for d in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_survives_a_crowded_window(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) + 3 for x in make_inputs(40_000, 1, 16))
    windows = sort_windows(torch.zeros(len(q), dtype=torch.long))
    assert (k.double().relu().transpose(0, 1).mT @ v.double().transpose(0, 1)).max() > torch.finfo(torch.float16).max
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, exact = scattered_linear_attention(*leaves, windows), scattered_linear_attention(*wide, windows)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_autocast_rounds_the_inputs_and_nothing_else() -> None:
    q, k, v = make_inputs(30, 2, 8, torch.float32)
    windows = sort_windows(torch.randint(0, 4, (30,)))
    with torch.autocast("cpu", torch.bfloat16):
        out = scattered_linear_attention(q, k, v, windows)
        packed = scattered_linear_attention_packed(torch.stack((q, k, v), 1), windows)
    want = scattered_linear_attention(*(x.bfloat16() for x in (q, k, v)), windows)
    assert torch.equal(out, want)
    assert torch.equal(packed, want)


def test_flops_leave_out_the_padding_of_windows() -> None:
    qkv = torch.randn(50, 3, 2, 8, requires_grad=True)
    windows = sort_windows(torch.randint(0, 9, (50,)))
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.vitrail.scattered_linear_attention_packed(qkv, *windows, EPS)
    assert counter.get_total_flops() == 2 * 2 * (50 * 2 * 8 * 8)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 6 * 2 * (50 * 2 * 8 * 8)


def sizes_of_terms(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, windows: Windows) -> list[float]:
    """Norms of result and gradients had all terms of the products with a window's sums the same sign.

    Rounding errors are relative to these: the gradient of a window's only query is nothing but what is left when its
    two terms, which differ by EPS alone, cancel.
    """
    ids = torch.empty_like(windows.starts).scatter(0, windows.order.long(), windows.starts)
    together = (ids[:, None] == ids).to(q.dtype)
    q, k = q.relu(), k.relu()
    products = torch.einsum("ij,jhd,jhe->ihde", together, k, v)
    key_sums = torch.einsum("ij,jhd->ihd", together, k)
    denominator = (q * key_sums).sum(-1, keepdim=True) + EPS
    g = grad / denominator
    d_denominator = -(g * torch.einsum("ihd,ihde->ihe", q, products)).sum(-1, keepdim=True) / denominator
    d_products = torch.einsum("ij,ihd,ihe->jhde", together, q, g).abs()
    d_key_sums = torch.einsum("ij,ihd->jhd", together, d_denominator * q).abs()
    terms = (
        torch.einsum("ihd,ihde->ihe", q, products.abs()) / denominator,
        torch.einsum("ihe,ihde->ihd", g.abs(), products.abs()) + d_denominator.abs() * key_sums,
        torch.einsum("jhe,jhde->jhd", v.abs(), d_products) + d_key_sums,
        torch.einsum("jhd,jhde->jhe", k, d_products),
    )
    return [x.norm().item() for x in terms]


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["one", "each", "mixed"])
@pytest.mark.parametrize("seed", seeds(4))
def test_fused_is_as_exact_as_eager(seed: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vitrail.kernels.scattered_linear_attention.triton")
    shrink(monkeypatch)
    monkeypatch.setattr(triton, "_BLOCK", 16)  # several tiles in a part
    draw = random.Random(seed)
    n, heads, dim = draw.choice([1, 17, 48, 140, 200]), draw.randint(1, 2), draw.choice([16, 32])
    windows = Windows(*(x.to(DEVICE) for x in sort_windows(draw_ids(draw, n, kind))))
    inputs = [x.to(DEVICE, dtype) for x in make_inputs(n, heads, dim)]
    grad = torch.randn(n, heads, dim, device=DEVICE).to(dtype)
    packed, strided = draw.random() < 0.5, draw.random() < 0.5
    if strided:
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = (
            scattered_linear_attention_packed(torch.stack(leaves, 1), windows, eps=EPS, backend=backend)
            if packed
            else scattered_linear_attention(*leaves, windows, eps=EPS, backend=backend)
        )
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    # Half-precision products round two operands to TF32's 11 bits, the eager operator none.
    rounding = torch.finfo(dtype).eps if dtype == torch.float32 else 2**-10
    sizes = sizes_of_terms(*(x.double() for x in inputs), grad.double(), windows)
    results = zip(run(torch.float64, "eager"), run(dtype, "triton"), run(dtype, "eager"), sizes, strict=True)
    for exact, ours, theirs, size in results:
        assert ours.isfinite().all()
        assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + rounding * size


@needs_triton
def test_fused_writes_every_element_and_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vitrail.kernels.scattered_linear_attention.triton")
    shrink(monkeypatch)
    monkeypatch.setattr(triton, "_BLOCK", 16)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    windows = Windows(*(x.to(DEVICE) for x in sort_windows(draw_ids(random.Random(5), 120, "mixed"))))
    inputs = [x.to(DEVICE).requires_grad_() for x in make_inputs(120, 2, 16, torch.float32)]
    before = [x.detach().clone() for x in inputs]
    out = scattered_linear_attention(*inputs, windows, backend="triton")
    again = scattered_linear_attention(*inputs, windows, backend="triton")
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert torch.equal(out, again)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    qkv = torch.randn(5000, 3, 4, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    ids = torch.randint(0, 300, (5000,), device="cuda")
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = scattered_linear_attention_packed(qkv, sort_windows(ids), backend="triton")
            torch.autograd.grad(out, qkv, torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 3000, 400_000])
def test_fused_at_full_size(n: int) -> None:
    # A fifth of all voxels in one window, many windows with a few.
    ids = (torch.randn(n, device="cuda").abs() ** 3 * 50).long()
    qkv = torch.randn(n, 3, 4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    windows = sort_windows(ids)
    grad = torch.randn(n, 4, 32, device="cuda")
    results = []
    for leaf, backend in ((qkv, "triton"), (qkv, "triton"), (qkv.detach().float().requires_grad_(), "eager")):
        out = scattered_linear_attention_packed(leaf, windows, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))))
    for ours, again, exact in zip(*results, strict=True):
        assert torch.equal(ours, again)
        assert (ours.float() - exact).norm() / exact.norm() < torch.finfo(torch.bfloat16).eps


def test_choice_is_recorded_and_the_missing_kernel_is_named() -> None:
    q, k, v = make_inputs(3, 1, 4)
    windows = sort_windows(torch.zeros(3, dtype=torch.long))
    with record_choices() as choices:
        scattered_linear_attention(q, k, v, windows)
    assert [(c.op, c.backend) for c in choices] == [("scattered_linear_attention", "eager")]
    with pytest.raises(NotImplementedError, match=r"scattered_linear_attention.*Triton"):
        scattered_linear_attention(q, k, v, windows, backend="triton")


def test_bad_arguments_are_named() -> None:
    q, k, v = make_inputs(5, 2, 4)
    windows = sort_windows(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"q has shape \(5, 8\)"):
        scattered_linear_attention(q.flatten(1), k, v, windows)
    with pytest.raises(ValueError, match="k has shape"):
        scattered_linear_attention(q, k[:4], v, windows)
    with pytest.raises(TypeError, match=r"q is torch\.int64"):
        scattered_linear_attention(q.long(), k.long(), v.long(), windows)
    with pytest.raises(ValueError, match=r"windows\.order has shape \(5,\)"):
        scattered_linear_attention(q[:4], k[:4], v[:4], windows)
    with pytest.raises(TypeError, match=r"windows\.ends is torch\.int64"):
        scattered_linear_attention(q, k, v, windows._replace(ends=windows.ends.long()))
    with pytest.raises(ValueError, match="eps is 0"):
        scattered_linear_attention(q, k, v, windows, eps=0.0)
    with pytest.raises(ValueError, match="qkv has shape"):
        scattered_linear_attention_packed(torch.stack((q, k), 1), windows)
    with pytest.raises(TypeError, match="window_ids is torch"):
        sort_windows(torch.zeros(5))
    with pytest.raises(ValueError, match=r"window_ids has shape \(5, 1\)"):
        sort_windows(torch.zeros(5, 1, dtype=torch.long))
