"""Multi-head attention of every token of a (B, H, W, C) map over the tokens nearest to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.kernels._common.recording import surely
from vitrail.kernels.neighborhood_attention import neighborhood_attention
from vitrail.layers._heads import head_width
from vitrail.layers.window import padding_key_value


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Projects q, k, v once, attends in neighborhoods, projects back; (B, H, W, C) to (B, H, W, C).

    Neighborhood attention of NAT (arXiv 2204.07143) and, dilated, of DiNAT (arXiv 2209.15001). A map smaller than
    kernel x dilation is computed as the released models do, which pad the layer's input with zeros at the bottom and
    right: a padded position takes part as a key and value that equal the bias of the projection.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        kernel_size: Height and width of a neighborhood in tokens.
        dilation: Distance of its tokens.
        stride: Queries in a row that share a neighborhood, from 1 to the kernel.
        is_causal: Hide the tokens below, and to the right of, the query.
        qkv_bias: Add a bias to q, k and v.
        rel_pos_bias: Learn a bias on the logits for each head and each distance; parameter `rpb`.
        proj_bias: Add a bias to the output projection.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: tuple[bool, bool] = (False, False),
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        proj_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width("NeighborhoodAttention", dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.kernel_size = kernel = to_pair("NeighborhoodAttention", "kernel_size", kernel_size, 1)
        self.dilation = to_pair("NeighborhoodAttention", "dilation", dilation, 1)
        self.stride = to_pair("NeighborhoodAttention", "stride", stride, 1)
        if self.stride[0] > kernel[0] or self.stride[1] > kernel[1]:
            raise ValueError(f"NeighborhoodAttention: stride is {self.stride}; allowed: at most kernel_size {kernel}")
        self.is_causal = is_causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        if rel_pos_bias:
            table = torch.empty(num_heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1, device=device, dtype=dtype)
            self.rpb = nn.Parameter(table)
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), for any H and W."""
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], x.shape[2], 3, self.num_heads, self.head_dim)
        height, width = self.kernel_size[0] * self.dilation[0], self.kernel_size[1] * self.dilation[1]
        is_whole = surely(x.shape[1] >= height) and surely(x.shape[2] >= width)
        pad_k, pad_v = padding_key_value(self.qkv.bias, qkv, not is_whole)
        q, k, v = qkv.unbind(3)
        if torch.jit.is_scripting():
            y = torch.ops.vitrail.neighborhood_attention(
                q,
                k,
                v,
                self.rpb,
                None,
                None,
                pad_k,
                pad_v,
                self.kernel_size,
                self.stride,
                self.dilation,
                self.is_causal,
                self.scale,
            )
        else:
            y = neighborhood_attention(
                q,
                k,
                v,
                kernel_size=self.kernel_size,
                stride=self.stride,
                dilation=self.dilation,
                is_causal=self.is_causal,
                rpb=self.rpb,
                pad_k=pad_k,
                pad_v=pad_v,
                scale=self.scale,
            )
        return self.proj(y.flatten(3))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
