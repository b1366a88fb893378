"""Public functions of sparse convolution: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.kernels._common.checks import autocast_together, check_dims, check_floating, check_shape
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.sparse_conv.op import (
    fused_support,
    run_depthwise_sparse_conv,
    run_mixed_depthwise_conv,
    run_sparse_conv,
)
from vitrail.kernels.sparse_conv.reference import depthwise_reference, mix_reference, sparse_conv_reference
from vitrail.kernels.sparse_conv.sites import NeighbourTable


@shortened
def sparse_conv(features: Tensor, weight: Tensor, table: NeighbourTable, *, backend: str = "auto") -> Tensor:
    r"""Convolves voxels: :math:`y_n = \sum_k W_k\, x_{T(k, n)}`, where an absent neighbour contributes nothing.

    The table says which input stands under each tap of the kernel, so that one function serves submanifold and
    strided convolutions (`submanifold_table`, `strided_table`). A cross-correlation, summed in at least float32; the
    gradients gather as well, so that they do not depend on a schedule.

    Args:
        features: Voxel features, (N, C_in), any floating dtype.
        weight: Kernel, (C_out, taps, C_in) or (C_out, kz, ky, kx, C_in), the layout of spconv.
        table: Neighbours, for `taps` taps, M outputs and N inputs.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (M, C_out), contiguous, in the dtype of `features` (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point, or the table is not int32.
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    name = "sparse_conv"
    weight = weight.flatten(1, -2)
    _check_dense(name, features, weight, *table)
    features, weight = _cast(name, features, weight)
    if choose_backend(name, backend, fused_support(features), features) == "triton":
        return run_sparse_conv(features, weight, *table)
    return sparse_conv_reference(features, weight, *table)


@shortened
def depthwise_sparse_conv(features: Tensor, weight: Tensor, table: NeighbourTable, *, backend: str = "auto") -> Tensor:
    r"""Convolves every channel of voxels by itself: :math:`y_{n,c} = \sum_k w_{k,c}\, x_{T(k, n), c}`.

    Args:
        features: Voxel features, (N, C), any floating dtype, any stride over the voxels.
        weight: Kernel, (taps, C) or (kz, ky, kx, C).
        table: Neighbours, for `taps` taps, M outputs and N inputs.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (M, C), contiguous, in the dtype of `features` (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point, or the table is not int32.
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    name = "depthwise_sparse_conv"
    weight = weight.flatten(0, -2)
    _check_depthwise(name, features, weight, *table)
    features, weight = _cast(name, features, weight)
    if choose_backend(name, backend, fused_support(features), features) == "triton":
        return run_depthwise_sparse_conv(features, weight, *table)
    return depthwise_reference(features, weight, *table)


@shortened
def mixed_depthwise_conv(
    features: Tensor, weights: Sequence[Tensor], tables: Sequence[NeighbourTable], *, backend: str = "auto"
) -> Tensor:
    r"""Adds to three quarters of the channels what three depth-wise kernels gather, and doubles the last quarter.

    :math:`y = x + (w_a * x_a,\; w_b * x_b,\; w_c * x_c,\; x_d)` with :math:`*` as in `depthwise_sparse_conv`: how
    ScatterFormer mixes across windows (arXiv 2401.00912, section 3.3, as released), in a single pass.

    Args:
        features: Voxel features, (N, C), any floating dtype, any stride over the voxels, C a multiple of 4.
        weights: Three kernels, (taps, C / 4) or (kz, ky, kx, C / 4) each.
        tables: Their neighbours, for N outputs and N inputs.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (N, C), contiguous, in the dtype of `features` (the autocast dtype under autocast).

    Raises:
        TypeError: An input is not floating point, or a table is not int32.
        ValueError: Shapes, dtypes or devices do not fit together, or there are not three weights and tables.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    name = "mixed_depthwise_conv"
    if len(weights) != 3 or len(tables) != 3:
        raise ValueError(f"{name}: {len(weights)} weights and {len(tables)} tables are given; expected 3 of each")
    check_dims(name, "features", features, "(N, C)")
    if features.shape[1] % 4:
        raise ValueError(f"{name}: features has {features.shape[1]} channels; allowed: a multiple of 4")
    checked, mixed = [], features
    for weight, table in zip(weights, tables, strict=True):
        weight = weight.flatten(0, -2)
        check_shape(name, "weight", weight, (len(weight), features.shape[1] // 4))
        check_shape(name, "table.forward", table.forward, (len(weight), len(features)))
        _check(name, features, weight, *table, len(weight))
        mixed, weight = _cast(name, features, weight)
        checked.append(weight)
    if choose_backend(name, backend, fused_support(mixed), mixed) == "triton":
        return run_mixed_depthwise_conv(mixed, *checked, *(rows for table in tables for rows in table))
    return mix_reference(mixed, checked, [table.forward for table in tables])


def _check_dense(op: str, features: Tensor, weight: Tensor, forward: Tensor, backward: Tensor) -> None:
    check_dims(op, "weight", weight, "(C_out, taps, C_in)")
    check_shape(op, "features", features, (len(features), weight.shape[2]))
    _check(op, features, weight, forward, backward, weight.shape[1])


def _check_depthwise(op: str, features: Tensor, weight: Tensor, forward: Tensor, backward: Tensor) -> None:
    check_dims(op, "weight", weight, "(taps, C)")
    check_shape(op, "features", features, (len(features), weight.shape[1]))
    _check(op, features, weight, forward, backward, weight.shape[0])


def _check(op: str, features: Tensor, weight: Tensor, forward: Tensor, backward: Tensor, taps: int) -> None:
    """Raises where a kernel, its table and the features do not fit together."""
    check_floating(op, features=features, weight=weight)
    check_shape(op, "table.forward", forward, (taps, forward.shape[-1]))
    check_shape(op, "table.backward", backward, (taps, len(features)))
    for name, rows in (("forward", forward), ("backward", backward)):
        if rows.dtype != torch.int32:
            raise TypeError(f"{op}: table.{name} is {rows.dtype}; allowed: torch.int32")
    for name, tensor in (("weight", weight), ("table.forward", forward), ("table.backward", backward)):
        if tensor.device != features.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, features on {features.device}; they must agree")


def _cast(op: str, features: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Features and weight in the dtype to compute in."""
    features, weight = autocast_together(features, weight)
    if weight.dtype != features.dtype:
        raise ValueError(f"{op}: weight has dtype {weight.dtype}, features has {features.dtype}; they must agree")
    return features, weight
