"""Launchers: sizes of tiles, launch parameters, workspaces."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from vitrail.kernels._common.gradients import empty_gradient, zeros_or_empty
from vitrail.kernels._common.launch import contiguous, launch, multiprocessors, unit_stride
from vitrail.kernels._common.triton import empty_statistics, shares, sums_of_pairs
from vitrail.kernels.neighborhood_attention.triton.backward import (
    neighborhood_bwd_dextra_kernel,
    neighborhood_bwd_dkdv_kernel,
    neighborhood_bwd_dq_kernel,
    neighborhood_bwd_drpb_kernel,
    neighborhood_bwd_drpb_sum_kernel,
    neighborhood_bwd_exact_stats_kernel,
)
from vitrail.kernels.neighborhood_attention.triton.forward import neighborhood_fwd_kernel

_Axis = tuple[int, int, bool]  # kernel, stride, causal


class Config(NamedTuple):
    """How a kernel is tiled and launched.

    Attributes:
        own: Heights and widths of tiles to choose from, those that programs work for, and warps a program.
        others: Most tokens of the tiles they walk over.
        stages: Of the walk's pipeline.
    """

    own: tuple[tuple[int, int, int], ...]
    others: int
    stages: int = 1


# 16 tokens are what one warp multiplies at once. float32 has no such instruction: its threads need more company.
_WARP = ((2, 8, 1), (4, 4, 1), (1, 16, 1))
_WARPS = ((2, 8, 4), (4, 4, 4), (1, 16, 4))
_SHARED = (*_WARP, (8, 8, 4))
# By bytes of a number, kernel, and the most channels of a head. Heads of 128 channels with padding and bias spill a few
# registers (sm_90, triton 3.8): 8 and 16 bytes of a thread, forward and for the queries; 200 and 224 of float32.
CONFIGS: dict[int, dict[str, dict[int, Config]]] = {
    2: {
        "fwd": {32: Config(_SHARED, 128), 128: Config(_WARP, 32)},
        "bwd_dq": {32: Config(_SHARED, 128), 128: Config(_WARP, 32)},
        "bwd_dkdv": {32: Config(_WARP, 32, 2), 64: Config(_WARP, 32), 128: Config(_WARP, 16)},
        "bwd_drpb": {32: Config(_WARP, 64), 128: Config(_WARP, 32)},
        "bwd_dextra": {128: Config(_WARP, 32)},
    },
    4: {
        "fwd": {64: Config(_WARPS, 32), 128: Config(_WARPS, 16)},
        "bwd_dq": {64: Config(_WARPS, 32), 128: Config(_WARPS, 16)},
        "bwd_dkdv": {64: Config(_WARPS, 32), 128: Config(_WARPS, 16)},
        "bwd_drpb": {128: Config(_WARPS, 32)},
        "bwd_dextra": {128: Config(_WARPS, 32)},
    },
}
LOAD_COST = 16  # what reading a token costs a program, in products of one query and one key
INT32_BYTES = 2**31  # of a tensor: the offsets inside most fit, which saves one instruction in ten
EXTRA_BLOCK = 16  # additional keys that a program works for
WALKERS = {"bwd_drpb": 8, "bwd_dextra": 8}


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles.

    Attributes:
        own: Height and width of the tile that a program works for.
        others: Height and width of the tiles that it walks over.
        steps: Tiles of a walk over one plane away from the borders.
        one_column: No walk is wider than a tile.
        single: No walk over a plane takes more than one tile.
        warps: Of a program.
    """

    own: tuple[int, int]
    others: tuple[int, int]
    steps: int
    one_column: bool
    single: bool
    warps: int


class Plan(NamedTuple):
    """How one kernel is launched.

    Attributes:
        tiles: Sizes of its tiles.
        slots: Tiles of an image and head.
        geometry: What its index map takes.
        options: Compile-time constants and launch options.
    """

    tiles: Tiles
    slots: int
    geometry: tuple[Any, ...]
    options: dict[str, Any]


def keys_seen(size: int, places: int, axis: _Axis) -> int:
    """The most keys on an axis that `size` queries in a row see, the first of which stands at a multiple of `size`."""
    kernel, stride, causal = axis
    spread = size - 1 if causal else (stride - math.gcd(size, stride) + size - 1) // stride * stride
    return min(kernel + spread, places)


