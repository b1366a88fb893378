"""The MLP: the reference against the written-out definition, operator and kernel against the reference."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cuda_graphs import assert_a_cuda_graph_repeats
from _exactness import assert_as_exact
from _graphs import keep_graphs
from _seeds import seeds
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices, settings
from vitrail.kernels.mlp import mlp
from vitrail.kernels.mlp.api import runs_fused
from vitrail.kernels.mlp.op import fused_support

if HAS_TRITON:
    import triton
    import triton.language as tl

    from vitrail.kernels._common.triton import gelu_16, gelu_16_and_slope

    @triton.jit
    def _gelu_kernel(x_ptr, y_ptr, again_ptr, slope_ptr, n, BLOCK: tl.constexpr):
        places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + places, mask=places < n, other=0.0)
        tl.store(y_ptr + places, gelu_16(x), mask=places < n)
        again, slope = gelu_16_and_slope(x)
        tl.store(again_ptr + places, again, mask=places < n)
        tl.store(slope_ptr + places, slope, mask=places < n)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
_DTYPES = pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
LAYOUTS = {
    "contiguous": lambda x: x,
    "rows_apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "cropped": lambda x: torch.cat((x, x), 0)[: len(x)] if x.dim() < 3 else torch.cat((x, x), 1)[:, : x.shape[1]],
    "channels_first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def make_inputs(
    leading: tuple[int, ...], dim: int, hidden: int, out: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Rows, weights and biases, (x, w1, b1, w2, b2); the first product reaches GELU's curve and both its tails."""
    shapes = (*leading, dim), (hidden, dim), (hidden,), (out, hidden), (out,)
    x, w1, b1, w2, b2 = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype) for t in (x, 2 * w1 / dim**0.5, b1 / 2, w2 / hidden**0.5, b2 / 2)]


def by_definition(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """One number at a time, in Python's own."""

    def linear(row: list[float], weight: Tensor, bias: Tensor | None) -> list[float]:
        starts = [0.0] * len(weight) if bias is None else bias.tolist()
        return [
            start + sum(a * b for a, b in zip(row, column, strict=True))
            for start, column in zip(starts, weight.tolist(), strict=True)
        ]

    def gelu(value: float) -> float:
        return 0.5 * value * math.erfc(-value / math.sqrt(2))

    rows = [
        linear([gelu(h) for h in linear(row, w1, b1)], w2, b2) for row in x.reshape(-1, x.shape[-1]).tolist()
    ]  # fmt: skip
    return x.new_tensor(rows).view(*x.shape[:-1], len(w2))


def without(inputs: list[Tensor], *absent: int) -> list[Any]:
    return [None if place in absent else t for place, t in enumerate(inputs)]


@pytest.mark.parametrize("absent", [(), (2,), (4,), (2, 4)], ids=str)
@pytest.mark.parametrize("leading", [(2, 3), (2, 1, 3), ()], ids=str)
def test_reference_is_the_definition(leading: tuple[int, ...], absent: tuple[int, ...]) -> None:
    inputs = without(make_inputs(leading, 4, 7, 3), *absent)
    want = by_definition(*inputs)
    torch.testing.assert_close(mlp(*inputs), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.ops.vitrail.mlp(*inputs), want, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_derivatives() -> None:
    inputs = [t.requires_grad_() for t in make_inputs((2, 3), 4, 5, 3)]
    assert torch.autograd.gradcheck(torch.ops.vitrail.mlp, inputs)
    assert torch.autograd.gradcheck(
        lambda x, w1, w2: torch.ops.vitrail.mlp(x, w1, None, w2, None), [*inputs[:2], inputs[3]]
    )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=needs_triton)], ids=str)
def test_registration(dtype: torch.dtype) -> None:
    """By the reference and by the kernel."""
    x, *parameters = (t.to(DEVICE) for t in make_inputs((2, 3), 5, 6, 4, dtype))
    for absent in ((), (2,), (2, 4)):
        inputs = without([LAYOUTS["channels_first"](x), *parameters], *absent)
        inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
        torch.library.opcheck(torch.ops.vitrail.mlp.default, tuple(inputs))


def test_only_inputs_are_saved_and_only_wanted_gradients_computed() -> None:
    x, w1, b1, w2, b2 = make_inputs((2, 3), 4, 5, 3)
    w2.requires_grad_()
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = torch.ops.vitrail.mlp(x, w1, b1, w2, b2)
    assert set(saved) <= {t.data_ptr() for t in (x, w1, b1, w2, b2)}
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * (4 * 5 + 5 * 3)  # the hidden map again, and the weight's gradient
    assert w2.grad is not None
    assert x.grad is w1.grad is b1.grad is b2.grad is None


