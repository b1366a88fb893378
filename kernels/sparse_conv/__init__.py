"""Convolution of voxels: only occupied sites are stored, and tables tell which of them are neighbours."""

from vitrail.kernels.sparse_conv.api import depthwise_sparse_conv, mixed_depthwise_conv, sparse_conv
from vitrail.kernels.sparse_conv.sites import (
    KeyRuns,
    NeighbourTable,
    find_runs,
    point_keys,
    site_coords,
    site_keys,
    strided_sites,
    strided_table,
    submanifold_table,
)

__all__ = [
    "KeyRuns",
    "NeighbourTable",
    "depthwise_sparse_conv",
    "find_runs",
    "mixed_depthwise_conv",
    "point_keys",
    "site_coords",
    "site_keys",
    "sparse_conv",
    "strided_sites",
    "strided_table",
    "submanifold_table",
]
