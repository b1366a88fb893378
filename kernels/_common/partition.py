"""Pads a map and cuts it into windows, for the eager references."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.recording import is_padded


def pad_map(x: Tensor, pads: tuple[int, int], value: Tensor | None) -> Tensor:
    """Pads (B, H, W, heads, D) at the bottom and right with `value` (heads, D), or with zeros."""
    if not is_padded(pads):
        return x
    padded = F.pad(x, (0, 0, 0, 0, 0, pads[1], 0, pads[0]))
    if value is None:
        return padded
    is_pad = torch.ones(padded.shape[1:3], dtype=torch.bool, device=x.device)
    is_pad[: x.shape[1], : x.shape[2]] = False
    return torch.where(is_pad[..., None, None], value.to(x.dtype), padded)


def roll_map(x: Tensor, shift: tuple[int, int]) -> Tensor:
    """Rolls (B, H, W, heads, D) cyclically up and left by `shift`."""
    return x if shift == (0, 0) else torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))


def to_windows(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, D) -> (B * nW, T, heads, D), windows in raster order, tokens in raster order."""
    x = roll_map(x, shift)
    batch, height, width, heads, dim = x.shape
    rows, columns = height // window[0], width // window[1]
    x = x.reshape(batch, rows, window[0], columns, window[1], heads, dim).transpose(2, 3)
    return x.reshape(batch * rows * columns, window[0] * window[1], heads, dim)


def from_windows(
    x: Tensor, like: Tensor, pads: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """(B * nW, T, heads, D) -> (B, H, W, heads, D) shaped like `like`: undoes partition, roll and pad."""
    batch, height, width, heads, dim = like.shape
    rows, columns = (height + pads[0]) // window[0], (width + pads[1]) // window[1]
    x = x.reshape(batch, rows, columns, window[0], window[1], heads, dim).transpose(2, 3)
    x = x.reshape(batch, height + pads[0], width + pads[1], heads, dim)
    return roll_map(x, (-shift[0], -shift[1]))[:, :height, :width].contiguous()
