"""Swin's shifted windows with a bias, from image-shaped (B, H, W, heads, D) to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

from vitrail.kernels.window_attention import window_attention, window_attention_packed
from vitrail.tools._common.kernel_cases.common import (
    Implementation,
    KernelCase,
    compiled,
    flex,
    normal,
    parameter,
    stack_qkv,
)


class _Shape(NamedTuple):
    batch: int
    size: int
    heads: int
    dim: int
    window: int
    shift: int

    def __str__(self) -> str:
        text = f"B{self.batch} {self.size}x{self.size}x{self.heads * self.dim} h{self.heads} w{self.window}"
        return f"{text} s{self.shift}" if self.shift else text


# The stages of Swin-T at 224 pixels, then single stages at the batch of other published figures.
_SHAPES = {
    "gpu": (
        _Shape(128, 56, 3, 32, 7, 3),
        _Shape(128, 28, 6, 32, 7, 3),
        _Shape(128, 14, 12, 32, 7, 3),
        _Shape(128, 7, 24, 32, 7, 0),
        _Shape(64, 56, 3, 32, 7, 3),
        _Shape(64, 14, 12, 32, 7, 3),
        _Shape(64, 56, 3, 32, 14, 7),
    ),
    "cpu": (_Shape(2, 8, 2, 16, 4, 1), _Shape(1, 4, 1, 16, 4, 0)),
    "host": (_Shape(8, 7, 24, 32, 7, 0),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    image = normal(shape.batch, shape.size, shape.size, shape.heads, shape.dim)
    tokens = shape.window**2
    eager = _ours(shape, "eager")
    timm = _timm_core(shape, _softmax_attention)
    return KernelCase(
        "window_attention",
        str(shape),
        (image, image, image, parameter(shape.heads, tokens, tokens)),
        eager,
        {
            "vitrail": Implementation(_ours(shape, "auto")),
            "vitrail packed": Implementation(_ours_packed(shape), stack_qkv),
            "eager": Implementation(eager),
            "timm": Implementation(timm, stack_qkv),
            "timm SDPA": Implementation(_timm_core(shape, F.scaled_dot_product_attention), stack_qkv),
            "SDPA in windows": _attention_alone(shape),
            "eager compiled": compiled(eager),
            "timm compiled": compiled(timm, stack_qkv),
            "flex_attention": flex(_flex(shape), stack_qkv),
        },
    )


def _ours(shape: _Shape, backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return window_attention(q, k, v, window_size=shape.window, shift_size=shape.shift, bias=bias, backend=backend)

    return run


def _ours_packed(shape: _Shape) -> Callable[..., Tensor]:
    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        return window_attention_packed(qkv, window_size=shape.window, shift_size=shape.shift, bias=bias)

    return run


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + attn_mask).softmax(-1) @ v


def _timm_core(shape: _Shape, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Roll, partition, attention, reverse and roll back in the way of timm's Swin block."""

    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = _split_windows(qkv, shape)
        return _join_windows(attention(q, k, v, attn_mask=_mask(bias, shape, len(qkv))), shape)

    return run


def _split_windows(qkv: Tensor, shape: _Shape) -> tuple[Tensor, ...]:
    """(B, H, W, 3, heads, D) -> q, k, v, each (B * windows, heads, T, D)."""
    x = qkv.flatten(3)
    if shape.shift:
        x = torch.roll(x, (-shape.shift, -shape.shift), (1, 2))
    x = window_partition(x, (shape.window, shape.window))  # (B * windows, w, w, 3 * heads * D)
    return x.reshape(len(x), -1, 3, shape.heads, shape.dim).permute(2, 0, 3, 1, 4).unbind(0)


def _join_windows(out: Tensor, shape: _Shape) -> Tensor:
    """(B * windows, heads, T, D) -> (B, H, W, heads, D)."""
    x = out.transpose(1, 2).reshape(len(out), shape.window, shape.window, -1)
    x = window_reverse(x, (shape.window, shape.window), shape.size, shape.size)
    if shape.shift:
        x = torch.roll(x, (shape.shift, shape.shift), (1, 2))
    return x.unflatten(-1, (shape.heads, shape.dim))


def _regions(shape: _Shape, device: torch.device) -> Tensor:
    """Number of the region that every token of the rolled map came from, (windows, T)."""
    index = torch.arange(shape.size, device=device)
    part = (index >= shape.size - shape.window).int() + (index >= shape.size - shape.shift).int()
    regions = (3 * part[:, None] + part[None, :])[None, :, :, None]
    return window_partition(regions, (shape.window, shape.window)).flatten(1)


def _mask(bias: Tensor, shape: _Shape, batch: int) -> Tensor:
    """The bias, with -inf between regions: (1 or B * windows, heads, T, T)."""
    if not shape.shift:
        return bias[None]
    regions = _regions(shape, bias.device)
    hidden = regions[:, :, None] != regions[:, None, :]
    mask = torch.zeros(hidden.shape, dtype=bias.dtype, device=bias.device).masked_fill(hidden, float("-inf"))
    tokens = bias.shape[-1]
    mask = mask.view(1, -1, 1, tokens, tokens).expand(batch, -1, shape.heads, -1, -1)
    return bias + mask.reshape(-1, shape.heads, tokens, tokens)


def _flex(shape: _Shape) -> Callable[..., Tensor]:
    """flex_attention with bias and regions looked up in its score function; the rest as in timm."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        regions = _regions(shape, qkv.device)

        def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            value = value + bias[head, query, key]
            if not shape.shift:
                return value
            window = batch % len(regions)
            return torch.where(regions[window, query] == regions[window, key], value, float("-inf"))

        q, k, v = _split_windows(qkv, shape)
        return _join_windows(flex_attention(q, k, v, score_mod=score), shape)

    return run


def _attention_alone(shape: _Shape) -> Implementation:
    """SDPA on windows that lie ready, with the mask made in advance: the part of the job that SDPA itself is."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        windows = (x.contiguous() for x in _split_windows(torch.stack((q, k, v), 3), shape))
        return *windows, _mask(bias, shape, len(q))

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Implementation(run, prepare, lambda out: _join_windows(out, shape), whole_job=False)
