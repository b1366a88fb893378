"""Retention in plain PyTorch: the definition that fused kernels are tested against, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.partition import from_windows, pad_map, to_windows
from vitrail.kernels._common.recording import is_padded, padding_to

ACTIVATIONS = ("softmax", "sigmoid")


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    slopes: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    activation: str,
    signed_slopes: bool,
    length_offset: bool,
    scale: float,
) -> Tensor:
    """Computes `softmax(l + m d) v` or `(sigmoid(l - a d) * exp(m d)) v`, with `l = scale * q k^T`, in every window.

    See `vitrail.kernels.retention.retention` for the arguments. Products are taken in q's dtype, everything else in
    at least float32.
    """
    cut = _Cut(q, window_size, shift_size)
    q_windows, k_windows, v_windows = (cut.split(x) for x in (q, k, v))
    bias = cut.bias(decay)
    if activation == "softmax":
        out = F.scaled_dot_product_attention(
            q_windows, k_windows, v_windows, attn_mask=bias.to(q_windows.dtype), scale=scale
        )
    else:
        act = _sigmoid(_logits(q_windows, k_windows, scale), cut, slopes, signed_slopes, length_offset)
        out = torch.matmul((act * bias.exp()).to(v.dtype), v_windows)
    return cut.join(out)


def retention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    slopes: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    activation: str,
    signed_slopes: bool,
    length_offset: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay and slopes (empty without slopes), contiguous; the weights are computed anew."""
    cut = _Cut(q, window_size, shift_size)
    grad_windows, q_windows, k_windows, v_windows = (cut.split(x) for x in (grad, q, k, v))
    logits, bias = _logits(q_windows, k_windows, scale), cut.bias(decay)
    d_weights = torch.matmul(grad_windows, v_windows.transpose(2, 3)).to(logits.dtype)
    if activation == "softmax":
        weights = (logits + bias).softmax(-1)
        d_bias = d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    else:
        act = _sigmoid(logits, cut, slopes, signed_slopes, length_offset)
        weights = act * bias.exp()
        d_bias = d_weights * weights
        d_logits = d_bias * (1 - act)
    d_scaled = (d_logits * scale).to(q.dtype)
    d_q = torch.matmul(d_scaled, k_windows)
    d_k = torch.matmul(d_scaled.transpose(2, 3), q_windows)
    d_v = torch.matmul(weights.to(v.dtype).transpose(2, 3), grad_windows)
    d_decay = _per_head(d_bias, cut.distance()).to(decay.dtype)
    d_slopes = grad.new_empty(0)
    if slopes is not None:
        d_slopes = -_per_head(d_logits, cut.distance(signed_slopes)).to(slopes.dtype)
    return cut.join(d_q), cut.join(d_k), cut.join(d_v), d_decay, d_slopes


def manhattan_distance(window_size: Sequence[int], like: Tensor, signed: bool = False) -> Tensor:
    """Manhattan distance of every query and key of a window, (T, T) on the device and in the dtype of `like`.

    Signed: query minus key, the axes added.
    """
    ticks = (torch.arange(n, device=like.device, dtype=like.dtype) for n in window_size)
    steps = [place.reshape(-1, 1) - place.reshape(1, -1) for place in torch.meshgrid(*ticks, indexing="ij")]
    return steps[0] + steps[1] if signed else steps[0].abs() + steps[1].abs()


class _Cut:
    """How a call cuts its maps, which are like `q`, into nW windows of T tokens each."""

    def __init__(self, q: Tensor, window_size: Sequence[int], shift_size: Sequence[int]) -> None:
        self.like = q
        self.window, self.shift = (window_size[0], window_size[1]), (shift_size[0], shift_size[1])
        self.pads = (padding_to(q.shape[1], self.window[0]), padding_to(q.shape[2], self.window[1]))
        self.dtype = torch.promote_types(q.dtype, torch.float32)

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, heads, D) -> (B * nW, heads, T, D)."""
        return to_windows(pad_map(x, self.pads, None), self.window, self.shift).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """(B * nW, heads, T, D) -> contiguous (B, H, W, heads, D)."""
        return from_windows(x.transpose(1, 2), self.like, self.pads, self.window, self.shift)

    def distance(self, signed: bool = False) -> Tensor:
        """Distance of every query and key, (T, T); see `manhattan_distance`."""
        return manhattan_distance(self.window, self.like.new_empty(0, dtype=self.dtype), signed)

    def bias(self, decay: Tensor) -> Tensor:
        """Decay times distance, -inf where a query must not see, (B * nW, heads, T, T); batch 1 if all are alike."""
        bias = (decay.to(self.dtype)[:, None, None] * self.distance())[None]
        if not is_padded(self.pads) and self.shift == (0, 0):
            return bias
        return bias.masked_fill(~self._visible()[:, None], float("-inf")).repeat(self.like.shape[0], 1, 1, 1)

    def _visible(self) -> Tensor:
        """Which key a query sees, (nW, T, T).

        Padding sees padding alone: its result is cropped, and the softmax of a row that sees nothing would be NaN.
        """
        height, width = self.like.shape[1:3]
        y = torch.arange(height + self.pads[0], device=self.like.device)[:, None]
        x = torch.arange(width + self.pads[1], device=self.like.device)
        # The shift carries the first rows and columns behind the last, which were no neighbours of theirs.
        region = 2 * (y < self.shift[0]).int() + (x < self.shift[1]).int()
        region = region.masked_fill((y >= height) | (x >= width), -1)
        region = to_windows(region[None, :, :, None, None], self.window, self.shift)[..., 0, 0]  # (nW, T)
        return region[:, :, None] == region[:, None, :]


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B * nW, heads, T, T) in at least float32; scaled before the product, to stay inside float16's range."""
    return torch.matmul(q * scale, k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32))


def _sigmoid(logits: Tensor, cut: _Cut, slopes: Tensor | None, signed_slopes: bool, length_offset: bool) -> Tensor:
    if slopes is not None:
        logits = logits - slopes.to(logits.dtype)[:, None, None] * cut.distance(signed_slopes)
    if length_offset:
        logits = logits - math.log(cut.window[0] * cut.window[1])
    return logits.sigmoid()


def _per_head(d_map: Tensor, distance: Tensor) -> Tensor:
    """Sum of (B * nW, heads, T, T) times (T, T) over everything but the heads."""
    return (d_map.sum(0) * distance).sum((1, 2))
