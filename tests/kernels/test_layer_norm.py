"""Layer normalisation: the reference against the written-out definition, operator and kernels against the reference."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from _cuda_graphs import assert_a_cuda_graph_repeats
from _exactness import assert_as_exact
from _graphs import keep_graphs
from _seeds import seeds
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.layer_norm import layer_norm
from vitrail.kernels.layer_norm.api import _check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LAYOUTS = {
    "contiguous": lambda x: x,
    "rows_apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "cropped": lambda x: torch.cat((x, x), 0)[: len(x)] if x.dim() < 3 else torch.cat((x, x), 1)[:, : x.shape[1]],
    "channels_first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows far from zero, weight and bias."""
    dim = shape[-1:]
    return [3 * torch.randn(shape, dtype=dtype) + 2, *(torch.randn(dim, dtype=dtype) for _ in range(2))]


def by_definition(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """One row at a time, in Python's own numbers."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        rows.append([(value - mean) / math.sqrt(variance + eps) for value in row])
    y = x.new_tensor(rows).view(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("n_parameters", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (7,), (3, 1)], ids=str)
def test_reference_is_the_definition(shape: tuple[int, ...], n_parameters: int) -> None:
    x, *parameters = make_inputs(shape)
    given = [p if number < n_parameters else None for number, p in enumerate(parameters)]
    want = by_definition(x, *given, 1e-3)
    torch.testing.assert_close(layer_norm(x, *given, 1e-3), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.ops.vitrail.layer_norm(x, *given, 1e-3), want, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_derivatives() -> None:
    inputs = [t.requires_grad_() for t in make_inputs((2, 3, 5))]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.vitrail.layer_norm(*t, 1e-3), inputs)
    assert torch.autograd.gradcheck(lambda x: torch.ops.vitrail.layer_norm(x, None, None, 1e-3), inputs[:1])


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_triton)], ids=["reference", "kernels"])
def test_registration(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr("vitrail.kernels.layer_norm.op.MOST_CHANNELS", 0)
    x, weight, bias = (t.float().to(DEVICE) for t in make_inputs((2, 3, 5)))
    x = LAYOUTS["channels_first"](x)
    for given in ((x, weight, bias), (x, weight, None), (x, None, None)):
        inputs = [None if t is None else t.detach().requires_grad_() for t in given]
        torch.library.opcheck(torch.ops.vitrail.layer_norm.default, (*inputs, 1e-5))


def test_only_inputs_are_saved_and_only_wanted_gradients_returned() -> None:
    x, weight, bias = make_inputs((2, 3, 5))
    weight.requires_grad_()
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = torch.ops.vitrail.layer_norm(x, weight, bias, 1e-5)
    assert set(saved) <= {t.data_ptr() for t in (x, weight, bias)}
    out.sum().backward()
    assert weight.grad is not None
    assert x.grad is bias.grad is None


def test_result_is_contiguous() -> None:
    x, weight, bias = make_inputs((2, 4, 3, 5))
    for function in (layer_norm, torch.ops.vitrail.layer_norm):
        assert function(LAYOUTS["channels_first"](x), weight, bias, 1e-5).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_gives_the_dtype_that_pytorch_gives(dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs((2, 3, 5), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm(x, weight, bias).dtype == F.layer_norm(x, (5,), weight, bias).dtype
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` does nothing without a device
    try:
        with FakeTensorMode():
            x, weight, bias = (torch.empty(t.shape, dtype=dtype, device="cuda") for t in (x, weight, bias))
            out, want = layer_norm(x, weight, bias), F.layer_norm(x, (5,), weight, bias)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert out.dtype == want.dtype


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
def test_empty_batch(backend: str) -> None:
    x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in make_inputs((0, 3, 5)))
    out = layer_norm(x, weight, bias, backend=backend)
    assert out.shape == (0, 3, 5)
    gradients = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert [g.shape for g in gradients] == [(0, 3, 5), (5,), (5,)]
    assert not any(g.any() for g in gradients)


def test_compiles_in_one_graph_at_any_size() -> None:
    def train(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.vitrail.layer_norm(x, weight, bias, 1e-5) + 1

    backend, graphs = keep_graphs()
    compiled = torch.compile(train, fullgraph=True, backend=backend, dynamic=True)
    for shape in ((2, 3, 5), (4, 7, 5), (9, 2, 5)):
        inputs = [t.requires_grad_() for t in make_inputs(shape)]
        out = compiled(*inputs)
        torch.testing.assert_close(out, train(*inputs))
        out.sum().backward()
    assert len(graphs) == 2  # forward and backward
    for graph, name in zip(graphs, ("layer_norm", "layer_norm_backward"), strict=True):
        assert graph.count(f"vitrail.{name}.default") == 1


def test_choice_is_recorded_and_what_the_kernels_do_not_take_is_named() -> None:
    x, weight, bias = make_inputs((2, 5))
    with record_choices() as choices:
        layer_norm(x, weight, bias)
        layer_norm(torch.zeros(1, 8193))
    assert [(c.op, c.backend) for c in choices] == [("layer_norm", "eager")] * 2
    assert "rows of 2 to 8192 values, the input has 8193" in choices[1].reason
    with pytest.raises(NotImplementedError, match=r"layer_norm.*Triton"):
        layer_norm(x, weight, bias, backend="triton")


def results(inputs: list[Tensor], grad: Tensor, eps: float, backend: str) -> list[Tensor]:
    """The result and the gradient of every input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = layer_norm(*leaves, eps=eps, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_exact(inputs: list[Tensor], grad: Tensor, eps: float) -> None:
    """The fused operator is at most twice as far from the truth as the eager one; a schedule changes nothing."""
    fused = results(inputs, grad, eps, "triton")
    eager = results(inputs, grad, eps, "eager")
    truth = results([t.double() for t in inputs], grad.double(), eps, "eager")
    for exact, ours, theirs in zip(truth, fused, eager, strict=True):
        assert_as_exact(ours, theirs, exact)
    assert all(torch.equal(a, b) for a, b in zip(fused, results(inputs, grad, eps, "triton"), strict=True))


def draw_case(seed: int, dtype: torch.dtype, n_rows: int, dim: int) -> tuple[list[Tensor], Tensor, float]:
    """Inputs in some layout, with some of the parameters, the gradient of the result, and eps."""
    draw = random.Random(seed)
    leading = draw.choice([(n_rows,), (1, n_rows), (n_rows // 2 or 1, 2)])
    x, *parameters = make_inputs((*leading, dim), torch.float32)
    x, grad = (LAYOUTS[draw.choice(sorted(LAYOUTS))](t.to(DEVICE, dtype)) for t in (x, torch.randn(x.shape)))
    kept = draw.choice([dtype, torch.float32]) if DEVICE == "cpu" else dtype  # PyTorch's takes both on CPUs only
    parameters = [p.to(DEVICE, kept) for p in parameters[: draw.choice([0, 1, 2, 2, 2])]]
    return [x, *parameters], grad, draw.choice([1e-6, 1e-5, 1e-2])


@needs_triton
@_DTYPES
@pytest.mark.parametrize("seed", seeds(6))
def test_fused_is_as_exact_as_eager(
    seed: int, dtype: torch.dtype, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("vitrail.kernels.layer_norm.triton")
    draw = random.Random(seed)
    if DEVICE == "cpu":  # several tiles, programs and steps on few rows
        monkeypatch.setattr(triton, "_FORWARD", triton.Tile(draw.choice([1, 4]), 1))
        monkeypatch.setattr(triton, "_BACKWARD", {8192: triton.Tile(draw.choice([1, 4]), 1, draw.choice([1, 3]))})
        monkeypatch.setattr(triton, "_PARTS", 2)
    dim = draw.choice([2, 3, 7, 16, 20, 33, 96])
    assert_exact(*draw_case(seed, dtype, draw.randint(1, 11), dim))


@needs_triton
def test_equal_values_without_eps_leave_other_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vitrail.kernels.layer_norm.triton")
    tile = triton.Tile(1, 1, 1)  # four rows, of which three exist
    monkeypatch.setattr(triton, "_FORWARD", tile)
    monkeypatch.setattr(triton, "_BACKWARD", {8192: tile})
    x, weight, bias = (t.float().to(DEVICE) for t in make_inputs((3, 7)))
    assert_exact([x, weight, bias], torch.randn_like(x), 0.0)
    x[1] = 5.0
    out = layer_norm(x, weight, bias, 0.0, backend="triton")
    assert out.isfinite().all(1).tolist() == [True, False, True]


@needs_triton
def test_a_large_mean_costs_no_digits() -> None:
    """A variance that is a difference of squares would be lost."""
    x = (1000 + torch.randn(4, 64)).to(DEVICE)
    assert_exact([x], torch.randn_like(x), 1e-5)


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("seed", seeds(30))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    draw = random.Random(seed)
    dim = draw.choice([2, 20, 64, 96, 100, 128, 192, 256, 384, 512, 768, 1024, 1536, 3000, 8192])
    assert_exact(*draw_case(seed, dtype, draw.randint(1, 3_000_000 // (dim + 100)), dim))


@pytest.mark.gpu
def test_autocast_on_a_gpu() -> None:
    x, weight, bias = (t.float().cuda() for t in make_inputs((3, 40, 96)))
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cuda", torch.bfloat16):
            out, want = layer_norm(x.to(dtype), weight, bias), F.layer_norm(x.to(dtype), (96,), weight, bias)
        assert out.dtype == want.dtype == torch.float32
        torch.testing.assert_close(out, want)


@pytest.mark.gpu
def test_fused_runs_in_a_cuda_graph() -> None:
    x, weight, bias = (t.float().cuda() for t in make_inputs((5, 40, 96)))
    assert_a_cuda_graph_repeats(lambda: results([x, weight, bias], x.cos(), 1e-5, "triton"))


def test_bad_arguments_are_named() -> None:
    x, weight, bias = make_inputs((2, 3, 5))
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        layer_norm(x[0, 0, 0])
    with pytest.raises(ValueError, match=r"weight has shape \(4,\); expected \(5,\)"):
        layer_norm(x, weight[:4])
    with pytest.raises(ValueError, match=r"bias has shape \(1,\); expected \(5,\)"):
        layer_norm(x, weight, bias[:1])
    with pytest.raises(ValueError, match="bias is given without weight"):
        layer_norm(x, None, bias)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float16, x has torch\.float32; allowed"):
        layer_norm(x.float(), weight.half())
    with pytest.raises(ValueError, match=r"bias has dtype torch\.bfloat16, weight has torch\.float32"):
        layer_norm(x.bfloat16(), weight.float(), bias.bfloat16())
    with pytest.raises(ValueError, match="bias is on meta"):
        layer_norm(x, weight, bias.to("meta"))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        layer_norm(x.long())
    with pytest.raises(TypeError, match=r"weight is torch\.int64"):
        layer_norm(x, weight.long())
    with pytest.raises(ValueError, match=r"eps is -1\.0"):
        layer_norm(x, weight, bias, -1.0)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        layer_norm(x, weight, bias, backend="cuda")


def test_dtypes_need_to_fit_only_as_autocast_leaves_them() -> None:
    x, weight = torch.randn(2, 4), torch.randn(4, dtype=torch.bfloat16)
    _check(x, weight, None, 1e-5, True)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.bfloat16, x has torch\.float32"):
        _check(x, weight, None, 1e-5, False)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float64, x has torch\.float32"):
        _check(x.bfloat16(), weight.double(), None, 1e-5, True)