def test_products_are_counted_as_those_of_the_layers() -> None:
    inputs = [t.requires_grad_() for t in make_inputs((2, 3), 4, 5, 7)]
    with FlopCounterMode(display=False) as plain:
        out = F.linear(F.gelu(F.linear(*inputs[:3])), *inputs[3:])
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.vitrail.mlp(*inputs)
    assert counter.get_total_flops() == plain.get_total_flops() == 2 * 6 * (4 * 5 + 5 * 7)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * (3 * 4 * 5 + 2 * 5 * 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_gives_the_dtype_that_pytorch_gives(dtype: torch.dtype) -> None:
    x, *parameters = make_inputs((2, 3), 4, 5, 3, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = F.linear(F.gelu(F.linear(x, *parameters[:2])), *parameters[2:])
        out = mlp(x, *parameters)
        assert out.dtype == want.dtype
        if dtype == torch.float32:  # a layer's weights, rows of half precision
            assert mlp(x.bfloat16(), *parameters).dtype == torch.bfloat16
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
def test_empty_batch(backend: str) -> None:
    inputs = [t.to(DEVICE).requires_grad_() for t in make_inputs((0, 3), 4, 5, 7, torch.float16)]
    out = mlp(*inputs, backend=backend)
    assert out.shape == (0, 3, 7)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
    assert not any(g.any() for g in gradients)


def test_compiles_in_one_graph_at_any_size() -> None:
    backend, graphs = keep_graphs()

    def run(*inputs: Tensor) -> Tensor:
        return torch.ops.vitrail.mlp(*inputs) + 1

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for leading in ((2, 3), (4, 7), (9, 2)):
        inputs = [t.requires_grad_() for t in make_inputs(leading, 8, 6, 5)]
        out = compiled(*inputs)
        torch.testing.assert_close(out, run(*inputs))
        out.sum().backward()
    assert len(graphs) == 2  # forward and backward
    for graph, name in zip(graphs, ("mlp", "mlp_backward"), strict=True):
        assert graph.count(f"vitrail.{name}.default") == 1


def test_choice_is_recorded_and_what_the_kernel_does_not_take_is_named() -> None:
    inputs = make_inputs((2,), 4, 5, 3, torch.float32)
    with record_choices() as choices:
        mlp(*inputs)
        mlp(*make_inputs((2,), 4, 5, 1000))
    assert [(c.op, c.backend) for c in choices] == [("mlp", "eager")] * 2
    assert "float16 and bfloat16, the input is torch.float32" in choices[0].reason
    assert "up to 256 channels here, the input or output has 1000" in choices[1].reason
    with pytest.raises(NotImplementedError, match=r"mlp.*float16 and bfloat16"):
        mlp(*inputs, backend="triton")


@needs_triton
def test_where_the_kernel_runs_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(device: str, dtype: torch.dtype, dim: int = 96) -> bool:
        with FakeTensorMode():
            inputs = [t.to(device, dtype) for t in make_inputs((2,), dim, 5, dim)]
            return runs_fused(inputs[0], inputs[3])

    cuda = [(torch.bfloat16, 96), (torch.float16, 64), (torch.float32, 96), (torch.float64, 96), (torch.float16, 1000)]
    assert [said("cuda", *given) for given in cuda] == [True, True, False, False, False]
    assert not said("cpu", torch.float16)
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` does nothing without a device
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert said("cuda", torch.float32)
    finally:
        torch.set_autocast_enabled("cuda", False)
    monkeypatch.setattr(settings, "default_backend", "eager")
    assert not said("cuda", torch.float16)
    monkeypatch.setattr(settings, "default_backend", "triton")
    assert said("cuda", torch.float16)


def test_devices_with_less_shared_memory_take_fewer_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    def most() -> str:
        with record_choices() as choices:
            mlp(*make_inputs((2,), 300, 5, 3, torch.float16))
        return choices[0].reason

    assert "up to 256 channels" in most()
    inputs = make_inputs((2,), 193, 5, 3, torch.float16)
    assert "up to 192 channels" in fused_support(inputs[0], inputs[3], backward=True).reason
    monkeypatch.setattr("vitrail.kernels.mlp.op.shared_memory", lambda device: 163 * 1024)  # an A100's
    assert "up to 128 channels" in most()
    assert "up to 128 channels" in fused_support(inputs[0], inputs[3], backward=True).reason


def results(inputs: list[Any], grad: Tensor, backend: str) -> list[Tensor]:
    """The result and the gradient of every input that there is."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = mlp(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)]


def assert_exact(inputs: list[Any], grad: Tensor) -> None:
    """The fused operator is at most twice as far from the truth as the eager one; a schedule changes nothing."""
    fused = results(inputs, grad, "triton")
    eager = results(inputs, grad, "eager")
    truth = results([None if t is None else t.double() for t in inputs], grad.double(), "eager")
    for exact, ours, theirs in zip(truth, fused, eager, strict=True):
        assert ours.shape == theirs.shape
        assert_as_exact(ours, theirs, exact)
    assert all(torch.equal(a, b) for a, b in zip(fused, results(inputs, grad, "triton"), strict=True))


def draw_case(seed: int, dtype: torch.dtype, n_rows: int, dim: int, hidden: int, out: int) -> tuple[list[Any], Tensor]:
    """Inputs in some layout, some without a bias, and the gradient of the result."""
    draw = random.Random(seed)
    leading = draw.choice([(n_rows,), (1, n_rows), (n_rows // 2 or 1, 2)])
    x, *parameters = (t.to(DEVICE) for t in make_inputs(leading, dim, hidden, out, dtype))
    grad = torch.randn((*leading, out), device=DEVICE).to(dtype)
    x, grad = (LAYOUTS[draw.choice(sorted(LAYOUTS))](t) for t in (x, grad))
    parameters[2] = LAYOUTS[draw.choice(["contiguous", "channels_first"])](parameters[2])
    return without([x, *parameters], *draw.choice([(), (), (2,), (4,), (2, 4)])), grad


def use_small_tiles(monkeypatch: pytest.MonkeyPatch, draw: random.Random) -> None:
    """Several programs and blocks on few rows."""
    forward = pytest.importorskip("vitrail.kernels.mlp.triton.forward")
    backward = pytest.importorskip("vitrail.kernels.mlp.triton.backward")
    for kernels in (forward, backward):
        tile = kernels.Tile(16, draw.choice([16, 32]), 4, 2, draw.choice([1, 12]))
        monkeypatch.setattr(kernels, "TILES", {1000: tile})


@needs_triton
@_DTYPES
@pytest.mark.parametrize("seed", seeds(12))
def test_fused_is_as_exact_as_eager(
    seed: int, dtype: torch.dtype, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    use_small_tiles(monkeypatch, draw)
    dims = [1, 7, 16, 20, 33, 48, 96, 40]
    n_rows, hidden = draw.choice([1, 37, 52, 70]), draw.choice([1, 9, 32, 40, 70])
    assert_exact(*draw_case(seed, dtype, n_rows, draw.choice(dims), hidden, draw.choice(dims)))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=needs_triton)], ids=str)
def test_gradients_that_are_not_needed_are_left_out(dtype: torch.dtype) -> None:
    """By the reference and by the kernel; those that are needed are the same numbers."""
    inputs = [t.to(DEVICE) for t in make_inputs((5,), 5, 9, 6, dtype)]
    grad = torch.randn((5, 6), device=DEVICE).to(dtype)
    whole = torch.ops.vitrail.mlp_backward(grad, *inputs, [True] * 5)
    for subset in ("x", "w1", "b1", "w2", "b2", "x w2 b2", "w1 b1 w2", ""):
        needed = [name in subset.split() for name in ("x", "w1", "b1", "w2", "b2")]
        found = torch.ops.vitrail.mlp_backward(grad, *inputs, needed)
        for gradient, full, is_needed in zip(found, whole, needed, strict=True):
            torch.testing.assert_close(gradient, full if is_needed else full.new_empty(0))


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("seed", seeds(30))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    draw = random.Random(seed)
    dims = [1, 20, 64, 80, 96, 100, 128, 192, 250, 256]
    dim = draw.choice(dims)
    out, hidden = draw.choice([dim, draw.choice(dims)]), draw.choice([dim, 3 * dim, 4 * dim, draw.randint(1, 1000)])
    assert_exact(*draw_case(seed, dtype, draw.randint(1, 20_000), dim, hidden, out))


@needs_triton
def test_gelu_for_16_bits() -> None:
    """Between its own bounds of float64, on small numbers, the curve, both tails and what is beyond."""

    def fused(x: Tensor) -> tuple[Tensor, Tensor]:
        y, again, slope = (torch.empty_like(x) for _ in range(3))
        _gelu_kernel[(triton.cdiv(len(x), 4096),)](x, y, again, slope, len(x), BLOCK=4096)
        torch.testing.assert_close(again, y, rtol=0, atol=0, equal_nan=True)
        return y, slope

    powers = torch.logspace(-30, 30, 4001)
    x = torch.cat((torch.linspace(-9, 9, 60_001), powers, -powers, torch.zeros(1))).to(DEVICE)
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() / math.sqrt(2))
    found, slope = fused(x)
    error = (found.double() - exact).abs()
    assert (error <= 7e-6 * exact.abs() + 6e-9).all()
    assert (error <= 7e-6 * exact.abs())[exact.abs() >= 1e-4].all()
    small = x.abs() < 1e-3
    assert (error <= 7e-6 * exact.abs() + 1e-37)[small].all()
    assert ((slope.double() - torch.ops.aten.gelu_backward(torch.ones_like(exact), x.double())).abs() <= 4e-6).all()
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0], device=DEVICE)
    found, slope = fused(special)
    assert found[[0, 3]].tolist() == [math.inf, 0.0]
    assert found[2].isnan()
    assert slope[:3].isnan().all()  # as PyTorch's


@needs_triton
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    inputs = [t.to(DEVICE) for t in make_inputs((20,), 16, 20, 16, torch.float16)]
    inputs[0][3, 2] = value
    out = mlp(*inputs, backend="triton")
    assert (~out.isfinite()).any(1).nonzero().tolist() == [[3]]


@pytest.mark.gpu
def test_autocast_on_a_gpu() -> None:
    inputs = [t.cuda() for t in make_inputs((3, 40), 96, 384, 96, torch.float32)]
    with torch.autocast("cuda", torch.bfloat16), record_choices() as choices:
        out = mlp(*inputs)
        want = F.linear(F.gelu(F.linear(*inputs[:3])), *inputs[3:])
    assert [choice.backend for choice in choices] == ["triton"]
    assert out.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_fused_runs_in_a_cuda_graph() -> None:
    inputs = [t.cuda() for t in make_inputs((5, 40), 96, 384, 96, torch.bfloat16)]
    assert_a_cuda_graph_repeats(lambda: [mlp(*inputs, backend="triton")])


@pytest.mark.gpu
def test_training_runs_in_a_cuda_graph() -> None:
    inputs = [t.cuda().requires_grad_() for t in make_inputs((5, 40), 192, 768, 192, torch.bfloat16)]
    assert_a_cuda_graph_repeats(lambda: torch.autograd.grad(mlp(*inputs, backend="triton").square().sum(), inputs))


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count() -> None:
    x, *parameters = (t.cuda() for t in make_inputs((1,), 192, 16, 192, torch.bfloat16))
    n_rows = 2**31 // 192 + 100
    x = torch.randn((n_rows, 192), device="cuda", dtype=torch.bfloat16)
    last = mlp(x[-200:], *parameters, backend="triton")
    assert torch.equal(mlp(x, *parameters, backend="triton")[-200:], last)


def test_bad_arguments_are_named() -> None:
    x, w1, b1, w2, b2 = make_inputs((2, 3), 4, 5, 7)
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        mlp(x[0, 0, 0], w1, b1, w2, b2)
    with pytest.raises(ValueError, match=r"w1 has shape \(5, 3\); expected \(5, 4\)"):
        mlp(x, w1[:, :3], b1, w2, b2)
    with pytest.raises(ValueError, match=r"w2 has shape \(7, 4\); expected \(7, 5\)"):
        mlp(x, w1, b1, w2[:, :4], b2)
    with pytest.raises(ValueError, match=r"w1 has shape \(4,\); expected 2 dimensions, \(H, C\)"):
        mlp(x, w1[0], b1, w2, b2)
    with pytest.raises(ValueError, match=r"b1 has shape \(1,\); expected \(5,\)"):
        mlp(x, w1, b1[:1], w2, b2)
    with pytest.raises(ValueError, match=r"b2 has shape \(1,\); expected \(7,\)"):
        mlp(x, w1, b1, w2, b2[:1])
    with pytest.raises(ValueError, match=r"w1 has dtype torch\.float32, x has torch\.float64"):
        mlp(x, w1.float(), b1, w2, b2)
    with pytest.raises(ValueError, match="b2 has device meta, x has cpu"):
        mlp(x, w1, b1, w2, b2.to("meta"))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        mlp(x.long(), w1, b1, w2, b2)
    with pytest.raises(TypeError, match=r"b1 is torch\.int64"):
        mlp(x, w1, b1.long(), w2, b2)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        mlp(x, w1, b1, w2, b2, backend="cuda")
