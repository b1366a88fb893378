"""Varying window attention: windows of a map attend to contexts of several times their size, at equal cost."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels.context_window_attention import context_window_attention
from vitrail.layers._heads import head_width


class ContextGrid(NamedTuple):
    """Where one axis of the context windows is read, in pixels and in tokens of `ratio` pixels.

    Attributes:
        pieces: (start, length) in pixels of the copy-shift padded axis; side by side they hold all tokens that any
            window reads, each once.
        token_starts: First token of each window, counted over all pieces.
    """

    pieces: list[tuple[int, int]]
    token_starts: list[int]


def context_grid(window: int, ratio: int, n_windows: int) -> ContextGrid:
    """Lays windows of `window` tokens, one every `window` pixels, on grids that they share.

    Windows whose first pixels leave the same remainder by `ratio` lie on one grid: with a window that is a multiple
    of the ratio these are all of them, with coprime sizes none share more than every `ratio`-th does.

    Args:
        window: Pixels from one window to the next, and tokens in a window.
        ratio: Pixels of a token.
        n_windows: Windows along the axis.
    """
    step = ratio // math.gcd(window, ratio)  # every step-th window lies on the same grid
    pieces, token_starts, n_tokens = [], [0] * n_windows, 0
    for first in range(min(step, n_windows)):
        members = range(first, n_windows, step)
        for member in members:
            token_starts[member] = n_tokens + (member - first) * window // ratio
        length = (members[-1] - first) * window // ratio + window
        pieces.append((first * window, length * ratio))
        n_tokens += length
    return ContextGrid(pieces, token_starts)


def copy_shift_pad(x: Tensor, window: int, ratio: int, dim: int) -> Tensor:
    """Pads an axis by copies of its own inside, so that the outer windows' contexts hold no zeros.

    The first context then holds the first `ratio * window` pixels, the hindmost of them moved to the front, and the
    last context the last ones likewise (copy-shift padding, CSP, of arXiv 2404.16573 in its authors' code). Both sides
    grow by `ceil((ratio - 1) * window / 2)`.

    Args:
        x: Any tensor whose axis `dim` has at least `ratio * window` entries.
        window: Size of a query window.
        ratio: Size of a context window in multiples of `window`.
        dim: The axis.
    """
    context, skipped = ratio * window, (ratio + 1) * window // 2
    copied = context - skipped
    left = x.narrow(dim, skipped, copied)
    right = x.narrow(dim, x.shape[dim] - context, copied)
    return torch.cat((left, x, right), dim)


@register_notrace_module
class VaryingWindowAttention(nn.Module):
    """Attention of 8 x 8 windows to contexts `ratio` times their height and width (VWA of arXiv 2404.16573).

    The map is reduced to C / ratio^2 channels by a dense convolution (DOPE), padded by copies of itself (CSP), and
    ratio x ratio pixels make one token of C channels: a context has as many tokens as a query window. The authors
    unfold every context and project its tokens. Here keys and values come from one convolution of stride `ratio`
    over the padded map, which gives the same numbers once for all windows that share them.

    (B, C, H, W) to (B, C, H, W), C a multiple of `ratio ** 2`. A map whose size is no multiple of the windows is
    continued by its last row and column, and the result is cropped.

    Args:
        dim: Channels C.
        ratio: Height and width of a context in multiples of the window's: even, at most `n_windows`.
        num_heads: Attention heads.
        n_windows: Windows along each side of the map, whatever its size.
        reduce_bias: Add a bias in the convolution that reduces the channels.
        out_norm: Batch norm, initially zero, behind an output projection without bias; otherwise that has a bias.
        shortcut: Add the input to the result.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim`, `ratio`, `num_heads` and `n_windows` do not fit together.
    """

    def __init__(
        self,
        dim: int,
        ratio: int,
        num_heads: int = 1,
        n_windows: int = 8,
        reduce_bias: bool = False,
        out_norm: bool = False,
        shortcut: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ratio < 2 or ratio % 2 or ratio > n_windows or dim % ratio**2:
            raise ValueError(
                f"VaryingWindowAttention: ratio is {ratio} with dim {dim} and n_windows {n_windows}; allowed: even, "
                "at most n_windows, dim a multiple of its square"
            )
        self.ratio = ratio
        self.num_heads = num_heads
        self.head_dim = head_width("VaryingWindowAttention", dim, num_heads)
        self.n_windows = n_windows
        self.shortcut = shortcut
        reduced = dim // ratio**2
        self.reduce = nn.Conv2d(dim, reduced, ratio, bias=reduce_bias, device=device, dtype=dtype)
        self.reduce_norm = nn.BatchNorm2d(reduced, device=device, dtype=dtype)
        self.q = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)
        self.kv = nn.Conv2d(reduced, 2 * dim, ratio, stride=ratio, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 1, bias=not out_norm, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype) if out_norm else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew: queries normal with deviation 0.01, the rest Kaiming normal, the last norm zero."""
        nn.init.normal_(self.q.weight, std=0.01)
        for conv in (self.reduce, self.proj):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        # Of a projection of C to C channels, which this convolution is twice.
        nn.init.normal_(self.kv.weight, std=(2 / self.q.out_channels) ** 0.5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        if isinstance(self.norm, nn.BatchNorm2d):
            nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), for any H and W."""
        height, width = x.shape[2:]
        window = (math.ceil(height / self.n_windows), math.ceil(width / self.n_windows))
        rows = context_grid(window[0], self.ratio, math.ceil(height / window[0]))
        columns = context_grid(window[1], self.ratio, math.ceil(width / window[1]))
        context = _read(self.padded_context(x, window), rows, columns)
        k, v = self.kv(context).chunk(2, 1)
        y = context_window_attention(
            self._split_heads(self.q(x)),
            self._split_heads(k),
            self._split_heads(v),
            window_size=window,
            row_starts=rows.token_starts,
            column_starts=columns.token_starts,
        )
        y = self.norm(self.proj(y.flatten(3).permute(0, 3, 1, 2)))
        return x + y if self.shortcut else y

    def padded_context(self, x: Tensor, window: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> what the contexts are cut out of: C / ratio^2 channels, continued and copy-shift padded."""
        for dim in (2, 3):
            x = _continue(x, self.n_windows * window[dim - 2], dim)
        before, after = self.ratio // 2 - 1, self.ratio // 2
        x = F.relu(self.reduce_norm(self.reduce(F.pad(x, (before, after, before, after)))))
        for dim in (3, 2):
            x = copy_shift_pad(x, window[dim - 2], self.ratio, dim)
        return x

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W, heads, D)."""
        return x.permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.head_dim))

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, num_heads={self.num_heads}, n_windows={self.n_windows}, shortcut={self.shortcut}"


def _continue(x: Tensor, size: int, dim: int) -> Tensor:
    """Repeats the last entry of an axis up to `size` (a concatenation, whose gradient has a fixed order)."""
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.narrow(dim, -1, 1).expand(shape)), dim)


def _read(x: Tensor, rows: ContextGrid, columns: ContextGrid) -> Tensor:
    """Lays the pieces of both axes side by side; a map that is read whole is not copied."""
    for dim, grid in ((2, rows), (3, columns)):
        pieces = [x.narrow(dim, start, length) for start, length in grid.pieces]
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return x
