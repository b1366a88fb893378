"""Bi-level routing attention and full attention, both with a convolutional position term, on (B, H, W, C) maps."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.kernels.routing_attention import region_routes
from vitrail.kernels.routing_attention_lepe import routing_attention_lepe
from vitrail.layers._heads import head_width
from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.window import may_be_padded


@register_notrace_module
class RoutingAttention(nn.Module):
    """Attention over the top-k routed regions (BiFormer, arXiv 2303.08810, section 3.2).

    Computes what the released models compute by padding their input with zeros to whole regions: padded positions
    take part with queries, keys and values that equal the bias of the projection. The logits are scaled by
    `dim ** -0.5`, the full width, as released.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        n_win: Rows and columns of the region grid.
        topk: Routed regions of each region, at most `n_win ** 2`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or `topk` is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_regions = to_pair("RoutingAttention", "n_win", n_win, 1)
        if not 1 <= topk <= n_win * n_win:
            raise ValueError(f"RoutingAttention: topk is {topk}; allowed: 1 to n_win ** 2 = {n_win * n_win}")
        self.num_heads = num_heads
        self.head_dim = head_width("RoutingAttention", dim, num_heads)
        self.topk = topk
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.lepe = DepthwiseConv2d(dim, 5, device=device, dtype=dtype)  # is not called: the operator convolves
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), for any H and W."""
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], x.shape[2], 3, self.num_heads, self.head_dim)
        q, k, _ = qkv.unbind(3)
        pads: Optional[Tensor] = None  # noqa: UP045 -- TorchScript reads the annotation
        if may_be_padded(x, self.n_regions):
            pads = self.qkv.bias.view(3, self.num_heads, self.head_dim)
        pad_q, pad_k = (None, None) if pads is None else (pads[0], pads[1])
        grid, weight, bias = self.n_regions, self.lepe.weight, self.lepe.bias
        if torch.jit.is_scripting():
            routes = torch.ops.vitrail.region_routes(q, k, pad_q, pad_k, grid, self.topk)
            weight, bias = weight.to(qkv.dtype), bias if bias is None else bias.to(qkv.dtype)
            y = torch.ops.vitrail.routing_attention_lepe(qkv, pads, weight, bias, routes, grid, self.scale)
        else:
            routes = region_routes(q, k, n_regions=grid, topk=self.topk, pad_q=pad_q, pad_k=pad_k)
            y = routing_attention_lepe(qkv, routes, weight, bias, n_regions=grid, pads=pads, scale=self.scale)
        return self.proj(y)


@register_notrace_module
class FullAttention(nn.Module):
    """Softmax attention over all positions plus a depth-wise 5x5 convolution of its input.

    The last stage of BiFormer: no bias on q, k, v; the convolution sees the attention's input, as released.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width("FullAttention", dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.lepe = DepthwiseConv2d(dim, 5, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height, width, dim)
        return self.proj(self.lepe(x, y))
