"""Voxels: from points to occupied sites, sparse tensors over them, and the features of a voxel's points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.kernels._common.checks import without_autocast
from vitrail.kernels.scattered_linear_attention import Windows, sort_windows
from vitrail.kernels.sparse_conv import (
    NeighbourTable,
    find_runs,
    point_keys,
    site_coords,
    site_keys,
    strided_sites,
    strided_table,
    submanifold_table,
)

Triple = tuple[int, int, int]


class Pillars(NamedTuple):
    """Columns of full height that hold voxels.

    Attributes:
        keys: `(batch * H + y) * W + x` of every pillar, sorted, (P,), int64.
        pillar: Pillar of each voxel, (N,), int64.
        z: Height of each voxel, (N,), int64.
    """

    keys: Tensor
    pillar: Tensor
    z: Tensor


@dataclass(eq=False)
class VoxelSites:
    """Occupied sites of a batch of grids, sorted by (batch, z, y, x), with what layers on the same sites share.

    Neighbour tables, windows, pillars and coarser sites are made when they are first asked for and kept. The last two
    wait for the device, for their number.

    Attributes:
        keys: Sorted distinct keys (`vitrail.kernels.sparse_conv.site_keys`), (N,), int64.
        shape: Grid (D, H, W).
        batch_size: Number of grids; the last may be empty.
    """

    keys: Tensor
    shape: Triple
    batch_size: int
    _tables: dict[Triple, NeighbourTable] = field(default_factory=dict, init=False, repr=False)
    _windows: dict[int, Windows] = field(default_factory=dict, init=False, repr=False)
    _strided: dict[tuple[Triple, ...], tuple[VoxelSites, NeighbourTable]] = field(
        default_factory=dict, init=False, repr=False
    )
    _pillars: Pillars | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def coords(self) -> Tensor:
        """(batch, z, y, x) of every site, (N, 4), int64, contiguous."""
        return site_coords(self.keys, self.shape)

    def neighbours(self, kernel_size: Triple) -> NeighbourTable:
        """Neighbours for a submanifold convolution with an odd `kernel_size` over (z, y, x)."""
        if kernel_size not in self._tables:
            self._tables[kernel_size] = submanifold_table(self.keys, self.shape, kernel_size)
        return self._tables[kernel_size]

    def windows(self, size: int) -> Windows:
        """Columns of `size` x `size` sites over (y, x) and of full height."""
        if size not in self._windows:
            batch, _, y, x = self.coords.unbind(1)
            rows, columns = -(-self.shape[1] // size), -(-self.shape[2] // size)
            self._windows[size] = sort_windows((batch * rows + y // size) * columns + x // size)
        return self._windows[size]

    def strided(self, kernel_size: Triple, stride: Triple, padding: Triple) -> tuple[VoxelSites, NeighbourTable]:
        """Sites that a strided convolution reaches from here, and which of these sites each of them sees."""
        how = (kernel_size, stride, padding)
        if how not in self._strided:
            keys, shape = strided_sites(self.keys, self.shape, *how)
            table = strided_table(self.keys, self.shape, keys, shape, *how)
            self._strided[how] = VoxelSites(keys, shape, self.batch_size), table
        return self._strided[how]

    def pillars(self) -> Pillars:
        """The (y, x) with voxels, and where each voxel stands in them."""
        if self._pillars is None:
            batch, z, y, x = self.coords.unbind(1)
            keys, pillar = torch.unique((batch * self.shape[1] + y) * self.shape[2] + x, return_inverse=True)
            self._pillars = Pillars(keys, pillar, z)
        return self._pillars


@dataclass(eq=False)
class SparseTensor:
    """Features of voxels.

    Attributes:
        features: (N, C), row n belongs to site n.
        sites: Where the voxels are.
    """

    features: Tensor
    sites: VoxelSites

    @classmethod
    def from_coords(cls, features: Tensor, coords: Tensor, shape: Sequence[int], batch_size: int) -> SparseTensor:
        """Sorts voxels that are given in any order.

        Args:
            features: (N, C).
            coords: (batch, z, y, x) of every voxel, (N, 4), integers.
            shape: Grid (D, H, W).
            batch_size: Number of grids.

        Raises:
            ValueError: Shapes do not fit together, a coordinate lies outside, or two voxels have the same one.
        """
        if coords.shape != (len(features), 4):
            raise ValueError(f"coords has shape {tuple(coords.shape)}; expected ({len(features)}, 4)")
        limits = coords.new_tensor((batch_size, *shape))
        if not bool(((coords >= 0) & (coords < limits)).all()):
            raise ValueError(f"coords has sites outside of batch size {batch_size} and grid {tuple(shape)}")
        keys, order = site_keys(coords, shape).sort()
        if bool((keys[1:] == keys[:-1]).any()):
            raise ValueError("coords has the same site more than once; reduce the features of a site first")
        return cls(features[order], VoxelSites(keys, _triple(shape), batch_size))

    @classmethod
    def from_spconv(cls, tensor: Any) -> SparseTensor:
        """Takes over a three-dimensional `spconv.pytorch.SparseConvTensor`; its rows may stand in any order."""
        return cls.from_coords(tensor.features, tensor.indices, tensor.spatial_shape, tensor.batch_size)

    def to_spconv(self) -> Any:
        """The same voxels as a `spconv.pytorch.SparseConvTensor`.

        Raises:
            ImportError: spconv is not installed.
        """
        from spconv.pytorch import SparseConvTensor

        # spconv reads the memory of its coordinates as they lie: int32 and contiguous.
        coords = self.sites.coords.int().contiguous()
        return SparseConvTensor(self.features, coords, list(self.sites.shape), self.sites.batch_size)

    def dense(self) -> Tensor:
        """(B, C, D, H, W), 0 where no voxel is; a view of memory with the channels last."""
        shape, channels = (self.sites.batch_size, *self.sites.shape), self.features.shape[1]
        rows = self.features.new_zeros(math.prod(shape), channels)
        return rows.index_copy(0, self.sites.keys, self.features).view(*shape, channels).permute(0, 4, 1, 2, 3)


class VoxelGrid(NamedTuple):
    """Box of space that is cut into voxels.

    Attributes:
        low: Lower corner (x, y, z); it belongs to the box.
        high: Upper corner (x, y, z); it does not.
        voxel_size: Edges of a voxel along (x, y, z).
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    voxel_size: tuple[float, float, float]

    @property
    def shape(self) -> Triple:
        """Number of voxels along (z, y, x).

        Raises:
            ValueError: The box is empty or no multiple of the voxel.
        """
        counts = [(high - low) / size for low, high, size in zip(*self, strict=True)]
        whole = [round(count) for count in counts]
        if min(whole) < 1 or any(abs(n - count) > 1e-3 for n, count in zip(whole, counts, strict=True)):
            raise ValueError(
                f"the box from {self.low} to {self.high} has {counts} voxels of size {self.voxel_size}; "
                "allowed: whole numbers of at least 1"
            )
        return whole[2], whole[1], whole[0]


