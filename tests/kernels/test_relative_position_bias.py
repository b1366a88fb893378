"""The relative position bias: the reference against the written-out definition, operator and kernels against it."""

from __future__ import annotations

import random

import pytest
import torch
from _cuda_graphs import assert_a_cuda_graph_repeats
from _exactness import assert_as_exact
from _graphs import keep_graphs
from _seeds import seeds
from torch import Tensor

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.relative_position_bias import relative_position_bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
_WINDOWS = [(1, 1), (1, 5), (3, 2), (4, 4)]


def make_table(window: tuple[int, int], heads: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    height, width = window
    return torch.randn((2 * height - 1) * (2 * width - 1), heads, dtype=dtype)


def by_definition(table: Tensor, window: tuple[int, int]) -> Tensor:
    """One pair at a time."""
    height, width = window
    places = [(y, x) for y in range(height) for x in range(width)]
    bias = table.new_empty(table.shape[1], len(places), len(places))
    for i, (y, x) in enumerate(places):
        for j, (key_y, key_x) in enumerate(places):
            row = (y - key_y + height - 1) * (2 * width - 1) + x - key_x + width - 1
            bias[:, i, j] = table[row]
    return bias


@pytest.mark.parametrize("window", _WINDOWS, ids=str)
def test_reference_is_the_definition(window: tuple[int, int]) -> None:
    table = make_table(window)
    want = by_definition(table, window)
    assert torch.equal(relative_position_bias(table, window), want)
    assert torch.equal(torch.ops.vitrail.relative_position_bias(table, window), want)


def test_a_number_is_a_square_window() -> None:
    table = make_table((3, 3))
    assert torch.equal(relative_position_bias(table, 3), relative_position_bias(table, (3, 3)))


def test_gradients_are_the_derivatives() -> None:
    table = make_table((3, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: torch.ops.vitrail.relative_position_bias(t, (3, 2)), table)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=needs_triton)], ids=str)
def test_registration(dtype: torch.dtype) -> None:
    table = make_table((3, 2), dtype=dtype).to(DEVICE).requires_grad_()
    torch.library.opcheck(torch.ops.vitrail.relative_position_bias.default, (table, (3, 2)))


def test_autocast_changes_nothing() -> None:
    table = make_table((3, 2), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relative_position_bias(table, (3, 2)), by_definition(table, (3, 2)))


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
def test_no_heads(backend: str) -> None:
    table = torch.zeros(25, 0, device=DEVICE, requires_grad=True)
    bias = relative_position_bias(table, 3, backend=backend)
    assert bias.shape == (0, 9, 9)
    bias.sum().backward()
    assert table.grad.shape == (25, 0)


def test_compiles_into_one_node() -> None:
    backend, graphs = keep_graphs()
    run = torch.compile(
        lambda table: torch.ops.vitrail.relative_position_bias(table, (3, 2)) * 2, fullgraph=True, backend=backend
    )
    table = make_table((3, 2)).requires_grad_()
    out = run(table)
    assert torch.equal(out, 2 * by_definition(table, (3, 2)))
    out.sum().backward()
    for graph, name in zip(graphs, ("relative_position_bias", "relative_position_bias_backward"), strict=True):
        assert graph.count(f"vitrail.{name}.default") == 1


def test_choice_is_recorded_and_what_the_kernels_do_not_take_is_named() -> None:
    with record_choices() as choices:
        relative_position_bias(make_table((3, 2)), (3, 2))
    assert [(c.op, c.backend) for c in choices] == [("relative_position_bias", "eager")]
    with pytest.raises(NotImplementedError, match=r"relative_position_bias.*Triton"):
        relative_position_bias(make_table((3, 2)), (3, 2), backend="triton")
    long = torch.empty(1, 1).expand(65537, 1)
    with pytest.raises(NotImplementedError, match=r"up to 32768 tokens, the window is \(1, 32769\)"):
        relative_position_bias(long, (1, 32769), backend="triton")
    with pytest.raises(NotImplementedError, match=r"up to 65535 heads, the table has 65536"):
        relative_position_bias(torch.empty(1, 65536), 1, backend="triton")


def assert_exact(table: Tensor, window: tuple[int, int]) -> None:
    """Forward nothing is rounded; the gradient is at most twice as far from the truth as the eager one."""
    tokens = window[0] * window[1]
    grad = torch.randn(table.shape[1], tokens, tokens, device=table.device).to(table.dtype)
    grad = grad.transpose(1, 2) if tokens % 2 else grad

    def results(table: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        leaf = table.detach().requires_grad_()
        bias = relative_position_bias(leaf, window, backend=backend)
        (gradient,) = torch.autograd.grad(bias, leaf, grad.to(bias.dtype))
        return bias.detach(), gradient

    (fused, ours), (eager, theirs) = results(table, "triton"), results(table, "eager")
    exact = results(table.double(), "eager")[1]
    assert torch.equal(fused, eager)
    assert ours.dtype == table.dtype
    assert_as_exact(ours, theirs, exact)
    assert torch.equal(results(table, "triton")[1], ours)


@needs_triton
@_DTYPES
@pytest.mark.parametrize("seed", seeds(6))
def test_fused_is_as_exact_as_eager(
    seed: int, dtype: torch.dtype, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("vitrail.kernels.relative_position_bias.triton")
    draw = random.Random(seed)
    if DEVICE == "cpu":  # several programs and steps for few pairs
        monkeypatch.setattr(triton, "_PAIRS", draw.choice([16, 64]))
        monkeypatch.setattr(triton, "_OFFSETS", draw.choice([1, 4]))
        monkeypatch.setattr(triton, "_KEYS", draw.choice([2, 8]))
    window = draw.randint(1, 5), draw.randint(1, 4)
    table = make_table(window, draw.randint(1, 4), dtype).to(DEVICE)
    assert_exact(table.t().contiguous().t() if seed % 2 else table, window)


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("seed", seeds(30))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    draw = random.Random(seed)
    window = draw.choice([(7, 7), (12, 12), (14, 14), (8, 16), (draw.randint(1, 32), draw.randint(1, 32))])
    assert_exact(make_table(window, draw.choice([1, 3, 16, 24]), dtype).to(DEVICE), window)


@pytest.mark.gpu
def test_fused_runs_in_a_cuda_graph() -> None:
    table = make_table((7, 7), dtype=torch.float32).cuda().requires_grad_()

    def run() -> list[Tensor]:
        bias = relative_position_bias(table, 7, backend="triton")
        return [bias.detach(), *torch.autograd.grad(bias.square().sum(), table)]

    assert_a_cuda_graph_repeats(run)


def test_bad_arguments_are_named() -> None:
    table = make_table((3, 2))
    with pytest.raises(ValueError, match=r"table has shape \(15,\); expected 2 dimensions"):
        relative_position_bias(table[:, 0], (3, 2))
    with pytest.raises(ValueError, match=r"table has shape \(15, 3\); expected \(25, 3\)"):
        relative_position_bias(table, 3)
    with pytest.raises(ValueError, match=r"window_size is \(0, 8\); expected an int or \(height, width\)"):
        relative_position_bias(table, (0, 8))
    with pytest.raises(TypeError, match=r"table is torch\.int64"):
        relative_position_bias(table.long(), (3, 2))
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        relative_position_bias(table, (3, 2), backend="cuda")
