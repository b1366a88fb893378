"""RMT's retention on (B, H, W, C) maps, and what all forms of retention share.

Decays and rotations follow from formulas; they are recomputed for every call, in float32 (in float64 for
float64 maps), and are no buffers: a cast of the model to half precision must not touch them.
"""

from __future__ import annotations

from typing import Optional

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels.retention import decomposed_retention, retention
from vitrail.layers._heads import head_width
from vitrail.layers.depthwise import DepthwiseConv2d


def manhattan_decay(num_heads: int, initial_value: float, heads_range: float, like: Tensor) -> Tensor:
    """Logarithmic decay of every head, `ln(1 - 2^(-initial_value - heads_range * i / num_heads))`, (heads,).

    Source: RMT (arXiv 2309.11523), the released code. On the device of `like`, in at least float32.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    head = torch.arange(num_heads, device=like.device, dtype=dtype)
    return torch.log1p(-torch.exp2(-initial_value - heads_range * head / num_heads))


def rotation_of(positions: Tensor, head_dim: int, like: Tensor) -> Tensor:
    """Cosines and sines that `rotate` takes, (2, H, W, 1, head_dim / 2), in at least float32.

    Pair j turns by `10000^(-j / (head_dim / 2 - 1))` a step, as in RMT (arXiv 2309.11523) and RetNet (2307.08621).

    Args:
        positions: Index of every token, (H, W), integers.
        head_dim: Width of a head, even.
        like: Tensor whose device and precision to take.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponents = torch.linspace(0, 1, head_dim // 2, device=like.device, dtype=dtype)
    angles = positions.to(dtype)[:, :, None, None] * torch.pow(10000.0, -exponents)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns every adjacent pair of channels of (B, H, W, heads, D) by its angle; the result has x's dtype."""
    pairs = x.unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = rotation[0], rotation[1]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2).to(x.dtype)


@register_notrace_module
class RetentionPosition(nn.Module):
    """What the blocks of one stage share: the rotation by the raster index, and the decays.

    The index runs over the whole map, `y * W + x`, also where retention is decomposed: as released, and unlike what
    the paper suggests, the rotation depends on the map's width.

    Args:
        num_heads: Heads of the stage's retention.
        head_dim: Width of a head, even.
        initial_value: Decay of the first head, see `manhattan_decay`.
        heads_range: Spread of the decays over the heads.

    Raises:
        ValueError: `head_dim` is odd, or the decays are not finite.
    """

    def __init__(self, num_heads: int, head_dim: int, initial_value: float = 2.0, heads_range: float = 4.0) -> None:
        super().__init__()
        check_decay("RetentionPosition", initial_value, heads_range)
        if head_dim % 2:
            raise ValueError(f"RetentionPosition: head_dim is {head_dim}; allowed: even widths, which rotate in pairs")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.initial_value = float(initial_value)
        self.heads_range = float(heads_range)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, H, W, C) -> rotation (2, H, W, 1, head_dim / 2), decay (heads,)."""
        height, width = x.shape[1], x.shape[2]
        index = torch.arange(height * width, device=x.device).view(height, width)
        decay = manhattan_decay(self.num_heads, self.initial_value, self.heads_range, x)
        return rotation_of(index, self.head_dim, x), decay

    def extra_repr(self) -> str:
        return f"initial_value={self.initial_value}, heads_range={self.heads_range}"


@register_notrace_module
class Retention(nn.Module):
    """Softmax attention that decays with the Manhattan distance, plus a convolution of the values.

    Source: RMT (arXiv 2309.11523, section 3), as released.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        decomposed: Attend along rows, then along columns; otherwise over all positions at once.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decomposed: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width("Retention", dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.decomposed = decomposed
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.lepe = DepthwiseConv2d(dim, 5, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, rotation: Tensor, decay: Tensor) -> Tensor:
        """Map (B, H, W, C) and what `RetentionPosition` made for it -> (B, H, W, C)."""
        height, width = x.shape[1], x.shape[2]
        q, k, v = self.qkv(x).view(x.shape[0], height, width, 3, self.num_heads, self.head_dim).unbind(3)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if torch.jit.is_scripting():
            y = scripted_retention(
                q, k, v, decay, None, [height, width], [0, 0], "softmax", False, False, self.scale, self.decomposed
            )
        else:
            y = (decomposed_retention if self.decomposed else retention)(q, k, v, decay, scale=self.scale)
        return self.proj(self.lepe(v.flatten(3), y.flatten(3)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, decomposed={self.decomposed}"


def scripted_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    slopes: Optional[Tensor],  # noqa: UP045 -- TorchScript reads the annotations
    window: list[int],
    shift: list[int],
    activation: str,
    signed_slopes: bool,
    length_offset: bool,
    scale: float,
    decomposed: bool,
) -> Tensor:
    """What `retention` and `decomposed_retention` compute, for scripted models, which know operators only."""
    if not decomposed:
        return torch.ops.vitrail.retention(
            q, k, v, decay, slopes, window, shift, activation, signed_slopes, length_offset, scale
        )
    v = torch.ops.vitrail.retention(
        q, k, v, decay, slopes, [1, window[1]], [0, shift[1]], activation, signed_slopes, length_offset, scale
    )
    return torch.ops.vitrail.retention(
        q, k, v, decay, slopes, [window[0], 1], [shift[0], 0], activation, signed_slopes, length_offset, scale
    )


def check_decay(layer: str, initial_value: float, heads_range: float) -> None:
    """Raises `ValueError` unless every head's decay is finite and below zero."""
    if initial_value <= 0 or heads_range < 0:
        raise ValueError(
            f"{layer}: initial_value is {initial_value}, heads_range {heads_range}; allowed: initial_value above 0, "
            "heads_range at least 0"
        )