class PointVoxels(NamedTuple):
    """Points sorted by voxel.

    Attributes:
        points: Those that lie in the grid, (P, F), (x, y, z) first.
        voxel: Row of each point's voxel, (P,), int64, ascending.
        counts: Points in each voxel, at least 1, (N,), int64.
        sites: The voxels that hold points.
    """

    points: Tensor
    voxel: Tensor
    counts: Tensor
    sites: VoxelSites


def voxelize(points: Sequence[Tensor], grid: VoxelGrid) -> PointVoxels:
    """Finds the voxel of every point; none is dropped for being one of many (dynamic voxelisation).

    Points outside of the grid are left out, and so are those with a NaN or infinite value, which would spread through
    sums and normalisations. Points given twice count twice. Waits for the device once, for the numbers of points and of
    voxels.

    Args:
        points: One (P_i, F) tensor a scan, floating point, with (x, y, z) first; it may be empty.
        grid: The voxels.

    Raises:
        ValueError: `points` is empty, or a scan is not (P_i, F) with F of at least 3 and the same for all.
    """
    if not points or any(p.dim() != 2 or p.shape[1] < 3 or p.shape[1] != points[0].shape[1] for p in points):
        shapes = [tuple(p.shape) for p in points]
        raise ValueError(f"points has shapes {shapes}; expected at least one scan, (P, F) each, F the same and >= 3")
    merged, shape = torch.cat(list(points)), grid.shape
    batch = torch.cat([torch.full((len(p),), i, device=p.device) for i, p in enumerate(points)])
    keys, order = point_keys(merged, batch, grid.low, grid.voxel_size, shape).sort(stable=True)
    voxels = find_runs(keys)
    kept = order[len(order) - len(voxels.run) :]  # what lies in no voxel comes first
    ends = torch.cat((voxels.first[1:], voxels.first.new_full((min(1, len(voxels.first)),), len(keys))))
    return PointVoxels(merged[kept], voxels.run, ends - voxels.first, VoxelSites(voxels.keys, shape, len(points)))


