"""Sparse convolutions as modules: layouts of weights, shared tables, initialisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.sparse import DepthwiseSubmanifoldConv3d, StridedConv3d, SubmanifoldConv3d
from vitrail.layers.voxels import SparseTensor

SHAPE = (5, 6, 7)


def draw_voxels(channels: int, share: float = 0.3) -> SparseTensor:
    coords = (torch.rand(2, *SHAPE) < share).nonzero()
    return SparseTensor.from_coords(torch.randn(len(coords), channels, dtype=torch.float64), coords, SHAPE, 2)


def test_submanifold_convolution_is_the_dense_one_where_voxels_are() -> None:
    x = draw_voxels(3)
    conv = SubmanifoldConv3d(3, 4, bias=True, dtype=torch.float64)
    out = SparseTensor(conv(x.features, x.sites), x.sites)
    want = F.conv3d(x.dense(), conv.weight.permute(0, 4, 1, 2, 3), conv.bias, padding=1)
    occupied = SparseTensor(torch.ones(len(x.sites), 1), x.sites).dense()
    torch.testing.assert_close(out.dense(), want * occupied)
    assert list(x.sites._tables) == [(3, 3, 3)]


def test_strided_convolution_is_the_dense_one() -> None:
    x = draw_voxels(3)
    for kernel, stride, padding in (((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0))):
        conv = StridedConv3d(3, 4, kernel, stride, padding, dtype=torch.float64)
        out = conv(x)
        assert out.sites.shape == conv.out_shape(SHAPE)
        want = F.conv3d(x.dense(), conv.weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)
        torch.testing.assert_close(out.dense(), want)


def test_depthwise_convolution_runs_along_the_axis_of_its_kernel() -> None:
    x = draw_voxels(3)
    conv = DepthwiseSubmanifoldConv3d(3, (1, 1, 5), dtype=torch.float64)
    out = SparseTensor(conv(x.features, x.sites), x.sites)
    want = F.conv3d(x.dense(), conv.weight.permute(3, 0, 1, 2)[:, None], padding=(0, 0, 2), groups=3)
    occupied = SparseTensor(torch.ones(len(x.sites), 1), x.sites).dense()
    torch.testing.assert_close(out.dense(), want * occupied)


def test_initialisation() -> None:
    conv = SubmanifoldConv3d(64, 128, bias=True)
    bound = (27 * 64) ** -0.5
    assert 0.99 * bound < conv.weight.abs().max() <= bound
    assert 0.9 * bound < conv.bias.abs().max() <= bound
    assert DepthwiseSubmanifoldConv3d(64, (1, 13, 1)).weight.std().item() == pytest.approx(1, abs=0.1)


def test_no_voxels() -> None:
    x = draw_voxels(3, share=0.0)
    conv = SubmanifoldConv3d(3, 4, bias=True, dtype=torch.float64)
    assert conv(x.features, x.sites).shape == (0, 4)
    out = StridedConv3d(3, 4, dtype=torch.float64)(x)
    assert out.features.shape == (0, 4)
    assert out.dense().shape == (2, 4, 3, 3, 4)
