"""Public function of layer normalisation: meaning, argument checks, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.kernels._common.checks import autocast_is_on, check_floating, check_shape
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.layer_norm.op import fused_support, run_layer_norm
from vitrail.kernels.layer_norm.reference import layer_norm_reference

_NAME = "layer_norm"


@shortened
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    r"""Normalises the last axis: :math:`y = w\,(x - \mu) / \sqrt{\sigma^2 + \varepsilon} + b` (arXiv 1607.06450).

    :math:`\mu` and :math:`\sigma^2` are the mean and the variance (not the unbiased one) of the C values of a row.
    Meant for training: what the backward needs is recomputed from `x`, and nothing but the inputs is saved.

    Args:
        x: Rows of any number and shape, (..., C), any floating dtype. The fused kernels read rows that lie at one
            distance of each other in place if the values of each lie side by side; other layouts are copied.
        weight: w, (C,), in x's dtype; half-precision rows may come with float32 parameters. Ones by default.
        bias: b, (C,), in the dtype of `weight` and only together with it. Zeros by default.
        eps: :math:`\varepsilon`, 0 or more.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (..., C) in x's dtype. Under autocast on CUDA devices all inputs but float64 ones are cast to float32, as
        PyTorch does for its own layer normalisation.

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes or devices do not fit together, `bias` comes without `weight`, or `eps` is negative.
        NotImplementedError: `backend="triton"` and the kernels cannot compute this call.
    """
    casts = x.is_cuda and autocast_is_on(x)
    _check(x, weight, bias, eps, casts)
    if casts:
        x = _float32(x)
        weight, bias = (None if t is None else _float32(t) for t in (weight, bias))
    if choose_backend(_NAME, backend, fused_support(x), x) == "triton":
        return run_layer_norm(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def _float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, casts: bool) -> None:
    """Raises what `layer_norm` says; `casts`: autocast is about to make float32 of all but float64."""
    if x.dim() == 0:
        raise ValueError(f"{_NAME}: x has shape (); expected at least one dimension, (..., C)")
    if eps < 0:
        raise ValueError(f"{_NAME}: eps is {eps}; allowed: 0 or more")
    check_floating(_NAME, x=x)
    if bias is not None and weight is None:
        raise ValueError(f"{_NAME}: bias is given without weight; allowed: both, weight alone, or neither")
    dtype = _dtype(x, casts)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_parameter(name, parameter, _dtype(parameter, casts), x, dtype)
    if weight is not None and bias is not None and _dtype(weight, casts) != _dtype(bias, casts):
        raise ValueError(f"{_NAME}: bias has dtype {bias.dtype}, weight has {weight.dtype}; they must agree")


def _dtype(tensor: Tensor, casts: bool) -> torch.dtype:
    """In which a tensor enters the operator."""
    return torch.float32 if casts and tensor.dtype != torch.float64 else tensor.dtype


def _check_parameter(name: str, parameter: Tensor, dtype: torch.dtype, x: Tensor, x_dtype: torch.dtype) -> None:
    check_floating(_NAME, **{name: parameter})
    check_shape(_NAME, name, parameter, x.shape[-1:])
    if dtype not in (x_dtype, torch.promote_types(x_dtype, torch.float32)):
        raise ValueError(f"{_NAME}: {name} has dtype {dtype}, x has {x_dtype}; allowed: the same or float32")
    if parameter.device != x.device:
        raise ValueError(f"{_NAME}: {name} is on {parameter.device}, x is on {x.device}; they must agree")
