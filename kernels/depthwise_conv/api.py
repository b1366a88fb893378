"""Public function of depth-wise convolution: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_is_on,
    autocast_together,
    check_dims,
    check_floating,
    check_shape,
    to_pair,
)
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.recording import is_padded
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.depthwise_conv.op import fused_support, run_depthwise_conv
from vitrail.kernels.depthwise_conv.reference import depthwise_conv_reference

_NAME = "depthwise_conv"


@shortened
def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    skip: bool = False,
    gelu: bool = False,
    pads: int | Sequence[int] = 0,
    pad_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Convolves every channel with a filter of its own: :math:`y = \phi(w * x + b) + x\,[\mathrm{skip}] + r`.

    The map keeps its size; what the filter meets outside it is zero. With `pads` and `pad_value` the map goes on for
    some rows at the bottom and columns at the right, in which every pixel is `pad_value`, as where a projection with
    a bias followed a padding with zeros; those rows and columns are not part of the result.

    Args:
        x: Map, (B, H, W, C), any strides, any floating dtype. The fused kernels read slices of a packed projection in
            place if the channels of a pixel lie side by side.
        weight: One filter a channel, (C, 1, k, k) with odd k, as `torch.nn.Conv2d` holds it.
        bias: Added to the convolution, (C,).
        residual: r, added to the result, (B, H, W, C), any strides.
        skip: Add `x` to the result; quicker than passing it as `residual`.
        gelu: :math:`\phi` is the exact GELU; otherwise the identity.
        pads: Rows at the bottom and columns at the right that hold `pad_value`.
        pad_value: What they hold, (C,); zeros by default.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, H, W, C) in x's dtype. Under autocast x, weight, bias and residual are cast to the autocast dtype; with
        `skip` x keeps its dtype and the others take it, so that a residual stream loses no precision.

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes or devices do not fit together, or the filter's size is even.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    pads = _check(x, weight, bias, residual, pad_value, pads)
    if pad_value is not None and not is_padded(pads):
        pad_value = None
    if autocast_is_on(x):
        x, weight, bias, residual = _cast(x, weight, bias, residual, keeps_x=skip)
    _check_alike(x, weight, bias, residual, pad_value)
    arguments = (x, weight, bias, pad_value, residual, pads, gelu, skip)
    if choose_backend(_NAME, backend, fused_support(x, weight), x) == "triton":
        return run_depthwise_conv(*arguments)
    return depthwise_conv_reference(*arguments)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    pad: Tensor | None,
    pads: int | Sequence[int],
) -> tuple[int, int]:
    """Checks all arguments but for what autocast may change; returns the normalised padding."""
    _check_tensors(x, weight, bias, residual, pad)
    return to_pair(_NAME, "pads", pads, 0)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, pad: Tensor | None) -> None:
    check_dims(_NAME, "x", x, "(B, H, W, C)")
    check_floating(_NAME, x=x)
    check_filter(_NAME, x.shape[3], weight, bias=bias, pad_value=pad)
    if residual is not None:
        check_floating(_NAME, residual=residual)
        check_shape(_NAME, "residual", residual, x.shape)


def check_filter(op: str, dim: int, weight: Tensor, **vectors: Tensor | None) -> None:
    """Checks a depth-wise filter of `dim` channels, (C, 1, k, k), and what else has one number a channel, (C,)."""
    check_dims(op, "weight", weight, "(C, 1, k, k)")
    height, width = weight.shape[2:]
    if height != width or width % 2 == 0:
        raise ValueError(f"{op}: weight holds filters of {height} x {width}; allowed: odd squares")
    check_floating(op, weight=weight)
    check_shape(op, "weight", weight, (dim, 1, height, width))
    for name, vector in vectors.items():
        if vector is not None:
            check_floating(op, **{name: vector})
            check_shape(op, name, vector, (dim,))


def _check_alike(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, pad_value: Tensor | None
) -> None:
    """Raises `ValueError` unless all tensors have x's dtype and device; the padding's value may have another dtype."""
    others = {"weight": weight, "bias": bias, "residual": residual, "pad_value": pad_value}
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and name != "pad_value":
            raise ValueError(f"{_NAME}: {name} has dtype {tensor.dtype}, x has {x.dtype}; they must agree")
        if tensor.device != x.device:
            raise ValueError(f"{_NAME}: {name} is on {tensor.device}, x is on {x.device}; they must agree")


def _cast(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, keeps_x: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One dtype for all: autocast's, or x's."""
    dtype = x.dtype if keeps_x else autocast_together(x)[0].dtype
    bias, residual = (None if t is None else t.to(dtype) for t in (bias, residual))
    return x.to(dtype), weight.to(dtype), bias, residual