def reduce_points(x: Tensor, counts: Tensor, how: str) -> Tensor:
    """Mean or maximum over the points of every voxel: (P, C) -> (N, C).

    Points come sorted by voxel, so that sums run in one order whatever the schedule.

    Args:
        x: Values of the points.
        counts: Points in each voxel, at least 1, (N,); they add up to P.
        how: "mean" or "max".
    """
    return torch.segment_reduce(x, how, lengths=counts, unsafe=True) if len(counts) else x


def _triple(values: Sequence[int]) -> Triple:
    first, second, third = (int(value) for value in values)
    return first, second, third


class VoxelNorm(nn.BatchNorm1d):
    """Batch norm over the voxels of a batch, (N, C) -> (N, C), for any N; `eps` and `momentum` are ScatterFormer's.

    In training it takes the running statistics where fewer than two voxels leave no deviation to divide by.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-3,
        momentum: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps=eps, momentum=momentum, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().forward(x)
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _PointLayer(nn.Module):
    """Linear layer, norm, ReLU for every point, and the maximum over its voxel."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim, bias=False, **factory)
        self.norm = VoxelNorm(dim, **factory)

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.linear(x)).relu()
        return x, reduce_points(x, counts, "max")


class VoxelEncoder(nn.Module):
    """Features of voxels from all points in them.

    Every point has its values, its offset to the mean of its voxel's points and its offset to the voxel's centre. Two
    layers follow; the first appends the maximum over the voxel to every point, the second's maximum is the result.
    Source: the dynamic voxel encoder of OpenPCDet, as ScatterFormer (arXiv 2401.00912) uses it.

    Args:
        in_chans: Values F of a point, (x, y, z) among them.
        dim: Channels of the voxels, even.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A width is out of range.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_chans < 3 or dim < 2 or dim % 2:
            raise ValueError(f"in_chans is {in_chans}, dim {dim}; allowed: at least 3, and even")
        self.in_chans = in_chans
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList([_PointLayer(in_chans + 6, dim // 2, **factory), _PointLayer(dim, dim, **factory)])

    def forward(self, points: Sequence[Tensor], grid: VoxelGrid) -> SparseTensor:
        """One (P_i, F) tensor a scan -> one feature vector a voxel that holds points.

        Raises:
            ValueError: A scan is not (P_i, in_chans).
        """
        if points and points[0].shape[-1] != self.in_chans:
            raise ValueError(f"points has shape {tuple(points[0].shape)}; expected (P, {self.in_chans})")
        values, voxel, counts, sites = voxelize(points, grid)
        xyz = values[:, :3]
        mean = reduce_points(xyz, counts, "mean")
        axes = zip(sites.coords[:, 1:].flip(1).unbind(1), grid.low, grid.voxel_size, strict=True)
        centre = torch.stack([(axis.to(xyz.dtype) + 0.5) * size + low for axis, low, size in axes], 1)
        x = torch.cat((values, xyz - mean[voxel], xyz - centre[voxel]), 1).to(next(self.parameters()).dtype)
        with without_autocast(x):  # half precision has no digits for centimetres at tens of metres
            x, largest = self.layers[0](x, counts)
        _, features = self.layers[1](torch.cat((x, largest[voxel]), 1), counts)
        return SparseTensor(features, sites)
