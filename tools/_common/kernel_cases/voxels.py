"""Voxels that lie like those of LiDAR scans: dense near the sensor, near the ground, and few far away."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrail.kernels.sparse_conv import site_keys

GRID = (16, 480, 480)  # (D, H, W): Waymo's at 0.32 m, behind the stem
N_SCANS = 4


def scan_keys(n_voxels: int, generator: torch.Generator) -> Tensor:
    """Sorted distinct keys of `n_voxels` sites of `N_SCANS` scans in `GRID`, int64."""
    keys = torch.empty(0, dtype=torch.int64, device=generator.device)
    while len(keys) < n_voxels:
        keys = torch.cat((keys, _draw(4 * n_voxels, generator))).unique()
    chosen = torch.randperm(len(keys), generator=generator, device=generator.device)[:n_voxels]
    return keys[chosen].sort().values


def _draw(n_points: int, generator: torch.Generator) -> Tensor:
    """Keys of points at uniform angles and uniform distances, so that their density falls with the distance."""
    uniform = torch.rand((4, n_points), generator=generator, device=generator.device)
    scan, angle, distance = uniform[0] * N_SCANS, uniform[1] * 2 * math.pi, uniform[2] * (GRID[1] / 2 - 1)
    height = -torch.log1p(-uniform[3]) * GRID[0] / 6  # exponential, a sixth of the grid on average
    y, x = GRID[1] / 2 + distance * angle.sin(), GRID[2] / 2 + distance * angle.cos()
    return site_keys(torch.stack((scan, height.clamp(max=GRID[0] - 1), y, x), 1).long(), GRID)
