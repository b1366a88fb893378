"""Depth-wise convolution: its definition tap by tap, gradients, the registered operator, argument checks."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from _seeds import seeds
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.depthwise_conv import depthwise_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

_SHAPES = [  # batch, height, width, channels, filter, pads
    (2, 6, 5, 3, 3, (0, 0)),
    (1, 4, 7, 2, 5, (1, 0)),
    (1, 3, 2, 4, 5, (9, 1)),
    (2, 1, 1, 2, 7, (0, 4)),
    (1, 5, 5, 2, 9, (2, 2)),
    (1, 3, 4, 2, 1, (1, 1)),
]


def _inputs(batch: int, height: int, width: int, dim: int, size: int) -> dict[str, Tensor]:
    """All tensors of a call in float64; x is a slice of a packed projection."""
    packed = torch.randn(batch, height, width, 3, dim, dtype=torch.float64)
    return {
        "x": packed[:, :, :, 1],
        "weight": torch.randn(dim, 1, size, size, dtype=torch.float64),
        "bias": torch.randn(dim, dtype=torch.float64),
        "pad_value": torch.randn(dim, dtype=torch.float64),
        "residual": torch.randn(batch, height, width, dim, dtype=torch.float64),
    }


def _literal(
    x: Tensor, weight: Tensor, bias: Tensor, pad_value: Tensor, residual: Tensor, pads: tuple[int, int], gelu: bool,
    skip: bool,
) -> Tensor:  # fmt: skip
    """Tap by tap, on a map that is extended far enough in all directions."""
    (_, height, width, dim), size = x.shape, weight.shape[2]
    far = size + max(pads)
    extended = x.new_zeros(len(x), height + 2 * far, width + 2 * far, dim)
    extended[:, far : far + height + pads[0], far : far + width + pads[1]] = pad_value
    extended[:, far : far + height, far : far + width] = x
    y = bias.expand_as(x)
    for row, column in itertools.product(range(size), repeat=2):
        top, left = far + row - size // 2, far + column - size // 2
        y = y + extended[:, top : top + height, left : left + width] * weight[:, 0, row, column]
    if gelu:
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return y + x * skip + residual


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_every_tap_counts(shape: tuple[Any, ...], gelu: bool, skip: bool) -> None:
    *sizes, pads = shape
    inputs = {name: tensor.requires_grad_() for name, tensor in _inputs(*sizes).items()}
    got = depthwise_conv(**inputs, pads=pads, gelu=gelu, skip=skip)
    want = _literal(**inputs, pads=pads, gelu=gelu, skip=skip)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves, grad = list(inputs.values()), torch.randn_like(want)
    options = {"allow_unused": True, "materialize_grads": True}
    for mine, literal in zip(
        torch.autograd.grad(got, leaves, grad, **options), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, literal, rtol=1e-11, atol=1e-11)


def test_what_is_absent_adds_nothing() -> None:
    inputs = _inputs(2, 4, 5, 3, 3)
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("bias", "pad_value", "residual")}
    got = depthwise_conv(inputs["x"], inputs["weight"], pads=(1, 2))
    want = _literal(inputs["x"], inputs["weight"], **zeros, pads=(1, 2), gelu=False, skip=False)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("pads", [(0, 0), (1, 2)])
def test_gradients(gelu: bool, pads: tuple[int, int]) -> None:
    inputs = tuple(tensor.clone().requires_grad_() for tensor in _inputs(1, 3, 2, 2, 3).values())
    assert torch.autograd.gradcheck(lambda *t: torch.ops.vitrail.depthwise_conv(*t, pads, gelu, True), inputs)


def _opcheck(device: str, dim: int) -> None:
    inputs = {name: t.float().to(device).requires_grad_() for name, t in _inputs(2, 3, 4, dim, 3).items()}
    whole = tuple(inputs.values())
    torch.library.opcheck(torch.ops.vitrail.depthwise_conv.default, (*whole, [1, 2], True, True))
    torch.library.opcheck(torch.ops.vitrail.depthwise_conv.default, (*whole[:2], None, None, None, [0, 0], False, True))


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.kernels.depthwise_conv.op.FUSED_SIZES", ())
    _opcheck(DEVICE, 3)


def test_residual_is_neither_saved_nor_copied() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in _inputs(1, 4, 4, 3, 3).items()}
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = torch.ops.vitrail.depthwise_conv(*inputs.values(), [0, 0], False, False)
    assert inputs["x"].data_ptr() in saved
    assert inputs["residual"].data_ptr() not in saved
    grad = torch.randn_like(out)
    (passed,) = torch.autograd.grad(out, inputs["residual"], grad)
    assert passed.data_ptr() == grad.data_ptr()


def test_autocast() -> None:
    """The result has autocast's dtype, but a stream to which the convolution is added keeps its own."""
    x, weight, bias, _, residual = (t.float() for t in _inputs(1, 4, 5, 3, 3).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv(x, weight, bias, residual=residual).dtype == torch.bfloat16
        assert depthwise_conv(x.bfloat16(), weight, bias).dtype == torch.bfloat16
        assert depthwise_conv(x.bfloat16(), weight, bias, skip=True).dtype == torch.bfloat16
        assert depthwise_conv(x, weight, bias, skip=True).dtype == torch.float32
        assert depthwise_conv(x.double(), weight.double(), skip=True).dtype == torch.float64


def test_flops_are_those_of_the_convolution() -> None:
    x, weight, bias, *_ = (t.float().requires_grad_() for t in _inputs(2, 6, 5, 3, 3).values())
    totals = []
    for run in (
        lambda: torch.ops.vitrail.depthwise_conv(x, weight, bias, None, None, [0, 0], False, False),
        lambda: F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=3),
    ):
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                out = run()
                if backward:
                    out.sum().backward()
            totals.append(counter.get_total_flops())
    # PyTorch counts a full convolution's products for the gradient of the filter, whatever the groups.
    assert totals[0] == totals[2] == 2 * 2 * 6 * 5 * 3 * 9
    assert totals[1] == 3 * totals[0]


