"""Sparse convolutions as modules; weights are stored as spconv stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrail.kernels.sparse_conv import NeighbourTable, depthwise_sparse_conv, sparse_conv
from vitrail.layers.voxels import SparseTensor, Triple, VoxelSites


class SubmanifoldConv3d(nn.Module):
    """Convolution whose outputs stand at its inputs' sites: (N, C_in) -> (N, C_out).

    Args:
        in_dim: Input channels.
        dim: Output channels.
        kernel_size: Odd number of taps along each axis.
        bias: Add a learned bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 3,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size: Triple = (kernel_size, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(dim, *self.kernel_size, in_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        _reset(self.weight, self.bias)

    def forward(self, features: Tensor, sites: VoxelSites) -> Tensor:
        out = sparse_conv(features, self.weight, sites.neighbours(self.kernel_size))
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]}, {self.weight.shape[0]}, kernel_size={self.kernel_size}"


class StridedConv3d(nn.Module):
    """Convolution with outputs wherever an input stands under the kernel, on coarser sites, without a bias.

    Args:
        in_dim: Input channels.
        dim: Output channels.
        kernel_size: Taps along (z, y, x).
        stride: Steps along (z, y, x).
        padding: Empty sites around the grid along (z, y, x).
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: Triple = (3, 3, 3),
        stride: Triple = (2, 2, 2),
        padding: Triple = (1, 1, 1),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.weight = nn.Parameter(torch.empty(dim, *kernel_size, in_dim, device=device, dtype=dtype))
        _reset(self.weight, None)

    def forward(self, x: SparseTensor) -> SparseTensor:
        sites, table = x.sites.strided(self.kernel_size, self.stride, self.padding)
        return SparseTensor(sparse_conv(x.features, self.weight, table), sites)

    def out_shape(self, shape: Sequence[int]) -> Triple:
        """Grid (D, H, W) of the output, given that of the input."""
        extents = zip(shape, self.kernel_size, self.stride, self.padding, strict=True)
        depth, height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in extents)
        return depth, height, width

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class DepthwiseSubmanifoldConv3d(nn.Module):
    """One filter a channel, outputs at the inputs' sites, no bias: (N, C) -> (N, C).

    Weights start normal with deviation 1 whatever the number of taps, as in ScatterFormer's code; a norm follows there.

    Args:
        dim: Channels.
        kernel_size: Odd numbers of taps along (z, y, x).
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: Triple,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(*kernel_size, dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight)

    def forward(self, features: Tensor, sites: VoxelSites) -> Tensor:
        return depthwise_sparse_conv(features, self.weight, self.neighbours(sites))

    def neighbours(self, sites: VoxelSites) -> NeighbourTable:
        """Which sites its taps meet."""
        return sites.neighbours(self.kernel_size)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]}, kernel_size={self.kernel_size}"


def _reset(weight: Tensor, bias: Tensor | None) -> None:
    """PyTorch's and spconv's initialisation of convolutions: uniform within `1 / sqrt(fan-in)`."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)
