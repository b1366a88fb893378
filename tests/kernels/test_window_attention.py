"""Window attention: the fused kernels against the reference in float64, over random shapes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from _exactness import allowed_error, error_in_norm
from _seeds import seeds
from torch import Tensor

from vitrail.kernels._common.dispatch import HAS_TRITON
from vitrail.kernels._common.recording import padding_to
from vitrail.kernels.window_attention import window_attention, window_attention_packed
from vitrail.kernels.window_attention.reference import _attention_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


# The first and the third are cut into several tiles, by kernels that walk where the dtype is a half one.
_WINDOWS = [(9, 9), (7, 7), (5, 14), (3, 4), (1, 5)]


def _case(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Random inputs [qkv, bias?, pad_k?, pad_v?], options and output gradient."""
    draw = random.Random(seed)
    window = _WINDOWS[seed % len(_WINDOWS)]
    shift = draw.choice([(0, 0), (window[0] // 2, window[1] // 2), (0, window[1] - 1)])
    height, width, heads, dim = draw.randint(1, 15), draw.randint(1, 15), draw.randint(1, 3), draw.choice([16, 32])
    tokens = window[0] * window[1]
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    batch = draw.randint(1, 2)
    if tokens > 64 and DEVICE == "cpu":  # which takes the interpreter ten seconds a head
        batch = heads = 1
    inputs = [randn(batch, height, width, 3, heads, dim)]
    names = []
    if draw.random() < 0.6:
        inputs.append(randn(heads, tokens, tokens))
        names.append("bias")
    if draw.random() < 0.5:
        inputs += [randn(heads, dim), randn(heads, dim)]
        names += ["pad_k", "pad_v"]
    options = {"window_size": window, "shift_size": shift, "names": names, "packed": draw.random() < 0.5}
    options["roll_first"] = draw.random() < 0.5
    return inputs, options, randn(batch, height, width, heads, dim)


def _run(inputs: list[Tensor], options: dict[str, Any], grad: Tensor, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Output and the gradients of queries, keys, values and every other input."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    optional = dict(zip(options["names"], leaves[1:], strict=True))
    sizes = {key: options[key] for key in ("window_size", "shift_size", "roll_first")}
    if options["packed"]:
        out = window_attention_packed(leaves[0], **sizes, **optional, backend=backend)
    else:
        out = window_attention(*leaves[0].unbind(3), **sizes, **optional, backend=backend)
    d_qkv, *others = torch.autograd.grad(out, leaves, grad.to(dtype), materialize_grads=True)
    return [out, *d_qkv.unbind(3), *others]


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("seed", seeds(10))
def test_fused_is_as_exact_as_eager(seed: int, dtype: torch.dtype) -> None:
    inputs, options, grad = _case(seed, dtype)
    _compare(inputs, options, grad, dtype)


def _compare(inputs: list[Tensor], options: dict[str, Any], grad: Tensor, dtype: torch.dtype) -> None:
    """The fused operator errs at most twice as much as the eager one."""
    truth = _run(inputs, options, grad, torch.float64, "eager")
    eager = _run(inputs, options, grad, dtype, "eager")
    fused = _run(inputs, options, grad, dtype, "triton")
    for exact, ours, theirs in zip(truth, fused, eager, strict=True):
        assert ours.isfinite().all()
        assert error_in_norm(ours, exact) <= allowed_error(exact, theirs, dtype)


@needs_triton
@pytest.mark.parametrize("roll_first", [False, True])
@pytest.mark.parametrize(
    ("size", "shift"), [((9, 12), (1, 2)), ((7, 10), (0, 0)), ((10, 13), (2, 3)), ((2, 5), (2, 1))]
)
def test_masks_of_classes_are_those_of_windows(size: tuple[int, int], shift: tuple[int, int], roll_first: bool) -> None:
    """What kernels that walk add to a window's logits, against the reference's mask of each window."""
    from vitrail.kernels.window_attention.triton.launch import _Problem

    window, (height, width) = (3, 4), size
    q = torch.zeros(1, height, width, 2, 16, dtype=torch.float16, device=DEVICE)
    bias = torch.randn(2, 12, 12, dtype=torch.float16, device=DEVICE)
    problem = _Problem(q, bias, None, window, shift, 1.0, roll_first)
    masks = problem.mask(bias, 16, 32)
    # Fragments of 16 x 16, of which a thread has 2 x 2 pairs.
    masks = masks.view(-1, 2, 1, 2, 8, 4, 2, 2, 2).permute(0, 1, 2, 7, 4, 3, 6, 5, 8).reshape(-1, 2, 16, 32)
    assert masks[:, :, 12:].isneginf().all()
    assert masks[:, :, :, 12:].isneginf().all()
    pads = (padding_to(height, 3), padding_to(width, 4))
    visible = _attention_mask(height, width, pads, window, shift, False, roll_first, q.device)
    rows, columns = (height + pads[0]) // 3, (width + pads[1]) // 4
    for row, column in itertools.product(range(rows), range(columns)):
        classes = problem.n_classes
        number = max(row - rows + classes, 0) * classes + max(column - columns + classes, 0)
        got, seen = masks[number, :, :12, :12], torch.ones(12, 12, dtype=torch.bool, device=DEVICE)
        if visible is not None:
            seen = visible[row * columns + column]
        # Padded queries, whose results are dropped, see padded keys in the reference only.
        queries = _real_tokens(row, column, size, pads, shift, roll_first)
        want = bias.masked_fill(~seen, -torch.inf)
        assert torch.equal(got[:, queries], want[:, queries])


def _real_tokens(
    row: int, column: int, size: tuple[int, int], pads: tuple[int, int], shift: tuple[int, int], roll_first: bool
) -> Tensor:
    """Which tokens of a window of 3 x 4 are pixels, (12,) of bool."""
    found = []
    for first, length, pad, move in zip((row * 3, column * 4), size, pads, shift, strict=True):
        place = torch.arange(first, first + (3 if not found else 4))
        found.append((place if roll_first else (place + move) % (length + pad)) < length)
    return (found[0][:, None] & found[1][None, :]).flatten()


@needs_triton
@pytest.mark.parametrize("tokens", [65, 81, 96, 128, 144, 196, 256])
@pytest.mark.parametrize("own", [64, 128])
def test_blocks_and_tiles_hold_every_token_once(tokens: int, own: int) -> None:
    from vitrail.kernels._common.launch import Config
    from vitrail.kernels.window_attention.triton.launch import Walk

    walk = Walk(own, 32, False, Config(own // 16, 1, 1))
    assert tokens <= own * walk.blocks(tokens) == walk.rows(tokens) < tokens + own
    cut = walk.cut(tokens)
    assert tokens <= cut["WHOLE"] + cut["REST"] == walk.columns(tokens) <= walk.rows(tokens)


@needs_triton
def test_values_far_from_zero() -> None:
    """The softmax correction is then a large number, from which no gradient may be found by cancellation."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((1, 9, 9, 3, 1, 16), (1, 81, 81))]
    inputs[0][:, :, :, 2] += 4
    grad = 2 + torch.randn(1, 9, 9, 1, 16, generator=generator, dtype=torch.float64)
    options = {"window_size": (9, 9), "shift_size": (0, 0), "roll_first": False, "packed": True, "names": ["bias"]}
    _compare([x.to(DEVICE) for x in inputs], options, grad.to(DEVICE), torch.float16)


@needs_triton
def test_float16_holds_gradients_as_large_as_eager_does() -> None:
    """Products of values and gradients, just below the largest float16 and of either sign."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 9, 9, 3, 1, 16, generator=generator, dtype=torch.float64)
    signs = torch.where(torch.arange(81) < 64, 1, -1).view(9, 9)  # the last tile of keys has the other
    qkv[:, :, :, 2] = 63 * signs[:, :, None, None]
    grad = torch.full((1, 9, 9, 1, 16), 63.0, dtype=torch.float64)
    options = {"window_size": (9, 9), "shift_size": (0, 0), "roll_first": False, "packed": True, "names": []}
    _compare([qkv.to(DEVICE)], options, grad.to(DEVICE), torch.float16)


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("roll_first", [False, True])
def test_reference_is_the_definition(shift: tuple[int, int], pads: bool, roll_first: bool) -> None:
    """Pixel by pixel: which keys a query sees, and with which values."""
    window, (batch, height, width, heads, dim) = (3, 4), (2, 7, 9, 2, 8)
    q, k, v = torch.randn(3, batch, height, width, heads, dim, dtype=torch.float64)
    bias = torch.randn(heads, 12, 12, dtype=torch.float64)
    pad_k, pad_v = torch.randn(2, heads, dim, dtype=torch.float64) if pads else (None, None)
    options = {"window_size": window, "shift_size": shift, "roll_first": roll_first}
    got = window_attention(q, k, v, **options, bias=bias, pad_k=pad_k, pad_v=pad_v)
    padded = (9, 12)
    cycle = (height, width) if roll_first else padded

    def region(rolled: tuple[int, int]) -> tuple[bool, bool]:
        return rolled[0] >= padded[0] - shift[0], rolled[1] >= padded[1] - shift[1]

    def pixel(rolled: tuple[int, int]) -> tuple[int, int] | None:
        if roll_first and (rolled[0] >= height or rolled[1] >= width):
            return None
        y, x = (rolled[0] + shift[0]) % cycle[0], (rolled[1] + shift[1]) % cycle[1]
        return (y, x) if y < height and x < width else None

    for y in range(height):
        for x in range(width):
            rolled = ((y - shift[0]) % cycle[0], (x - shift[1]) % cycle[1])
            origin = (rolled[0] // 3 * 3, rolled[1] // 4 * 4)
            row = (rolled[0] - origin[0]) * 4 + rolled[1] - origin[1]
            keys, values, biases = [], [], []
            for token in range(12):
                key = (origin[0] + token // 4, origin[1] + token % 4)
                if region(key) != region(rolled):
                    continue
                source = pixel(key)
                if source is not None:
                    keys.append(k[:, source[0], source[1]])
                    values.append(v[:, source[0], source[1]])
                elif pad_k is not None and pad_v is not None:
                    keys.append(pad_k.expand(batch, -1, -1))
                    values.append(pad_v.expand(batch, -1, -1))
                else:
                    continue
                biases.append(bias[:, row, token])
            logits = torch.einsum("bhd,tbhd->bht", q[:, y, x], torch.stack(keys)) * dim**-0.5 + torch.stack(biases, 1)
            want = torch.einsum("bht,tbhd->bhd", logits.softmax(-1), torch.stack(values))
            torch.testing.assert_close(got[:, y, x], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [False, True])
def test_operator_registration(with_bias: bool) -> None:
    q, k, v = (torch.randn(1, 5, 6, 2, 24, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 9, 9, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.vitrail.window_attention, (q, k, v, bias, None, None, (3, 3), (1, 1), 0.2, True))


def test_empty_batch() -> None:
    q = torch.randn(0, 5, 5, 1, 16, requires_grad=True)
    out = window_attention(q, q, q, window_size=3)
    assert out.shape == q.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size is 0"),
        ({"window_size": 3, "shift_size": 3}, "shift_size is"),
        ({"window_size": 3, "bias": torch.zeros(1, 9, 8)}, "bias has shape"),
        ({"window_size": 3, "pad_k": torch.zeros(1, 16)}, "together"),
        ({"window_size": 3, "backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 5, 5, 1, 16)
    with pytest.raises(ValueError, match=message):
        window_attention(q, q, q, **options)
