"""Neighborhood attention: official outputs, the written-out definition, the operator and its kernels, NATTEN."""

from __future__ import annotations

import importlib.machinery
import itertools
import math
import random
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _golden import load_case
from _seeds import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels._common.dispatch import HAS_TRITON, record_choices
from vitrail.kernels.neighborhood_attention import neighborhood_attention, op

if HAS_TRITON:
    import triton
    import triton.language as tl

    from vitrail.kernels.neighborhood_attention.triton import index, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

GOLDEN = [
    *("na1d_k5_d3_causal", "na1d_k7", "na1d_k8_s4_causal"),
    *("na2d_k3x7", "na2d_k4x6_s2x3", "na2d_k5_d2_causal_tf", "na2d_k5_s2_d2_causal_ft", "na2d_k7", "na2d_k7_addkv5"),
    *("na2d_k7_d3", "na2d_k7_s3", "na2d_k7_s7", "na2d_k7_scale", "na2d_rpb_k5_d2", "na2d_rpb_k7"),
    *("na3d_k3", "na3d_k3x5x5_causal_tff"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden_dir: Path, name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = load_case(golden_dir, name)
    inputs = {key: value.to(dtype) for key, value in case.inputs.items()}
    facts = case.info["constructor"]
    out, lse = neighborhood_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        kernel_size=facts["kernel_size"],
        stride=facts["stride"],
        dilation=facts["dilation"],
        is_causal=facts.get("is_causal", False),
        rpb=inputs.get("rpb"),
        extra_k=inputs.get("additional_k"),
        extra_v=inputs.get("additional_v"),
        scale=None if isinstance(facts["scale"], str) else facts["scale"],
        return_lse=True,
    )
    assert (out - case.expected["out"]).abs().max() <= tolerance
    if "lse" in case.expected:
        assert (lse - case.expected["lse"]).abs().max() <= tolerance


def axis_keys(query: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[tuple[int, int]]:
    """(position, distance) of the keys of one query, from lists of the members of its dilation group."""
    group = list(range(query % dilation, max(length, kernel * dilation), dilation))
    place = group.index(query)
    sharers = [p for p in range(len(group)) if p // stride == place // stride]
    if causal:
        last = min(sharers[0] + stride - 1, len(group) - 1)
        window = range(max(0, last - kernel + 1), place + 1)
    else:
        leader = min(sharers[0] + stride // 2, len(group) - 1)
        first = sorted((0, leader - kernel // 2, len(group) - kernel))[1]
        window = range(first, first + kernel)
    return [(group[p], p - place) for p in window]


def by_definition(x: dict[str, Any], parameters: list[tuple[int, int, int, bool]], scale: float) -> Tensor:
    """One query at a time."""
    q, k, v = x["q"], x["k"], x["v"]
    lengths = q.shape[1:-2]
    out = torch.empty_like(q)
    for query in itertools.product(*(range(n) for n in lengths)):
        axes = [axis_keys(i, n, *p) for i, n, p in zip(query, lengths, parameters, strict=True)]
        keys, values, biases = [], [], []
        for pairs in itertools.product(*axes):
            position = tuple(p for p, _ in pairs)
            inside = all(p < n for p, n in zip(position, lengths, strict=True))
            if not inside and x["pad_k"] is None:
                continue
            keys.append(k[(slice(None), *position)] if inside else x["pad_k"].expand(q.shape[0], -1, -1))
            values.append(v[(slice(None), *position)] if inside else x["pad_v"].expand(q.shape[0], -1, -1))
            if x["rpb"] is not None:
                row = tuple(d + size // 2 for (_, d), size in zip(pairs, x["rpb"].shape[1:], strict=True))
                biases.append(x["rpb"][(slice(None), *row)])
        n_near = len(keys)
        if x["extra_k"] is not None:
            keys += x["extra_k"].unbind(1)
            values += x["extra_v"].unbind(1)
        logits = (torch.stack(keys, 2) * q[(slice(None), *query)][:, :, None]).sum(-1) * scale
        if biases:
            logits[..., :n_near] += torch.stack(biases, 1)
        out[(slice(None), *query)] = (logits.softmax(-1)[..., None] * torch.stack(values, 2)).sum(2)
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and keyword arguments of a call, small enough for one query at a time."""
    axes = draw(st.integers(1, 3))
    most = {1: 12, 2: 7, 3: 4}[axes]
    lengths = [draw(st.integers(1, most)) for _ in range(axes)]
    kernel = [draw(st.integers(1, {1: 5, 2: 4, 3: 3}[axes])) for _ in range(axes)]
    arguments = {
        "kernel_size": kernel,
        "stride": [draw(st.integers(1, size)) for size in kernel],
        "dilation": [draw(st.integers(1, 3)) for _ in range(axes)],
        "is_causal": [draw(st.booleans()) for _ in range(axes)],
        "scale": draw(st.sampled_from([0.3, 1.0])),
    }
    batch, heads, dim, extra = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4)), 3
    shape = (batch, *lengths, heads, dim)
    inputs: dict[str, Any] = {name: torch.randn(shape, dtype=torch.float64) for name in "qkv"}
    has_rpb, has_extra, has_pad = (draw(st.booleans()) for _ in range(3))
    inputs["rpb"] = torch.randn(heads, *(2 * k - 1 for k in kernel), dtype=torch.float64) if has_rpb else None
    for name, given_, like in (("extra", has_extra, (batch, extra, heads, dim)), ("pad", has_pad, (heads, dim))):
        for part in "kv":
            inputs[f"{name}_{part}"] = torch.randn(like, dtype=torch.float64) if given_ else None
    return inputs, arguments


@settings(max_examples=60)
@given(case=cases())
def test_reference_is_the_definition(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    inputs, arguments = case
    names = ("kernel_size", "stride", "dilation", "is_causal")
    parameters = list(zip(*(arguments[name] for name in names), strict=True))
    want = by_definition(inputs, parameters, arguments["scale"])
    torch.testing.assert_close(neighborhood_attention(**inputs, **arguments), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(case=cases())
def test_operator_and_its_gradients_are_those_of_the_reference(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    inputs, arguments = case
    given_ = [x.requires_grad_() for x in inputs.values() if x is not None]
    want = neighborhood_attention(**inputs, **arguments)
    got = torch.ops.vitrail.neighborhood_attention(*inputs.values(), *arguments.values())
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    for ours, theirs in zip(
        torch.autograd.grad(got, given_, grad, **options),
        torch.autograd.grad(want, given_, grad, **options),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_are_the_derivatives() -> None:
    shapes = [(1, 4, 3, 2, 2)] * 3 + [(2, 5, 3)] + [(1, 2, 2, 2)] * 2 + [(2, 2)] * 2
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    constants = ([3, 2], [1, 2], [2, 1], [False, True], 0.7)
    assert torch.autograd.gradcheck(lambda *x: torch.ops.vitrail.neighborhood_attention(*x, *constants), inputs)


def test_whole_map_is_plain_attention() -> None:
    q, k, v = torch.randn(3, 2, 5, 7, 2, 8, dtype=torch.float64)
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(q.shape)
    got = neighborhood_attention(q, k, v, kernel_size=(5, 7))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_options", [True, False], ids=["all", "least"])
def test_registration(with_options: bool) -> None:
    q, k, v = (torch.randn(2, 6, 5, 2, 4).transpose(1, 2).requires_grad_() for _ in range(3))
    others: list[Any] = [None] * 5
    if with_options:
        shapes = [(2, 5, 5), (2, 3, 2, 4), (2, 3, 2, 4), (2, 4), (2, 4)]
        others = [torch.randn(shape, requires_grad=True) for shape in shapes]
    constants = ([3, 3], [1, 1], [1, 2], [False, False], 0.5)
    torch.library.opcheck(torch.ops.vitrail.neighborhood_attention, (q, k, v, *others, *constants))


def test_half_precision_sums_in_float32_and_autocast_casts() -> None:
    q, k, v = torch.randn(3, 1, 9, 9, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_attention(q, k, v, kernel_size=7)
    assert out.dtype == torch.bfloat16
    halves = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, neighborhood_attention(*halves, kernel_size=7))
    _, lse = neighborhood_attention(*halves, kernel_size=7, return_lse=True)
    assert lse.dtype == torch.float32
    wide, _ = neighborhood_attention(*(x.double() for x in halves), kernel_size=7, return_lse=True)
    assert (out.double() - wide).abs().max() < 2e-2


def test_empty_batch_and_compilation_with_any_size() -> None:
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (9, 11):
        q, k, v = torch.randn(3, 2, height, 8, 2, 8)
        got = compiled(q, k, v, kernel_size=3, dilation=2)
        torch.testing.assert_close(got, neighborhood_attention(q, k, v, kernel_size=3, dilation=2))
    empty = torch.randn(0, 4, 4, 2, 8, requires_grad=True)
    out = neighborhood_attention(empty, empty, empty, kernel_size=3)
    out.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == out.shape == empty.shape


def test_flops_of_the_operator_are_those_of_the_reference() -> None:
    q, k, v = (torch.randn(2, 9, 8, 3, 4, requires_grad=True) for _ in range(3))
    constants = ([7, 5], [1, 1], [1, 1], [False, False], 0.5)
    counts = []
    for function in (
        lambda: neighborhood_attention(q, k, v, kernel_size=(7, 5)),
        lambda: torch.ops.vitrail.neighborhood_attention(q, k, v, *[None] * 5, *constants),
    ):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * math.prod(q.shape) * 35] * 2


class FakeNatten(types.ModuleType):
    """Stands for the library, whose kernels need a GPU: it records its calls and computes by our reference."""

    HAS_LIBNATTEN = True

    def __init__(self) -> None:
        super().__init__("natten")
        self.__spec__ = importlib.machinery.ModuleSpec("natten", None)
        self.calls: list[dict[str, Any]] = []

    def na2d(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append(dict(kwargs))
        extra = {f"extra_{n[0]}": kwargs.pop(f"additional_{n}", None) for n in ("keys", "values")}
        return neighborhood_attention(query, key, value, backend="eager", **extra, **kwargs)


def test_natten_is_asked_on_request_and_in_its_own_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNatten()
    monkeypatch.setitem(sys.modules, "natten", library)
    monkeypatch.setattr("vitrail.kernels.neighborhood_attention.api.natten_support", lambda *_: op.Support(True, ""))
    q, k, v = torch.randn(3, 1, 8, 9, 2, 4)
    extra = torch.randn(2, 1, 3, 2, 4)
    arguments: dict[str, Any] = {"kernel_size": (3, 4), "stride": (1, 2), "dilation": 2, "is_causal": (True, False)}
    outs = [
        neighborhood_attention(q, k, v, extra_k=extra[0], extra_v=extra[1], backend=backend, **arguments)
        for backend in ("natten", "auto", "eager")
    ]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[2])
    assert len(library.calls) == 1
    assert {name: library.calls[0][name] for name in arguments} == {**arguments, "dilation": (2, 2)}
    assert library.calls[0]["scale"] == 0.5


def test_what_natten_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "HAS_NATTEN", False)
    q = torch.randn(1, 8, 9, 2, 4)
    with pytest.raises(NotImplementedError, match="NATTEN is not installed"):
        neighborhood_attention(q, q, q, kernel_size=3, backend="natten")
    library = FakeNatten()
    monkeypatch.setitem(sys.modules, "natten", library)
    monkeypatch.setattr(op, "HAS_NATTEN", True)
    assert "the input is on cpu" in op.natten_support(q, None, (3, 3), (1, 1)).reason
    cuda = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=q.shape)
    assert op.natten_support(cuda, None, (3, 3), (1, 1)).ok  # type: ignore[arg-type]
    for arguments, reason in (
        ((torch.ones(1), (3, 3), (1, 1)), "bias"),
        ((None, (1, 3), (1, 1)), "at least 2"),
        ((None, (3, 3), (3, 1)), "smaller than kernel x dilation"),
    ):
        assert reason in op.natten_support(cuda, *arguments).reason  # type: ignore[arg-type]
    monkeypatch.setattr(library, "HAS_LIBNATTEN", False)
    assert "without its CUDA kernels" in op.natten_support(cuda, None, (3, 3), (1, 1)).reason  # type: ignore[arg-type]


class Axis(NamedTuple):
    """One axis of a call."""

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False


class Call(NamedTuple):
    """Inputs of the operator in float64, its constants, and the gradient of its output."""

    inputs: dict[str, Tensor | None]
    constants: tuple[Any, ...]
    grad: Tensor

    def run(self, dtype: torch.dtype, backend: str) -> list[Tensor]:
        """Output and the gradients of all inputs."""
        given_ = {name: x if x is None else x.to(dtype).requires_grad_() for name, x in self.inputs.items()}
        names = ("kernel_size", "stride", "dilation", "is_causal", "scale")
        out = neighborhood_attention(**given_, **dict(zip(names, self.constants, strict=True)), backend=backend)
        leaves = [x for x in given_.values() if x is not None]
        return [out, *torch.autograd.grad(out, leaves, self.grad.to(dtype), materialize_grads=True)]

    def check_fused(self, dtype: torch.dtype) -> None:
        """The fused kernels are as close to float64 as the eager form of the same dtype; a schedule changes nothing."""
        fused = self.run(dtype, "triton")
        for exact, ours, theirs in zip(self.run(torch.float64, "eager"), fused, self.run(dtype, "eager"), strict=True):
            size = exact.norm() + 1e-12
            assert ours.isfinite().all()
            bound = 2 * (theirs.double() - exact).norm() / size + torch.finfo(dtype).eps
            assert (ours.double() - exact).norm() / size <= bound
        if DEVICE == "cuda":
            assert all(torch.equal(a, b) for a, b in zip(fused, self.run(dtype, "triton"), strict=True))


def make_call(
    axes: tuple[Axis, ...],
    dtype: torch.dtype,
    *options: str,
    batch: int = 1,
    heads: int = 1,
    dim: int = 16,
    scale: float = 0.3,
    seed: int = 0,
) -> Call:
    """Random numbers of a dtype, in float64; `options` are "rpb", "extra", "pad" and "views" (odd strides)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).double()

    shape = (batch, *(axis.length for axis in axes), heads, dim)
    qkv = randn(3, *shape)
    if "views" in options:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    inputs: dict[str, Tensor | None] = dict(zip("qkv", qkv, strict=True))
    inputs["rpb"] = randn(heads, *(2 * axis.kernel - 1 for axis in axes)) if "rpb" in options else None
    for name, like in (("extra", (batch, 3, heads, dim)), ("pad", (heads, dim))):
        for part in "kv":
            inputs[f"{name}_{part}"] = randn(*like) if name in options else None
    parameters = tuple(list(values) for values in zip(*(axis[1:] for axis in axes), strict=True))
    return Call(inputs, (*parameters, scale), randn(*shape))


@pytest.fixture
def poison(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills memory with NaN that the kernels are to write; lets few programs share the queries in the interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "WALKERS", dict.fromkeys(launch.WALKERS, 2))


def use_tiles(monkeypatch: pytest.MonkeyPatch, own: tuple[int, int], others: int) -> None:
    """Makes all kernels work for tiles of this size, and walk over tiles of so many tokens."""
    config = launch.Config(((*own, 1),), others, 2)
    table = {kernel: {128: config} for kernel in launch.CONFIGS[2]}
    monkeypatch.setattr(launch, "CONFIGS", {2: table, 4: table})
    monkeypatch.setattr(launch, "_cached_problem", launch.Problem)


HALF, FULL = torch.float16, torch.float32
# Triton's interpreter multiplies bfloat16 tiles as raw integers: that dtype needs a GPU.
BFLOAT = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@needs_triton
@pytest.mark.parametrize("dtype", [None, BFLOAT], ids=["fp", "bf16"])
@pytest.mark.parametrize(
    ("axes", "options", "others", "usual"),
    [
        ((Axis(5, 4), Axis(9, 3)), {"heads": 2}, ("views",), HALF),
        ((Axis(3, 3), Axis(10, 3)), {"scale": -0.3}, ("rpb",), FULL),
        ((Axis(7, 3, dilation=2), Axis(5, 2, dilation=2)), {}, ("rpb",), HALF),
        ((Axis(4, 3, 2, causal=True), Axis(9, 4, 3)), {}, ("rpb",), FULL),
        ((Axis(9, 5, 5), Axis(6, 3, 2, 2, causal=True)), {"scale": 0.0}, (), HALF),
        ((Axis(2, 3), Axis(5, 2, dilation=3)), {}, ("pad", "rpb"), FULL),
        ((Axis(2, 3, dilation=3), Axis(4, 5)), {}, (), HALF),
        ((Axis(3, 3), Axis(4, 3)), {"batch": 2}, ("extra",), FULL),
        ((Axis(21, 5),), {}, ("rpb",), HALF),
        ((Axis(19, 4, 3, 2, causal=True),), {"dim": 32}, ("extra",), FULL),
        ((Axis(3, 2), Axis(2, 2), Axis(3, 3)), {}, ("rpb",), HALF),
        ((Axis(2, 3, causal=True), Axis(2, 2), Axis(3, 2, dilation=2)), {}, ("pad",), FULL),
    ],
    ids=str,
)
def test_fused_is_as_exact_as_eager(
    axes: tuple[Axis, ...],
    options: dict[str, Any],
    others: tuple[str, ...],
    usual: torch.dtype,
    dtype: torch.dtype | None,
    poison: None,
) -> None:
    dtype = dtype or usual
    make_call(axes, dtype, *others, **options).check_fused(dtype)


@needs_triton
@pytest.mark.parametrize(
    ("axes", "options", "own", "others"),
    [
        ((Axis(6, 4), Axis(9, 3)), (), (4, 4), 16),
        ((Axis(3, 3), Axis(18, 5)), ("rpb",), (2, 8), 16),
        ((Axis(9, 7, 2), Axis(7, 7, 3)), ("pad",), (8, 8), 32),
    ],
    ids=str,
)
def test_walks_over_several_tiles(
    axes: tuple[Axis, ...],
    options: tuple[str, ...],
    own: tuple[int, int],
    others: int,
    poison: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_tiles(monkeypatch, own, others)
    monkeypatch.setattr(launch, "INT32_BYTES", 0)  # offsets of int64 are right as well
    make_call(axes, HALF, *options).check_fused(HALF)


if HAS_TRITON:

    @triton.jit
    def _spans_kernel(
        out_ptr, length, group, dilation, AXES: tl.constexpr, HAS_PAD: tl.constexpr, SIZE: tl.constexpr,
        N: tl.constexpr,
    ):  # fmt: skip
        """Rows of N numbers: start and count of windows; spans of keys and of queries of tiles of SIZE places."""
        place = tl.arange(0, N)
        lengths = index.group_lengths(length, group, dilation, AXES, 0, HAS_PAD)
        start, count = index.window(place, lengths, AXES, 0)
        tl.store(out_ptr + place, start)
        tl.store(out_ptr + N + place, count)
        first, end = index.key_span(place * SIZE, SIZE, lengths, AXES, 0)
        tl.store(out_ptr + 2 * N + place, first)
        tl.store(out_ptr + 3 * N + place, end)
        first, end = index.query_span(place * SIZE, SIZE, lengths, AXES, 0)
        tl.store(out_ptr + 4 * N + place, first)
        tl.store(out_ptr + 5 * N + place, end)


@needs_triton
@pytest.mark.parametrize("seed", range(30))
def test_index_map_is_that_of_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    kernel = draw.randint(1, 9)
    axis = Axis(draw.randint(1, 40), kernel, draw.randint(1, kernel), draw.randint(1, 4), draw.random() < 0.4)
    size, has_pad, n = draw.choice([1, 2, 4, 8]), draw.random() < 0.5, 64
    parameters = (axis.kernel, axis.stride, axis.causal)
    for group in range(min(axis.dilation, axis.length)):
        found = torch.zeros(6, n, dtype=torch.int32, device=DEVICE)
        _spans_kernel[(1,)](found, axis.length, group, axis.dilation, (parameters,), has_pad, size, n)
        start, count, key_first, key_end, query_first, query_end = found.tolist()
        reach = max(axis.length, axis.kernel * axis.dilation) if has_pad else axis.length
        n_places = -(-(reach - group) // axis.dilation)  # that take part as keys
        seen = [
            sorted((key - group) // axis.dilation for key, _ in axis_keys(query, *axis) if key < reach)
            for query in range(group, axis.length, axis.dilation)
        ]
        for place, keys in enumerate(seen):
            assert list(range(start[place], start[place] + count[place])) == keys
        assert not any(count[len(seen) :])
        for tile in range(-(-len(seen) // size)):
            keys = [key for keys in seen[tile * size : (tile + 1) * size] for key in keys]
            assert (key_first[tile], key_end[tile]) == (min(keys), max(keys) + 1)
            assert max(keys) + 1 - min(keys) <= launch.keys_seen(size, n_places, parameters)
        for tile in range(-(-n_places // size) + 1):
            own = set(range(tile * size, (tile + 1) * size))
            queries = [place for place, keys in enumerate(seen) if own & set(keys)]
            if queries:
                assert (query_first[tile], query_end[tile]) == (queries[0], queries[-1] + 1)
                assert len(queries) <= launch.queries_seeing(size, len(seen), parameters)
            else:
                assert query_first[tile] >= query_end[tile]


@needs_triton
@pytest.mark.parametrize("seed", range(20))
def test_boxes_cover_all_distances(seed: int) -> None:
    draw = random.Random(seed)
    kernel, queries, keys = draw.randint(1, 13), draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 4, 8, 16])
    for causal in (False, True):
        first, count = launch.boxes_around(queries, keys, (kernel, 1, causal))
        assert first <= -(kernel - 1)
        assert first + count * keys > queries - 1 + (0 if causal else kernel - 1)
        assert (first + (kernel - 1 if causal else kernel // 2)) % keys == 0


@needs_triton
@pytest.mark.parametrize(
    ("places", "stride", "own", "others"),
    [((56, 56), 1, (2, 8), (8, 16)), ((7, 7), 1, (8, 8), (8, 8)), ((56, 56), 4, (4, 4), (8, 8))],
    ids=["nat", "dinat dilation 8", "stride 4"],
)
def test_tiles_fit_the_neighborhood(
    places: tuple[int, int], stride: int, own: tuple[int, int], others: tuple[int, int]
) -> None:
    tiles = launch.choose_tiles("fwd", launch.CONFIGS[2]["fwd"][32], places, ((7, stride, False),) * 2)
    assert (tiles.own, tiles.others, tiles.single) == (own, others, True)


@needs_triton
def test_registration_of_the_kernels() -> None:
    q, k, v = (torch.randn(1, 3, 4, 1, 16, device=DEVICE).requires_grad_() for _ in range(3))
    shapes = [(1, 3, 5), (1, 2, 1, 16), (1, 2, 1, 16), (1, 16), (1, 16)]
    others = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    constants = ([2, 3], [1, 1], [1, 2], [False, False], 0.5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vitrail.neighborhood_attention, (q, k, v, *others, *constants), test_utils=checks)


@needs_triton
def test_fused_of_nothing() -> None:
    call = make_call((Axis(3, 3), Axis(4, 3)), FULL, "rpb", "extra", "pad", batch=0)
    out, *gradients = call.run(FULL, "triton")
    assert out.shape == call.grad.shape
    assert [g.shape for g in gradients] == [x.shape for x in call.inputs.values() if x is not None]
    assert not any(g.any() for g in gradients)


@needs_triton
def test_gradient_of_the_bias_in_float32_is_more_exact_than_eager() -> None:
    """It sums products over the whole map: those, or the statistics, rounded to float32 would make it as wrong."""
    call = make_call((Axis(9, 4), Axis(6, 3)), FULL, "rpb", dim=128, scale=128**-0.5)
    exact, ours, theirs = (
        call.run(dtype, backend)[4] for dtype, backend in ((torch.float64, "eager"), (FULL, "triton"), (FULL, "eager"))
    )
    assert (ours.double() - exact).norm() < 0.5 * (theirs.double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, FULL], ids=str)
@pytest.mark.parametrize("seed", seeds(100))
def test_fused_on_a_gpu(seed: int, dtype: torch.dtype, poison: None) -> None:
    draw = random.Random(seed)
    n_axes = draw.choice([1, 2, 2, 2, 3])
    axes = []
    for _ in range(n_axes):
        kernel = draw.randint(1, (0, 40, 11, 5)[n_axes])
        stride = draw.choice([1, draw.randint(1, kernel)])
        length = draw.randint(1, (0, 900, 50, 12)[n_axes])
        axes.append(Axis(length, kernel, stride, draw.choice([1, draw.randint(1, 9)]), draw.random() < 0.3))
    options = [name for name in ("rpb", "extra", "pad", "views") if draw.random() < 0.4]
    sizes = {"batch": draw.randint(1, 3), "heads": draw.randint(1, 3), "dim": draw.choice([16, 32, 64, 128])}
    scale = draw.choice([1.0, 1.0, -1.3, 0.0]) * sizes["dim"] ** -0.5
    make_call(tuple(axes), dtype, *options, scale=scale, seed=seed, **sizes).check_fused(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, FULL], ids=str)
@pytest.mark.parametrize("options", [(), ("rpb", "pad")], ids=["plain", "rpb"])
@pytest.mark.parametrize(
    "axes",
    [
        (Axis(56, 7), Axis(56, 7)),
        (Axis(56, 7, dilation=8), Axis(56, 7, dilation=8)),
        (Axis(56, 7, 4), Axis(56, 7, 4)),
        (Axis(50, 7, dilation=16), Axis(84, 7, dilation=16)),
        (Axis(7, 11), Axis(9, 11)),
    ],
    ids=["nat", "dinat", "stride", "pads", "small"],
)
def test_fused_on_maps_of_the_models(
    axes: tuple[Axis, ...], options: tuple[str, ...], dtype: torch.dtype, poison: None
) -> None:
    make_call(axes, dtype, *options, batch=2, heads=2, dim=32).check_fused(dtype)


def test_choice_is_recorded_and_bad_arguments_are_named() -> None:
    q = torch.randn(1, 5, 6, 2, 4)
    with record_choices() as choices:
        neighborhood_attention(q, q, q, kernel_size=3)
    assert [(c.op, c.backend) for c in choices] == [("neighborhood_attention", "eager")]
    for arguments, message in (
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size is \(3, 3, 3\); expected one value or 2"),
        ({"kernel_size": 3, "stride": 4}, r"stride is \(4, 4\); allowed: at most kernel_size \(3, 3\)"),
        ({"kernel_size": 3, "dilation": (1, 0)}, r"dilation is \(1, 0\)"),
        ({"kernel_size": 3, "is_causal": (1, 0)}, r"is_causal is \(1, 0\)"),
        ({"kernel_size": 3, "rpb": torch.ones(2, 3, 3)}, r"rpb has shape \(2, 3, 3\); expected \(2, 5, 5\)"),
        ({"kernel_size": 3, "pad_k": torch.ones(2, 4)}, "pad_k and pad_v"),
        ({"kernel_size": 3, "extra_v": torch.ones(1, 1, 2, 4)}, "extra_k and extra_v"),
    ):
        with pytest.raises(ValueError, match=message):
            neighborhood_attention(q, q, q, **arguments)
    with pytest.raises(ValueError, match="q has shape"):
        neighborhood_attention(q[0, 0], q[0, 0], q[0, 0], kernel_size=3)
    with pytest.raises(TypeError, match=r"q is torch\.int64"):
        neighborhood_attention(q.long(), q.long(), q.long(), kernel_size=3)
    with pytest.raises(NotImplementedError, match="return_lse"):
        neighborhood_attention(q, q, q, kernel_size=3, return_lse=True, backend="triton")
