"""Window attention in plain PyTorch: the definition that the fused kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.partition import from_windows, pad_map, roll_map, to_windows
from vitrail.kernels._common.recording import is_padded, padding_to


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    scale: float,
    roll_first: bool,
) -> Tensor:
    """Computes `softmax(scale * q k^T + bias) v` inside every window of a cyclically shifted map.

    See `vitrail.kernels.window_attention.window_attention` for the arguments.
    """
    height, width = q.shape[1:3]
    pads = (padding_to(height, window_size[0]), padding_to(width, window_size[1]))
    mask = _attention_mask(height, width, pads, window_size, shift_size, pad_k is not None, roll_first, q.device)
    early_shift, shift = (shift_size, (0, 0)) if roll_first else ((0, 0), shift_size)
    q_windows = to_windows(pad_map(roll_map(q, early_shift), pads, None), window_size, shift)  # (B * nW, T, heads, D)
    k_windows = to_windows(pad_map(roll_map(k, early_shift), pads, pad_k), window_size, shift)
    v_windows = to_windows(pad_map(roll_map(v, early_shift), pads, pad_v), window_size, shift)
    out = F.scaled_dot_product_attention(
        q_windows.transpose(1, 2),  # (B * nW, heads, T, D)
        k_windows.transpose(1, 2),
        v_windows.transpose(1, 2),
        attn_mask=_additive_mask(bias, mask, q),
        scale=scale,
    )
    y = from_windows(out.transpose(1, 2), q, pads, window_size, shift)
    return roll_map(y, (-early_shift[0], -early_shift[1]))


def _attention_mask(
    height: int,
    width: int,
    pads: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    pads_are_keys: bool,
    roll_first: bool,
    device: torch.device,
) -> Tensor | None:
    """Which key a query sees: (nW, T, T) of bool, or None where every query sees its whole window.

    A cyclic shift brings tokens from opposite borders into one window; only those that were neighbours before the
    shift see each other (Swin, section 3.2). Padded keys without a value are hidden from real queries.
    """
    hides_pads = is_padded(pads) and not pads_are_keys
    if shift == (0, 0) and not hides_pads:
        return None
    padded = (height + pads[0], width + pads[1])
    y = torch.arange(padded[0], device=device)[:, None]  # after the shift
    x = torch.arange(padded[1], device=device)[None, :]
    wrapped = 2 * (y >= padded[0] - shift[0]).int() + (x >= padded[1] - shift[1]).int()
    if not roll_first:
        y, x = (y + shift[0]) % padded[0], (x + shift[1]) % padded[1]  # before the shift
    real = (y < height) & (x < width)
    wrapped_windows = to_windows(wrapped[None, :, :, None, None], window, (0, 0))[..., 0, 0]  # (nW, T)
    real_windows = to_windows(real[None, :, :, None, None], window, (0, 0))[..., 0, 0]
    sees = wrapped_windows[:, :, None] == wrapped_windows[:, None, :]
    if hides_pads:
        # A padded query's output is cropped; letting it see padded keys keeps its softmax finite.
        sees = sees & (real_windows[:, None, :] | ~real_windows[:, :, None])
    return sees


def _additive_mask(bias: Tensor | None, sees: Tensor | None, q: Tensor) -> Tensor | None:
    """Bias (heads, T, T) and visibility (nW, T, T) as one mask (B * nW or 1, heads or 1, T, T) in q's dtype."""
    mask = None if bias is None else bias.to(q.dtype)[None]
    if sees is None:
        return mask
    hidden = torch.zeros(sees.shape, dtype=q.dtype, device=q.device).masked_fill(~sees, float("-inf"))
    mask = hidden[:, None] if mask is None else mask + hidden[:, None]  # (nW, heads or 1, T, T)
    return mask.repeat(q.shape[0], 1, 1, 1)