def queries_seeing(size: int, places: int, axis: _Axis) -> int:
    """The most queries on an axis that see any of `size` keys in a row: more at the borders than elsewhere."""
    kernel, _, causal = axis
    return min(size + kernel - 1 if causal else size + 2 * (kernel - 1), places)


def choose_tiles(kernel: str, config: Config, places: tuple[int, ...], axes: tuple[_Axis, ...]) -> Tiles:
    """The tiles that do the least work on a dilation group of `places` (rows, columns)."""
    candidates = []
    for *own, warps in config.own:
        most = [keys_seen(*sizes) for sizes in zip(own, places, axes, strict=True)]
        usual = most
        if kernel == "bwd_dkdv":
            usual = [min(size + axis[0] - 1, n) for size, n, axis in zip(own, places, axes, strict=True)]
            most = [queries_seeing(*sizes) for sizes in zip(own, places, axes, strict=True)]
        width = min(_power(usual[1]), config.others)
        height = min(_power(usual[0]), config.others // width)
        height = max(height, 16 // width)  # no product has fewer than 16 terms
        rows, columns = math.ceil(usual[0] / height), math.ceil(usual[1] / width)
        n_tiles = math.ceil(places[0] / own[0]) * math.ceil(places[1] / own[1])
        cost = n_tiles * (math.prod(own) + LOAD_COST) * rows * height * columns * width
        one_column, single = most[1] <= width, most[1] <= width and most[0] <= height
        candidates.append((cost, Tiles((own[0], own[1]), (height, width), rows * columns, one_column, single, warps)))
    return min(candidates)[1]


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


class Problem:
    """The launch parameters of all kernels for calls of one kind; see `problem_of`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        element_size: int,
        axes: tuple[_Axis, ...],
        dilation: tuple[int, ...],
        scale: float,
        has_rpb: bool,
        n_extra: int,
        pads: bool,
        multiprocessors: int,
    ) -> None:
        lead = 6 - len(shape)  # axes that the call does not have
        self.batch, self.heads, self.head_dim = shape[0], shape[-2], shape[-1]
        table = CONFIGS[element_size]
        self.configs = {kernel: _of_width(table[kernel], self.head_dim) for kernel in table}
        self.lengths = (*(1,) * lead, *shape[1:-2])
        self.dilations = (*(1,) * lead, *dilation)
        self.axes = (*((1, 1, False),) * lead, *axes)
        self.groups = tuple(map(min, self.dilations, self.lengths))
        self.places = tuple(map(_divide_up, self.lengths, self.dilations))
        whole = tuple(max(n, a[0] * d) for n, a, d in zip(self.lengths, self.axes, self.dilations, strict=True))
        self.has_pad = pads and whole != self.lengths
        self.key_places = tuple(map(_divide_up, whole, self.dilations)) if self.has_pad else self.places
        self.has_rpb, self.n_extra = has_rpb, n_extra
        self.scale = abs(scale) if scale else 1.0
        self.sign = (scale > 0) - (scale < 0)
        self.multiprocessors = multiprocessors
        self.fwd = self._by_query("fwd")
        self.bwd_dq = self._by_query("bwd_dq")
        self.bwd_dkdv = self._by_key()
        self.bwd_drpb = self._by_query("bwd_drpb")
        self.bwd_dextra = self._by_query("bwd_dextra")

    def _plan(self, kernel: str, tiles: Tiles, places: tuple[int, ...], constants: dict[str, Any]) -> Plan:
        sizes = (1, *tiles.own)
        slots = tuple(g * math.ceil(n / size) for g, n, size in zip(self.groups, places, sizes, strict=True))
        common = {"AXES": self.axes, "SIGN": self.sign, "HEAD_DIM": self.head_dim}
        launch = {"num_warps": tiles.warps, "num_stages": self.configs[kernel].stages}
        geometry = (self.dilations, self.groups, *self.lengths, *slots, self.heads)
        return Plan(tiles, math.prod(slots), geometry, {**common, **constants, **launch})

    def _by_query(self, kernel: str) -> Plan:
        """Of a kernel whose programs work for tiles of queries."""
        tiles = choose_tiles(kernel, self.configs[kernel], self.key_places[1:], self.axes[1:])
        constants = {"QUERY_H": tiles.own[0], "QUERY_W": tiles.own[1]}
        if kernel != "bwd_dextra":
            constants |= {"KEY_H": tiles.others[0], "KEY_W": tiles.others[1], "HAS_PAD": self.has_pad}
        if kernel in ("fwd", "bwd_dq"):
            # Of several planes, or with additional keys, there is more than one tile.
            single = tiles.single and self.axes[0][0] == 1 and self.n_extra == 0
            constants |= {"HAS_RPB": self.has_rpb, "HAS_EXTRA": self.n_extra > 0}
            constants |= {"SINGLE": single, "ONE_COLUMN": tiles.one_column}
        return self._plan(kernel, tiles, self.places, constants)

    def _by_key(self) -> Plan:
        tiles = choose_tiles("bwd_dkdv", self.configs["bwd_dkdv"], self.places[1:], self.axes[1:])
        (key_h, key_w), (query_h, query_w) = tiles.own, tiles.others
        sizes = {"QUERY_H": query_h, "QUERY_W": query_w, "KEY_H": key_h, "KEY_W": key_w}
        options = {"HAS_RPB": self.has_rpb, "HAS_PAD": self.has_pad, "ONE_COLUMN": tiles.one_column}
        return self._plan("bwd_dkdv", tiles, self.key_places, {**sizes, **options})

    def splits(self, kernel: str, programs: int, most: int) -> int:
        """In how many shares a kernel's queries are summed, of which each takes so many programs."""
        return shares(most, programs, WALKERS[kernel] * self.multiprocessors)


_cached_problem = functools.lru_cache(maxsize=1024)(Problem)


def problem_of(
    q: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    pad_k: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Problem:
    """The launch parameters of a call; found once for calls of one kind."""
    return _cached_problem(
        tuple(q.shape),
        q.element_size(),
        tuple(zip(kernel_size, stride, is_causal, strict=True)),
        tuple(dilation),
        scale,
        rpb is not None,
        0 if extra_k is None else extra_k.shape[1],
        pad_k is not None,
        multiprocessors(q.device),
    )


def _offset_type(*tensors: Tensor) -> tl.dtype:
    """Type of the offsets inside an image."""
    return tl.int32 if all(t.untyped_storage().nbytes() < INT32_BYTES for t in tensors) else tl.int64


def _of_width(configs: dict[int, Config], head_dim: int) -> Config:
    return next(config for most, config in configs.items() if head_dim <= most)


def _divide_up(length: int, size: int) -> int:
    return -(-length // size)


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides over (B, Z, H, W, heads) of tensors with one to three axes."""
    found = []
    for tensor in tensors:
        batch, *rest = tensor.stride()[:-1]
        found.append((batch, *(0,) * (4 - len(rest)), *rest))
    return tuple(found)


def _extra_strides(*tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    return tuple((0, 0, 0) if tensor is None else tensor.stride()[:3] for tensor in tensors)


def neighborhood_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """Fused forward; arguments as in `neighborhood_attention_reference`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    problem = problem_of(q, rpb, extra_k, pad_k, kernel_size, stride, dilation, is_causal, scale)
    inputs = _Inputs(q, k, v, rpb, extra_k, extra_v, pad_k, pad_v)
    plan = problem.fwd
    launch(
        neighborhood_fwd_kernel, (problem.batch * plan.slots * problem.heads,),
        *inputs.tensors, out, *inputs.strides, *_strides(out), *plan.geometry, problem.n_extra, problem.scale,
        **plan.options, OFFSET=_offset_type(*inputs.maps, out),
    )  # fmt: skip
    return out


def neighborhood_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, ...]:
    """Fused backward: the gradients of all tensors, contiguous, empty where an optional one is absent."""
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0:
        return d_q, d_k, d_v, *(zeros_or_empty(grad, t) for t in (rpb, extra_k, extra_v, pad_k, pad_v))
    problem = problem_of(q, rpb, extra_k, pad_k, kernel_size, stride, dilation, is_causal, scale)
    inputs = _Inputs(q, k, v, rpb, extra_k, extra_v, pad_k, pad_v)
    (grad,) = unit_stride(grad)
    stats = _run_dq(problem, inputs, grad, d_q)
    d_pad_k, d_pad_v = _run_dkdv(problem, inputs, grad, stats, d_k, d_v)
    d_rpb = empty_gradient(grad) if rpb is None else _run_drpb(problem, inputs, grad, stats, rpb)
    d_extra_k, d_extra_v = _run_dextra(problem, inputs, grad, stats)
    return d_q, d_k, d_v, d_rpb, d_extra_k, d_extra_v, d_pad_k, d_pad_v


class _Inputs:
    """The inputs as the kernels take them: channels of unit stride."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rpb: Tensor | None,
        extra_k: Tensor | None,
        extra_v: Tensor | None,
        pad_k: Tensor | None,
        pad_v: Tensor | None,
    ) -> None:
        self.q, self.k, self.v = unit_stride(q, k, v)
        self.rpb, self.pad_k, self.pad_v = map(contiguous, (rpb, pad_k, pad_v))
        self.extra_k, self.extra_v = (None if t is None else unit_stride(t)[0] for t in (extra_k, extra_v))
        self.given = (extra_k, extra_v, pad_k, pad_v)

    @property
    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return self.q, self.k, self.v

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernels of the queries read."""
        return self.q, self.k, self.v, self.rpb, self.extra_k, self.extra_v, self.pad_k, self.pad_v

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Strides of q, k, v and of the additional keys and values."""
        return *_strides(*self.maps), *_extra_strides(self.extra_k, self.extra_v)


def _run_dq(problem: Problem, inputs: _Inputs, grad: Tensor, d_q: Tensor) -> Tensor:
    """Fills `d_q`; returns the statistics of every query's softmax."""
    stats = empty_statistics(problem.batch * problem.heads, math.prod(problem.lengths), d_q)
    plan = problem.bwd_dq
    launch(
        neighborhood_bwd_dq_kernel, (problem.batch * plan.slots * problem.heads,),
        grad, *inputs.tensors, d_q, stats, *_strides(grad), *inputs.strides, *_strides(d_q),
        *plan.geometry, problem.n_extra, problem.scale,
        **plan.options, OFFSET=_offset_type(grad, *inputs.maps, d_q),
    )  # fmt: skip
    return stats


def _exact_statistics(problem: Problem, inputs: _Inputs, grad: Tensor) -> Tensor:
    """The statistics of every query's softmax, in float64 as are their products."""
    stats = empty_statistics(problem.batch * problem.heads, math.prod(problem.lengths), grad, torch.float64)
    plan = problem.bwd_dq
    options = {name: value for name, value in plan.options.items() if name != "SINGLE"}
    launch(
        neighborhood_bwd_exact_stats_kernel, (problem.batch * plan.slots * problem.heads,),
        grad, *inputs.tensors, stats, *_strides(grad), *inputs.strides,
        *plan.geometry, problem.n_extra, problem.scale,
        **options, OFFSET=_offset_type(grad, *inputs.maps),
    )  # fmt: skip
    return stats


def _run_dkdv(
    problem: Problem, inputs: _Inputs, grad: Tensor, stats: Tensor, d_k: Tensor, d_v: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills `d_k` and `d_v`; returns the gradients of the pads."""
    plan = problem.bwd_dkdv
    programs = problem.batch * plan.slots
    shape = (programs if problem.has_pad else 0, problem.heads, 2, problem.head_dim)
    d_pads = torch.empty(shape, dtype=torch.float32, device=grad.device)
    launch(
        neighborhood_bwd_dkdv_kernel, (programs * problem.heads,),
        grad, *inputs.maps, inputs.rpb, inputs.pad_k, inputs.pad_v, stats, d_k, d_v, d_pads,
        *_strides(grad, *inputs.maps, d_k, d_v), *plan.geometry, problem.scale,
        **plan.options, OFFSET=_offset_type(grad, *inputs.maps, d_k, d_v),
    )  # fmt: skip
    _, _, pad_k, pad_v = inputs.given
    if pad_k is None or pad_v is None or not problem.has_pad:
        return zeros_or_empty(grad, pad_k), zeros_or_empty(grad, pad_v)
    return sums_of_pairs(d_pads, pad_k.dtype, pad_v.dtype)


def _run_drpb(problem: Problem, inputs: _Inputs, grad: Tensor, stats: Tensor, rpb: Tensor) -> Tensor:
    """Gradient of the bias: sums for each pair of places in a tile, and of these along the distances."""
    if grad.dtype == torch.float32:
        stats = _exact_statistics(problem, inputs, grad)
    plan = problem.bwd_drpb
    tiles = plan.tiles
    rows, columns = (boxes_around(*sizes) for sizes in zip(tiles.own, tiles.others, problem.axes[1:], strict=True))
    boxes = {"FIRST_Y": rows.first, "FIRST_X": columns.first, "BOXES_Y": rows.number, "BOXES_X": columns.number}
    n_boxes = (2 * problem.axes[0][0] - 1) * rows.number * columns.number
    n_slots = problem.batch * plan.slots
    # Away from the borders a tile of queries sees only few of the boxes: those are to fill the device.
    splits = problem.splits("bwd_drpb", tiles.steps * problem.axes[0][0] * problem.heads, n_slots)
    shape = (splits, problem.heads, n_boxes, math.prod(tiles.own), math.prod(tiles.others))
    sums = torch.empty(shape, dtype=torch.float32, device=grad.device)
    launch(
        neighborhood_bwd_drpb_kernel, (splits * problem.heads * n_boxes,),
        grad, *inputs.maps, inputs.rpb, inputs.pad_k, inputs.pad_v, stats, sums, *_strides(grad, *inputs.maps),
        *plan.geometry, n_slots, splits, problem.scale,
        **plan.options, **boxes, OFFSET=_offset_type(grad, *inputs.maps),
    )  # fmt: skip
    d_rpb = torch.empty(rpb.shape, dtype=rpb.dtype, device=grad.device)
    shared = {name: plan.options[name] for name in ("AXES", "QUERY_H", "QUERY_W", "KEY_H", "KEY_W")}
    launch(
        neighborhood_bwd_drpb_sum_kernel, (rpb.numel(),), sums, d_rpb, problem.heads, splits, **shared, **boxes,
        SPLITS=32, num_warps=4,
    )  # fmt: skip
    return d_rpb


def _run_dextra(problem: Problem, inputs: _Inputs, grad: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the additional keys and values: sums over shares of the queries, added in their order."""
    extra_k, extra_v, _, _ = inputs.given
    if extra_k is None or extra_v is None or problem.n_extra == 0:
        return zeros_or_empty(grad, extra_k), zeros_or_empty(grad, extra_v)
    plan = problem.bwd_dextra
    blocks = math.ceil(problem.n_extra / EXTRA_BLOCK)
    programs = problem.batch * blocks * problem.heads
    splits = problem.splits("bwd_dextra", programs, plan.slots)
    shape = (splits, problem.batch, blocks, problem.heads, 2, EXTRA_BLOCK, problem.head_dim)
    sums = torch.empty(shape, dtype=torch.float32, device=grad.device)
    launch(
        neighborhood_bwd_dextra_kernel, (splits * programs,),
        grad, inputs.q, inputs.extra_k, inputs.extra_v, stats, sums,
        *_strides(grad, inputs.q), *_extra_strides(inputs.extra_k, inputs.extra_v),
        *plan.geometry, problem.n_extra, plan.slots, splits, problem.scale,
        **plan.options, BLOCK=EXTRA_BLOCK, OFFSET=_offset_type(grad, inputs.q),
    )  # fmt: skip
    found = sums.sum(0).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)[:, :, : problem.n_extra]  # (2, B, n, heads, D)
    return found[0].to(extra_k.dtype).contiguous(), found[1].to(extra_v.dtype).contiguous()


class Boxes(NamedTuple):
    """Tiles of keys on one axis at fixed distances from a tile of queries.

    Attributes:
        first: First place of the first one, from the first query.
        number: How many cover all distances.
    """

    first: int
    number: int


def boxes_around(queries: int, keys: int, axis: _Axis) -> Boxes:
    """Boxes of `keys` around `queries` in a row, one of which starts where the window of the first query does."""
    kernel, _, causal = axis
    start = kernel - 1 if causal else kernel // 2
    before = math.ceil((kernel - 1 - start) / keys)
    behind = queries - 1 + (0 if causal else kernel - 1)
    return Boxes(-start - before * keys, before + math.ceil((start + behind + 1) / keys))
