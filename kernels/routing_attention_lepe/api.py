"""Public function of routing attention with its position term: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_is_on,
    autocast_together,
    check_floating,
    check_packed,
    check_shape,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.depthwise_conv.api import check_filter
from vitrail.kernels.routing_attention.api import check_routing
from vitrail.kernels.routing_attention_lepe.op import fused_support, run_routing_attention_lepe
from vitrail.kernels.routing_attention_lepe.reference import routing_attention_lepe_reference

_NAME = "routing_attention_lepe"


@shortened
def routing_attention_lepe(
    qkv: Tensor,
    routes: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    n_regions: int | Sequence[int],
    pads: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`routing_attention` of the parts of one projection, plus the depth-wise convolution of its values.

    What BiFormer projects (arXiv 2303.08810, section 3.2), whose released code calls the convolution LePE. Same result
    as `depthwise_conv(v, weight, bias, residual=routing_attention(q, k, v, routes, ...), pads=..., pad_value=...)`; the
    backward writes the gradient of `qkv` directly instead of adding up and stacking four.

    Args:
        qkv: Queries, keys and values, (B, H, W, 3, heads, D), any strides, any floating dtype.
        routes: Distinct regions that each region attends to, (B, R, topk), int64, in 0 ... R - 1; see `region_routes`.
        weight: One filter a channel, (heads * D, 1, k, k) with odd k.
        bias: Added to the convolution, (heads * D,).
        n_regions: Rows and columns of the region grid; the map is padded at the bottom and right to whole regions.
        pads: What every padded position holds, (3, heads, D), as a projection's bias where zeros are projected; zeros
            by default. Padded positions are keys, and the convolution meets them; nothing sees their queries.
        scale: Factor on `q k^T`; `D ** -0.5` by default.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, H, W, heads * D), contiguous, in the dtype of `qkv` (the autocast dtype under autocast, to which weight and
        bias are cast as well).

    Raises:
        TypeError: An input is not floating point, or `routes` is not int64.
        ValueError: Shapes, dtypes or devices do not fit together, or the filter's size is even.
        NotImplementedError: `backend="triton"` and the kernels cannot compute this call.
    """
    regions = _check(qkv, routes, weight, bias, pads, n_regions)
    if autocast_is_on(qkv):
        qkv, weight, bias = _cast(qkv, weight, bias)
    _check_alike(qkv, weight, bias, pads, routes)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (qkv, pads, weight, bias, routes, regions, scale)
    if choose_backend(_NAME, backend, fused_support(qkv, weight), qkv, packed_at=3) == "triton":
        return run_routing_attention_lepe(*arguments)
    return routing_attention_lepe_reference(*arguments).contiguous()


def _check(
    qkv: Tensor,
    routes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pads: Tensor | None,
    n_regions: int | Sequence[int],
) -> tuple[int, int]:
    """Checks all arguments but for what autocast may change; returns the normalised number of regions."""
    check_packed(_NAME, "(B, H, W, 3, heads, D)", qkv)
    check_filter(_NAME, qkv.shape[4] * qkv.shape[5], weight, bias=bias)
    if pads is not None:
        check_floating(_NAME, pads=pads)
        check_shape(_NAME, "pads", pads, qkv.shape[3:])
    return check_routing(_NAME, qkv.shape[0], routes, n_regions)


def _check_alike(qkv: Tensor, weight: Tensor, bias: Tensor | None, pads: Tensor | None, routes: Tensor) -> None:
    """Raises `ValueError` unless the convolution has the dtype of `qkv`, and all tensors are on its device."""
    others = {"weight": weight, "bias": bias, "pads": pads, "routes": routes}
    for name, tensor in others.items():
        if tensor is None:
            continue
        if name in ("weight", "bias") and tensor.dtype != qkv.dtype:
            raise ValueError(f"{_NAME}: {name} has dtype {tensor.dtype}, qkv has {qkv.dtype}; they must agree")
        if tensor.device != qkv.device:
            raise ValueError(f"{_NAME}: {name} is on {tensor.device}, qkv is on {qkv.device}; they must agree")


def _cast(qkv: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One dtype for all: autocast's, or that of `qkv` where autocast leaves it alone."""
    (qkv,) = autocast_together(qkv)
    return qkv, weight.to(qkv.dtype), bias if bias is None else bias.to(qkv.dtype)
