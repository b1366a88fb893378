"""Scattered linear attention between voxels of a window, what lets windows interact, and pooling along the height."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels.scattered_linear_attention import scattered_linear_attention_packed
from vitrail.kernels.sparse_conv import mixed_depthwise_conv
from vitrail.layers._heads import head_width
from vitrail.layers.norm import LayerNorm
from vitrail.layers.sparse import DepthwiseSubmanifoldConv3d
from vitrail.layers.voxels import SparseTensor, VoxelNorm, VoxelSites


class ScatteredLinearAttention(nn.Module):
    """Projects q, k, v once, attends without a softmax inside windows of voxels, projects back: (N, C) -> (N, C).

    A window is a column of the grid of full height. Source: ScatterFormer (arXiv 2401.00912), section 3.2, as released.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        window_size: Edge of a window in voxels, along y and x.
        eps: Added to the denominator, above 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or the window is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if window_size < 1:
            raise ValueError(f"ScatteredLinearAttention: window_size is {window_size}; allowed: at least 1")
        self.head_dim = head_width("ScatteredLinearAttention", dim, num_heads)
        self.num_heads, self.window_size, self.eps = num_heads, window_size, eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, features: Tensor, sites: VoxelSites) -> Tensor:
        qkv = self.qkv(features).view(len(features), 3, self.num_heads, self.head_dim)
        y = scattered_linear_attention_packed(qkv, sites.windows(self.window_size), eps=self.eps)
        return self.proj(y.flatten(1))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


class CrossWindowFeedForward(nn.Module):
    """Depth-wise convolutions that reach beyond the windows, then an MLP: (N, C) -> (N, C).

    The channels are cut into four: a 3x3x3 kernel, a long one along x, a long one along y, and none. The norm in front
    replaces the residual stream, and what no kernel sees is added to itself, as in the released code.
    Source: ScatterFormer (arXiv 2401.00912), section 3.3.

    Args:
        dim: Channels C, a multiple of 4.
        kernel_size: Odd length of the long kernels in voxels.
        hidden_ratio: Width of the MLP in multiples of C.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` or `kernel_size` is not allowed.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        hidden_ratio: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % 4 or kernel_size % 2 == 0:
            raise ValueError(f"dim is {dim}, kernel_size {kernel_size}; allowed: a multiple of 4, and odd")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = VoxelNorm(dim, **factory)
        self.conv = DepthwiseSubmanifoldConv3d(dim // 4, (3, 3, 3), **factory)
        self.conv_x = DepthwiseSubmanifoldConv3d(dim // 4, (1, 1, kernel_size), **factory)
        self.conv_y = DepthwiseSubmanifoldConv3d(dim // 4, (1, kernel_size, 1), **factory)
        self.norm2 = VoxelNorm(dim, **factory)
        self.fc1 = nn.Linear(dim, hidden_ratio * dim, **factory)
        self.fc2 = nn.Linear(hidden_ratio * dim, dim, **factory)

    def forward(self, features: Tensor, sites: VoxelSites) -> Tensor:
        x = self.norm1(features)
        convs = (self.conv, self.conv_x, self.conv_y)
        x = mixed_depthwise_conv(x, [conv.weight for conv in convs], [conv.neighbours(sites) for conv in convs])
        return x + self.fc2(self.fc1(self.norm2(x)).relu())


class PillarPooling(nn.Module):
    """One vector for every (y, x) that has voxels, by attention over its height: voxels -> (B, C, H, W).

    The query is the maximum over the voxels of a pillar; keys carry a learned embedding of the height, values do not.
    The map is 0 where no voxel is. Source: ScatterFormer (arXiv 2401.00912), as released.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        depth: Voxels D along z.
        num_heads: Attention heads.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim = head_width("PillarPooling", dim, num_heads)
        self.num_heads, self.depth = num_heads, depth
        self.in_proj = nn.Linear(dim, 3 * dim, **factory)
        self.out_proj = nn.Linear(dim, dim, **factory)
        self.z_embed = nn.Embedding(depth, dim, **factory)
        self.norm = LayerNorm(dim, eps=1e-5, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the projections as PyTorch's multi-head attention does, the embedding with deviation 0.01."""
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)
        nn.init.normal_(self.z_embed.weight, std=0.01)

    def forward(self, x: SparseTensor) -> Tensor:
        """Features and sites -> the map.

        Raises:
            ValueError: The grid's depth is not that of the embedding.
        """
        depth, height, width = x.sites.shape
        if depth != self.depth:
            raise ValueError(f"PillarPooling: the grid has depth {depth}; expected {self.depth}")
        keys, pillar, z = x.sites.pillars()
        pooled = self._pool(x.features, z, pillar * depth + z, len(keys))
        bev = pooled.new_zeros(x.sites.batch_size * height * width, pooled.shape[1]).index_copy(0, keys, pooled)
        return bev.view(x.sites.batch_size, height, width, -1).permute(0, 3, 1, 2)

    def _pool(self, features: Tensor, z: Tensor, slot: Tensor, n_pillars: int) -> Tensor:
        """(N, C) -> (pillars, C); `slot` is where a voxel stands among `depth` places for every pillar."""
        if n_pillars == 0:
            return self.norm(features)
        query = self._column(features, slot, n_pillars, float("-inf")).amax(1)
        w_q, w_k, w_v = self.in_proj.weight.chunk(3)
        b_q, b_k, b_v = self.in_proj.bias.chunk(3)
        # Projected before they are put into columns, of which most places are empty.
        keys = self._heads(self._column(F.linear(features + self.z_embed(z), w_k, b_k), slot, n_pillars, 0.0))
        values = self._heads(self._column(F.linear(features, w_v, b_v), slot, n_pillars, 0.0))
        queries = self._heads(F.linear(query, w_q, b_q)[:, None]) * self.head_dim**-0.5
        logits = (queries * keys).sum(-1)  # (pillars, depth, heads)
        present = self._column(torch.ones_like(features[:, :1]), slot, n_pillars, 0.0) > 0
        weights = logits.masked_fill(~present, float("-inf")).softmax(1)
        attended = (weights[..., None] * values).sum(1).flatten(1)
        return self.norm(self.out_proj(attended.to(features.dtype)) + query)

    def _column(self, x: Tensor, slot: Tensor, n_pillars: int, empty: float) -> Tensor:
        """(N, C) -> (pillars, depth, C), `empty` where no voxel is."""
        column = x.new_full((n_pillars * self.depth, x.shape[1]), empty)
        return column.index_copy(0, slot, x).unflatten(0, (n_pillars, self.depth))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))