def test_empty_batch() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in _inputs(0, 4, 5, 3, 3).items()}
    out = torch.ops.vitrail.depthwise_conv(*inputs.values(), [0, 0], False, True)
    assert out.shape == inputs["x"].shape
    gradients = torch.autograd.grad(out, list(inputs.values()), torch.zeros_like(out))
    assert all(not gradient.any() for gradient in gradients)


def test_one_graph_for_any_size() -> None:
    def padded(x: Tensor, weight: Tensor, pad_value: Tensor) -> Tensor:
        pads = (-x.shape[1] % 4, -x.shape[2] % 4)
        return torch.ops.vitrail.depthwise_conv(x, weight, None, pad_value, None, pads, False, True)

    compiled = torch.compile(padded, fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in ((5, 6), (9, 7)):
        x, weight, _, pad_value, _ = _inputs(2, height, width, 4, 5).values()
        torch.testing.assert_close(compiled(x, weight, pad_value), padded(x, weight, pad_value))


class _Call(NamedTuple):
    """Tensors and options of one call, and the gradient of its result."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    grad: Tensor

    def run(self, dtype: torch.dtype, backend: str) -> list[Tensor]:
        """Output and the gradients of all tensors."""
        given = {name: t.to(dtype) for name, t in {**self.tensors, "grad": self.grad}.items()}
        if backend == "eager":  # how a map lies changes nothing, but breaks PyTorch's kernels for 16 bits on a GPU
            given = {name: t.clone(memory_format=torch.contiguous_format) for name, t in given.items()}
        grad = given.pop("grad")
        leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
        out = depthwise_conv(**leaves, **self.options, backend=backend)
        wanted = list(leaves.values())
        return [out, *torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True)]

    def check_fused(self, dtype: torch.dtype) -> None:
        """The fused kernels are as close to float64 as the eager form of the same dtype; a schedule changes nothing."""
        fused = self.run(dtype, "triton")
        for exact, ours, theirs in zip(self.run(torch.float64, "eager"), fused, self.run(dtype, "eager"), strict=True):
            scale = exact.norm() + 1e-12
            bound = 2 * (theirs.double() - exact).norm() / scale + torch.finfo(dtype).eps
            assert ours.dtype == dtype
            assert ours.isfinite().all()
            assert (ours.double() - exact).norm() / scale <= bound
        if DEVICE == "cuda":
            assert all(torch.equal(a, b) for a, b in zip(fused, self.run(dtype, "triton"), strict=True))


def _random_call(seed: int, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> _Call:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def layout(x: Tensor) -> Tensor:
        kind = draw.randrange(5)
        if kind == 0:  # rows and columns change places: pixels are a row apart
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == 1:  # channels first
            return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        if kind == 3:  # pixels of 16 bits begin amid words of 32
            return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        return torch.stack((x, x, x), 3)[:, :, :, 2] if kind == 2 else x

    dim = shape[3]
    tensors = {"x": layout(randn(*shape)), "weight": randn(dim, 1, size, size) / size, "bias": randn(dim)}
    pads = (draw.randint(0, 4), draw.randint(0, 4)) if seed % 2 else (0, 0)
    if any(pads):
        tensors["pad_value"] = randn(dim)
    if draw.random() < 0.3:
        del tensors["bias"]
    if draw.random() < 0.5:
        tensors["residual"] = layout(randn(*shape))
    options = {"pads": pads, "gelu": seed % 4 in (2, 3), "skip": seed % 4 in (1, 2)}
    return _Call(tensors, options, layout(randn(*shape)))


_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@needs_triton
@_DTYPES
@pytest.mark.parametrize("seed", range(6))
def test_fused_is_as_exact_as_eager(seed: int, dtype: torch.dtype, poison: None, large_tiles: None) -> None:
    draw = random.Random(seed)
    shape = (draw.randint(1, 2), draw.randint(1, 5), draw.randint(1, 7), draw.choice([3, 16, 20, 48]))
    _random_call(seed, dtype, shape, (3, 5, 7)[seed % 3]).check_fused(dtype)


@needs_triton
def test_gradient_of_the_filter_is_summed_over_programs(
    poison: None, large_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitrail.kernels.depthwise_conv import triton

    monkeypatch.setattr(triton, "_GRADIENT_TILES", {3: triton.Tile(2, 2, 2, 1, 2, 3)})
    _random_call(0, torch.float32, (1, 5, 9, 16), 3).check_fused(torch.float32)


@needs_triton
def test_registration_of_the_kernels(large_tiles: None) -> None:
    _opcheck(DEVICE, 16)


@needs_triton
def test_empty_batch_takes_no_kernel() -> None:
    x = torch.randn(0, 4, 4, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(16, 1, 3, 3, device=DEVICE, requires_grad=True)
    out = depthwise_conv(x, weight, backend="triton")
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), (x, weight)))


@pytest.mark.gpu
@_DTYPES
@pytest.mark.parametrize("seed", seeds(60))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    draw = random.Random(seed)
    shape = (draw.randint(1, 4), draw.randint(1, 60), draw.randint(1, 60), draw.choice([5, 24, 32, 64, 96, 128]))
    _random_call(seed, dtype, shape, draw.choice([3, 5, 7])).check_fused(dtype)


@pytest.mark.gpu
@_DTYPES
def test_fused_on_a_detection_image(dtype: torch.dtype) -> None:
    _random_call(3, dtype, (2, 200, 336, 64), 5).check_fused(dtype)


def test_choice_is_recorded() -> None:
    inputs = _inputs(1, 3, 4, 2, 3)
    with record_choices() as choices:
        depthwise_conv(inputs["x"], inputs["weight"])
        depthwise_conv(inputs["x"], torch.randn(2, 1, 9, 9).double())
    assert [(choice.op, choice.backend) for choice in choices] == [("depthwise_conv", "eager")] * 2
    assert "the filter has 9" in choices[1].reason


def test_bad_arguments_are_named() -> None:
    x, weight, bias, pad_value, residual = _inputs(1, 4, 5, 3, 3).values()
    with pytest.raises(ValueError, match=r"x has shape .*\(B, H, W, C\)"):
        depthwise_conv(x[0], weight)
    with pytest.raises(ValueError, match="filters of 2 x 2; allowed: odd"):
        depthwise_conv(x, weight[..., :2, :2])
    with pytest.raises(ValueError, match="filters of 3 x 1; allowed: odd squares"):
        depthwise_conv(x, weight[..., :1])
    with pytest.raises(ValueError, match="weight has shape"):
        depthwise_conv(x[..., :2], weight)
    with pytest.raises(ValueError, match="bias has shape"):
        depthwise_conv(x, weight, bias[:2])
    with pytest.raises(ValueError, match="residual has shape"):
        depthwise_conv(x, weight, residual=residual[:, :2])
    with pytest.raises(ValueError, match="pad_value has shape"):
        depthwise_conv(x, weight, pad_value=pad_value[:1], pads=1)
    with pytest.raises(ValueError, match="pads is -1"):
        depthwise_conv(x, weight, pads=-1)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        depthwise_conv(x.long(), weight)
    with pytest.raises(ValueError, match=r"residual has dtype torch\.float32"):
        depthwise_conv(x, weight, residual=residual.float())
    with pytest.raises(NotImplementedError, match=r"depthwise_conv.*Triton"):
        depthwise_conv(x, weight, backend="triton")


@needs_triton
def test_maps_that_begin_amid_words_are_copied() -> None:
    from vitrail.kernels.depthwise_conv.triton import _as_map

    def begun_at(element: int, dim: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(element + 24 * dim).to(dtype)[element:].view(2, 3, 4, dim)

    odd = begun_at(1, 6, torch.float16)
    assert torch.equal(_as_map(odd), odd)
    assert _as_map(odd).data_ptr() % 4 == 0
    for fits in (begun_at(2, 6, torch.bfloat16), begun_at(1, 5, torch.float16), begun_at(1, 6, torch.float32)):
        assert _as_map(fits) is fits
