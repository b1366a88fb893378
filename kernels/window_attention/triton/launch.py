"""Launches of window attention: which kernels run, how they are cut, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from vitrail.kernels._common.gradients import empty_gradient, zeros_or_empty
from vitrail.kernels._common.launch import Config, contiguous, launch, map_strides, multiprocessors, unit_stride
from vitrail.kernels._common.triton import empty_statistics, shares, sum_of_parts, sums_of_pairs
from vitrail.kernels.window_attention.triton.one_tile import _window_bwd_kernel, _window_fwd_kernel
from vitrail.kernels.window_attention.triton.tiled import (
    _window_bwd_dbias_kernel,
    _window_bwd_dkdv_kernel,
    _window_bwd_dq_kernel,
    _window_fwd_tiled_kernel,
)
from vitrail.kernels.window_attention.triton.walking import (
    _window_bwd_dkdv_walking_kernel,
    _window_bwd_dq_walking_kernel,
    _window_fwd_walking_kernel,
    _window_mask_kernel,
)

_ONE_TILE = 64  # most tokens of a window that is one tile
_WIDEST_TILE = 256  # most bytes of a head for that: float32's products of more would not fit into the registers
_MOST_WALKED = 256  # most tokens of a window whose bias gradient fits into the registers, a block of keys a program
_WIDEST_WALKED = 64  # most channels of a head for that


class Walk(NamedTuple):
    """How a kernel for windows of a few tiles is cut and launched.

    Attributes:
        own: Tokens that a program works for.
        others: Tokens that they meet at a time.
        staged: Whether masks go through shared memory, ahead of time, rather than straight into registers.
        config: Warps, pipeline stages, programs a multiprocessor.
        registers: Most registers of a thread.
    """

    own: int
    others: int
    staged: bool
    config: Config
    registers: int | None = None

    @property
    def launch(self) -> dict[str, Any]:
        """Keyword arguments of the Triton launch."""
        return {**self.config.launch, "STAGED": self.staged, "maxnreg": self.registers}

    def cut(self, tokens: int) -> dict[str, int]:
        """Others as whole tiles and the smallest tile that holds the rest."""
        whole, rest = _whole_and_rest(tokens, self.others)
        return {"WHOLE": whole, "REST": rest, "BLOCK": self.others}

    def columns(self, tokens: int) -> int:
        """Tokens that all tiles of others hold."""
        return sum(_whole_and_rest(tokens, self.others))

    def blocks(self, tokens: int) -> int:
        """Number of blocks of a window."""
        return math.ceil(tokens / self.own)

    def rows(self, tokens: int) -> int:
        """Tokens that all blocks hold."""
        return self.own * self.blocks(tokens)


def _whole_and_rest(tokens: int, block: int) -> tuple[int, int]:
    """Tokens in whole blocks, and the smallest tile that holds the others: 144 are 64 + 64 + 16."""
    rest = tokens % block
    tile = max(16, triton.next_power_of_2(rest)) if rest else 0
    return (tokens - rest + block, 0) if tile == block else (tokens - rest, tile)


# By kernel, for heads of up to so many channels.
WALKS = {
    "fwd": {
        32: Walk(64, 64, False, Config(4, 2, 3), 168),
        64: Walk(64, 32, False, Config(4, 1, 3), 168),
    },
    "bwd_dq": {
        32: Walk(64, 64, False, Config(4, 2, 3), 168),
        64: Walk(64, 64, False, Config(4, 2, 1)),
    },
    "bwd_dkdv": {
        32: Walk(64, 32, True, Config(4, 2, 2)),
        64: Walk(64, 32, False, Config(4, 1, 2)),
    },
}
# Of the other kernels in half precision.
CONFIGS = {
    "fwd": Config(4, 3, 8),
    "bwd": Config(4, 2, 4),
    "fwd_tiled": Config(4, 2),
    "bwd_dq": Config(4, 2),
    "bwd_dkdv": Config(4, 2),
    "bwd_dbias": Config(4, 2, 4),
}
# Tensor cores do not multiply float32 in full: a thread holds whole rows of both factors, so that wider heads take more
# threads.
CONFIGS_FLOAT32 = {
    32: {**dict.fromkeys(CONFIGS, Config(4, 1, 4)), "fwd": Config(8, 2, 2), "bwd": Config(8, 2, 2)},
    64: {**dict.fromkeys(CONFIGS, Config(8, 1, 2)), "fwd": Config(16, 1, 1), "bwd": Config(16, 1, 1)},
    128: dict.fromkeys(CONFIGS, Config(8, 1, 2)),
}


class _Problem:
    """The launch parameters that all kernels of one call share."""

    def __init__(
        self,
        q: Tensor,
        bias: Tensor | None,
        pad_k: Tensor | None,
        window: tuple[int, int],
        shift: tuple[int, int],
        scale: float,
        roll_first: bool,
    ) -> None:
        batch, height, width, self.heads, self.head_dim = q.shape
        self.dtype, self.device = q.dtype, q.device
        self.multiprocessors = multiprocessors(q.device)
        self.tokens = window[0] * window[1]
        self.n_windows = batch * math.ceil(height / window[0]) * math.ceil(width / window[1])
        padded = height % window[0] != 0 or width % window[1] != 0
        shifted = any(shift)
        self.has_bias, self.has_pad = bias is not None, padded and pad_k is not None
        self.hides_pads = padded and pad_k is None
        self.size = (height, width)
        self.window: dict[str, Any] = {
            "WINDOW_H": window[0],
            "WINDOW_W": window[1],
            "SHIFT_Y": shift[0],
            "SHIFT_X": shift[1],
            # Without padding or shift the orders are one, and need no kernel of their own.
            "ROLL_FIRST": roll_first and padded and shifted,
        }
        self.constants = self.window | {
            "HAS_BIAS": self.has_bias,
            "HAS_PAD": self.has_pad,
            "HIDES_PADS": self.hides_pads,
            "HEAD_DIM": self.head_dim,
        }
        # Padding is in the last windows, until a shift moves some of it into the last but one.
        self.n_classes = 1 + (shifted or self.hides_pads) + (shifted and self.hides_pads and not roll_first)
        self.scalars = (height, width, self.n_windows, self.heads, scale)
        self.tiled_scalars = (height, width, self.heads, scale)

    @property
    def is_one_tile(self) -> bool:
        """Whether a window is one tile."""
        return self.tokens <= _ONE_TILE and self.head_dim * self.dtype.itemsize <= _WIDEST_TILE

    @property
    def is_walked(self) -> bool:
        """Whether the kernels that walk take a window of several tiles."""
        is_half = self.dtype != torch.float32
        return is_half and self.tokens <= _MOST_WALKED and self.head_dim <= _WIDEST_WALKED

    @property
    def block(self) -> int:
        """Tokens of a block of a large window."""
        return 64 if self.dtype != torch.float32 else 32

    def config(self, kernel: str) -> Config:
        """How one of the kernels that do not walk over windows of several tiles is launched."""
        if self.dtype != torch.float32:
            return CONFIGS[kernel]
        return next(configs[kernel] for most, configs in CONFIGS_FLOAT32.items() if self.head_dim <= most)

    def walk(self, kernel: str) -> Walk:
        """How a kernel walks over windows of several tiles, for this width of heads."""
        return next(walk for most, walk in WALKS[kernel].items() if self.head_dim <= most)

    def walkers(self, per_multiprocessor: int, n_blocks: int = 1) -> int:
        """How many programs share the windows of a block of one head, if all have so many on a multiprocessor."""
        return shares(self.n_windows, self.heads * n_blocks, per_multiprocessor * self.multiprocessors)

    def one_tile_constants(self) -> dict[str, Any]:
        """Compile-time parameters of kernels for windows of one tile."""
        return self.constants | {"BLOCK": max(16, triton.next_power_of_2(self.tokens))}

    def tiled_constants(self) -> dict[str, Any]:
        """Compile-time parameters of kernels for large windows, but for those of a launch."""
        whole, rest = _whole_and_rest(self.tokens, self.block)
        return self.constants | {"WHOLE": whole, "REST": rest, "BLOCK": self.block}

    def tiled_launches(self) -> Iterator[tuple[tuple[int], dict[str, Any]]]:
        """Grids and compile-time parameters that cover all windows: their whole blocks, then their rests."""
        constants = self.tiled_constants()
        whole, rest = constants["WHOLE"], constants["REST"]
        n_whole = whole // self.block
        if whole:
            blocks = {"FIRST": 0, "OWN": self.block, "N_OWN": n_whole}
            yield (self.n_windows * self.heads * n_whole,), constants | blocks
        if rest:
            yield (self.n_windows * self.heads,), constants | {"FIRST": whole, "OWN": rest, "N_OWN": 1}

    def walking_launch(self, kernel: str) -> tuple[int, tuple[int], dict[str, Any]]:
        """Programs that share a block's windows, grid and compile-time parameters of a kernel that walks."""
        walk = self.walk(kernel)
        n_blocks = walk.blocks(self.tokens)
        walkers = self.walkers(walk.config.programs, n_blocks)
        constants = self.window | {"HAS_PAD": self.has_pad, "HEAD_DIM": self.head_dim, "N_CLASSES": self.n_classes}
        constants |= walk.cut(self.tokens) | walk.launch
        constants |= {"OWN": walk.own, "N_OWN": n_blocks, "N_ROWS": walk.rows(self.tokens)}
        return walkers, (walkers * self.heads * n_blocks,), constants

    def mask(self, bias: Tensor | None, rows: int, columns: int, keys_first: bool = False) -> Tensor:
        """Bias, and minus infinity where keys are hidden, as the kernels that walk read it."""
        dtype = self.dtype if bias is None else bias.dtype
        mask = torch.empty((self.n_classes**2, self.heads, rows, columns), dtype=dtype, device=self.device)
        launch(
            _window_mask_kernel, (self.n_classes**2 * self.heads * rows // 16,), mask, bias, *self.size, self.heads,
            **self.window, HAS_BIAS=self.has_bias, HIDES_PADS=self.hides_pads, N_CLASSES=self.n_classes, N_ROWS=rows,
            N_COLUMNS=columns, KEYS_FIRST=keys_first, num_warps=4,
        )  # fmt: skip
        return mask

    def slots(self, n_bias: int, n_pad: int) -> tuple[Tensor, Tensor]:
        """Uninitialised partial sums over windows: bias (n_bias, heads, T, T) and padding (n_pad, heads, 2, D)."""
        options: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        bias_shape = (n_bias if self.has_bias else 0, self.heads, self.tokens, self.tokens)
        pad_shape = (n_pad if self.has_pad else 0, self.heads, 2, self.head_dim)
        return torch.empty(bias_shape, **options), torch.empty(pad_shape, **options)


def window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    roll_first: bool,
) -> Tensor:
    """Fused forward; arguments as in `window_attention_reference`."""
    q, k, v = unit_stride(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    problem = _Problem(q, bias, pad_k, window, shift, scale, roll_first)
    run = _choose(problem, _forward_one_tile, _forward_walking, _forward_tiled)
    run(problem, (q, k, v, contiguous(bias), contiguous(pad_k), contiguous(pad_v)), out)
    return out


def _choose(problem: _Problem, one_tile: Any, walking: Any, tiled: Any) -> Any:
    """The one place that says which kernels take a window."""
    return one_tile if problem.is_one_tile else walking if problem.is_walked else tiled


def _forward_one_tile(problem: _Problem, inputs: tuple[Any, ...], out: Tensor) -> None:
    config = problem.config("fwd")
    grid = (problem.walkers(config.programs) * problem.heads,)
    launch(
        _window_fwd_kernel, grid, *inputs, out, *map_strides(*inputs[:3], out), *problem.scalars,
        **problem.one_tile_constants(), **config.launch,
    )  # fmt: skip


def _forward_walking(problem: _Problem, inputs: tuple[Any, ...], out: Tensor) -> None:
    q, k, v = _alike(*inputs[:3])
    walk = problem.walk("fwd")
    mask = problem.mask(inputs[3], walk.rows(problem.tokens), walk.columns(problem.tokens))
    _walkers, grid, constants = problem.walking_launch("fwd")
    launch(
        _window_fwd_walking_kernel, grid, q, k, v, mask, *inputs[4:], out, *map_strides(q, out), *problem.scalars,
        **constants,
    )  # fmt: skip


def _forward_tiled(problem: _Problem, inputs: tuple[Any, ...], out: Tensor) -> None:
    bias = _padded_bias(problem, inputs[3])
    for grid, constants in problem.tiled_launches():
        launch(
            _window_fwd_tiled_kernel, grid, *inputs[:3], bias, *inputs[4:], out, *map_strides(*inputs[:3], out),
            *problem.tiled_scalars, **constants, **problem.config("fwd_tiled").launch,
        )  # fmt: skip


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three maps of the same strides, so that the place of a token is computed once; they usually are."""
    return (q, k, v) if q.stride() == k.stride() == v.stride() else (q.contiguous(), k.contiguous(), v.contiguous())


def _padded_bias(problem: _Problem, bias: Tensor | None) -> Tensor | None:
    """The bias as the kernels for large windows read it: -inf where the tiles are larger than the window."""
    if bias is None:
        return None
    missing = sum(_whole_and_rest(problem.tokens, problem.block)) - problem.tokens
    return F.pad(bias, (0, missing, 0, missing), value=-math.inf).contiguous()


def window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    bias: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    roll_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused backward: fills `d_q`, `d_k`, `d_v`; returns the gradients of bias and padding (empty if absent)."""
    grad, q, k, v = unit_stride(grad, q, k, v)
    if q.numel() == 0:
        return zeros_or_empty(grad, bias), zeros_or_empty(grad, pad_k), zeros_or_empty(grad, pad_v)
    problem = _Problem(q, bias, pad_k, window, shift, scale, roll_first)
    inputs = (grad, q, k, v, contiguous(bias), contiguous(pad_k), contiguous(pad_v))
    run = _choose(problem, _backward_one_tile, _backward_walking, _backward_tiled)
    bias_slots, pad_slots = run(problem, inputs, (d_q, d_k, d_v))
    d_bias = empty_gradient(grad) if bias is None else sum_of_parts(bias_slots, bias.dtype)
    if pad_k is None or pad_v is None or not problem.has_pad:
        return d_bias, zeros_or_empty(grad, pad_k), zeros_or_empty(grad, pad_v)
    return d_bias, *sums_of_pairs(pad_slots, pad_k.dtype, pad_v.dtype)


def _backward_one_tile(
    problem: _Problem, inputs: tuple[Any, ...], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the one-tile kernel; returns (slots, heads, T, T) and (slots, heads, 2, D) of partial sums."""
    config = problem.config("bwd")
    walkers = problem.walkers(config.programs)
    bias_slots, pad_slots = problem.slots(walkers, walkers)
    launch(
        _window_bwd_kernel, (walkers * problem.heads,), *inputs, *gradients, bias_slots, pad_slots,
        *map_strides(*inputs[:4], *gradients), *problem.scalars, **problem.one_tile_constants(), **config.launch,
    )  # fmt: skip
    return bias_slots, pad_slots


def _backward_walking(
    problem: _Problem, inputs: tuple[Any, ...], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the kernels for windows of a few tiles; returns partial sums like `_backward_one_tile`."""
    grad, bias, pads = inputs[0], inputs[4], inputs[5:]
    q, k, v = _alike(*inputs[1:4])
    d_q, d_k, d_v = gradients  # whose strides are the same
    tokens = problem.tokens
    dq, dkdv = problem.walk("bwd_dq"), problem.walk("bwd_dkdv")
    n_stats = dkdv.columns(tokens)  # of which the blocks of queries, no smaller than these tiles, fill all
    stats = empty_statistics(problem.n_windows * problem.heads, n_stats, q)
    shared = (stats, *map_strides(grad, q, d_q), *problem.scalars)
    mask = problem.mask(bias, dq.rows(tokens), dq.columns(tokens))
    _walkers, grid, constants = problem.walking_launch("bwd_dq")
    launch(_window_bwd_dq_walking_kernel, grid, grad, q, k, v, mask, *pads, d_q, *shared, **constants, N_STATS=n_stats)
    mask = problem.mask(bias, dkdv.rows(tokens), n_stats, keys_first=True)
    walkers, grid, constants = problem.walking_launch("bwd_dkdv")
    slots = problem.slots(walkers, walkers * constants["N_OWN"])
    launch(
        _window_bwd_dkdv_walking_kernel, grid, grad, q, k, v, mask, *pads, d_k, d_v, *slots, *shared, **constants,
        N_STATS=n_stats, HAS_BIAS=problem.has_bias,
    )  # fmt: skip
    return slots


def _backward_tiled(
    problem: _Problem, inputs: tuple[Any, ...], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the kernels for large windows; returns partial sums like `_backward_one_tile`."""
    inputs = (*inputs[:4], _padded_bias(problem, inputs[4]), *inputs[5:])
    n_blocks = math.ceil(problem.tokens / problem.block)
    splits = problem.walkers(problem.config("bwd_dbias").programs, n_blocks**2)
    bias_slots, pad_slots = problem.slots(splits, problem.n_windows * n_blocks)
    n_stats = sum(_whole_and_rest(problem.tokens, problem.block))
    stats = empty_statistics(problem.n_windows * problem.heads, n_stats, inputs[1])
    d_q, d_k, d_v = gradients
    strides = map_strides(*inputs[:4])
    for grid, constants in problem.tiled_launches():
        launch(
            _window_bwd_dq_kernel, grid, *inputs, d_q, stats, *strides, *map_strides(d_q), *problem.tiled_scalars,
            **constants, **problem.config("bwd_dq").launch,
        )  # fmt: skip
    for grid, constants in problem.tiled_launches():
        launch(
            _window_bwd_dkdv_kernel, grid, *inputs, d_k, d_v, pad_slots, stats, *strides, *map_strides(d_k, d_v),
            *problem.tiled_scalars, **constants, **problem.config("bwd_dkdv").launch,
        )  # fmt: skip
    if problem.has_bias:
        launch(
            _window_bwd_dbias_kernel, (splits * n_blocks**2 * problem.heads,), *inputs, bias_slots, stats, *strides,
            *problem.scalars, **problem.tiled_constants(), **problem.config("bwd_dbias").launch,
        )  # fmt: skip
    return bias_slots, pad_slots
