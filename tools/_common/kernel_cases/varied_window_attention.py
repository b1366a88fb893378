"""VSA's windows of predicted place and size, from (B, H, W, heads, D) maps and predictions to such a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.varied_window_attention import varied_window_attention
from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase, compiled, normal, parameter


class _Shape(NamedTuple):
    batch: int
    size: int
    heads: int
    dim: int
    window: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.size}x{self.size}x{self.heads * self.dim} h{self.heads} w{self.window}"


# The stages of VSA-Swin-T at 224 pixels whose maps hold more than one window.
_SHAPES = {
    "gpu": (_Shape(64, 56, 3, 32, 7), _Shape(64, 28, 6, 32, 7), _Shape(64, 14, 12, 32, 7)),
    "cpu": (_Shape(2, 6, 2, 16, 3),),
    "host": (_Shape(8, 7, 24, 32, 7),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in _SHAPES[suite]]


def _case(shape: _Shape) -> KernelCase:
    image = normal(shape.batch, shape.size, shape.size, shape.heads, shape.dim)
    side, tokens = shape.size // shape.window, shape.window**2
    predicted = (shape.batch, side, side, shape.heads, 2)
    offsets, stretch = normal(*predicted, std=2.0, exact=True), normal(*predicted, mean=1.0, std=0.2, exact=True)
    eager, sampled = _ours(shape, "eager"), _grid_sampled(shape)
    return KernelCase(
        "varied_window_attention",
        str(shape),
        (image, image, image, offsets, stretch, parameter(shape.heads, tokens, tokens)),
        eager,
        {
            "vitrail": Implementation(_ours(shape, "auto")),
            "eager": Implementation(eager),
            "grid_sample": Implementation(sampled),
            "eager compiled": compiled(eager),
            "grid_sample compiled": compiled(sampled),
        },
    )


def _ours(shape: _Shape, backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, stretch: Tensor, bias: Tensor) -> Tensor:
        return varied_window_attention(
            q, k, v, offsets, stretch, window_size=shape.window, bias=bias, backend=backend
        )  # fmt: skip

    return run


def _grid_sampled(shape: _Shape) -> Callable[..., Tensor]:
    """As VSA's authors do it: every head's map through grid_sample, in float32 as under autocast, then attention."""
    side, window = shape.size // shape.window, shape.window

    def windows(x: Tensor) -> Tensor:
        """(B, heads, H, W, D) -> (B * windows, heads, T, D)."""
        x = x.unflatten(3, (side, window)).unflatten(2, (side, window))  # (B, heads, rows, w, columns, w, D)
        return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, shape.heads, window**2, shape.dim)

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, stretch: Tensor, bias: Tensor) -> Tensor:
        inside = torch.arange(window, device=q.device) - (window - 1) / 2
        centres = (torch.arange(side, device=q.device) + 0.5) * window - 0.5
        offsets, stretch = (x.permute(4, 0, 3, 1, 2)[..., None] for x in (offsets, stretch))  # (2, B, heads, r, c, 1)
        y = centres[:, None, None] + offsets[0] + stretch[0] * inside  # (B, heads, rows, columns, w)
        x = centres[:, None] + offsets[1] + stretch[1] * inside
        y = y.transpose(3, 4)[..., None].expand(-1, -1, -1, -1, -1, window)  # (B, heads, rows, w, columns, w)
        x = x[:, :, :, None].expand(-1, -1, -1, window, -1, -1)
        grid = torch.stack((x, y), -1).reshape(-1, shape.size, shape.size, 2) * (2 / (shape.size - 1)) - 1
        keys_values = torch.cat((k, v), -1).permute(0, 3, 4, 1, 2).flatten(0, 1).float()  # (B * heads, 2 D, H, W)
        sampled = F.grid_sample(keys_values, grid, align_corners=True).to(q.dtype)
        sampled = sampled.unflatten(0, (-1, shape.heads)).permute(0, 1, 3, 4, 2)
        keys, values = (windows(half) for half in sampled.chunk(2, -1))
        queries = windows(q.permute(0, 3, 1, 2, 4))
        out = (queries * shape.dim**-0.5 @ keys.transpose(-2, -1) + bias).softmax(-1) @ values
        out = out.reshape(-1, side, side, shape.heads, window, window, shape.dim).permute(0, 1, 4, 2, 5, 3, 6)
        return out.reshape(q.shape)

    return run
