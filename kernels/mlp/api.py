"""Public function of the MLP: meaning, argument checks, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail.kernels._common.checks import (
    autocast_is_on,
    autocast_together,
    check_alike,
    check_dims,
    check_floating,
    check_shape,
)
from vitrail.kernels._common.dispatch import choose_backend, settings
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.mlp.op import fused_support, run_mlp
from vitrail.kernels.mlp.reference import mlp_reference

_NAME = "mlp"


@shortened
def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    r"""Two linear layers with the exact GELU between them: :math:`y = W_2\,\mathrm{gelu}(W_1 x + b_1) + b_2`.

    Meant for many narrow rows, where moving the hidden map takes longer than the products: the fused kernels keep it in
    registers, in float32 up to GELU and in x's dtype behind it. The inputs alone are saved for the backward, which
    computes the hidden map again, and computes those gradients only that are asked for.

    Args:
        x: Rows of any number and shape, (..., C), any floating dtype.
        w1: (H, C), as `torch.nn.Linear` holds it.
        b1: (H,); zeros by default.
        w2: (C_out, H).
        b2: (C_out,); zeros by default.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`. The kernels take float16 and
            bfloat16 and up to 256 channels of x and of the result, backward up to 192; the reference takes all else.

    Returns:
        (..., C_out) in x's dtype. Under autocast all inputs are cast to the autocast dtype.

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    _check(x, w1, b1, w2, b2)
    if autocast_is_on(x):
        x, w1, w2 = autocast_together(x, w1, w2)
        b1, b2 = (None if bias is None else bias.to(x.dtype) for bias in (b1, b2))
    check_alike(_NAME, ("dtype", "device"), x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    if choose_backend(_NAME, backend, fused_support(x, w2), x) == "triton":
        return run_mlp(x, w1, b1, w2, b2)
    return mlp_reference(x, w1, b1, w2, b2)


def runs_fused(x: Tensor, w2: Tensor, backward: bool = False) -> bool:
    """Whether `mlp` would run its kernel on such inputs, and with `backward` that of the gradients; never raises."""
    if settings.default_backend == "eager" or not (x.is_cuda or settings.default_backend == "triton"):
        return False
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype
    return fused_support(x, w2, dtype, backward).ok


def _check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    """Checks all but what autocast may change."""
    if x.dim() == 0:
        raise ValueError(f"{_NAME}: x has shape (); expected at least one dimension, (..., C)")
    check_dims(_NAME, "w1", w1, "(H, C)")
    check_dims(_NAME, "w2", w2, "(C_out, H)")
    check_shape(_NAME, "w1", w1, (w1.shape[0], x.shape[-1]))
    check_shape(_NAME, "w2", w2, (w2.shape[0], w1.shape[0]))
    check_floating(_NAME, x=x, w1=w1, w2=w2)
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None:
            check_floating(_NAME, **{name: bias})
            check_shape(_NAME, name, bias, weight.shape[:1])
