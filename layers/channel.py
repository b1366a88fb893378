"""Attention between the channels of a (B, H, W, C) map."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels.channel_attention import channel_attention_packed
from vitrail.layers._heads import head_width


@register_notrace_module
class ChannelAttention(nn.Module):
    """Projects q, k, v once, mixes the channels of each group, projects back (DaViT, arXiv 2204.03645, section 3.2).

    Global over the map and linear in its size; (B, H, W, C) to (B, H, W, C).

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Groups of channels that attend to each other.
        qkv_bias: Add a bias to q, k and v.
        proj_bias: Add a bias to the output projection.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width("ChannelAttention", dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), for any H and W."""
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], x.shape[2], 3, self.num_heads, self.head_dim)
        if torch.jit.is_scripting():
            y = torch.ops.vitrail.channel_attention_packed(qkv, self.scale)
        else:
            y = channel_attention_packed(qkv, scale=self.scale)
        return self.proj(y.flatten(3))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
