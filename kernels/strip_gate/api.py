"""Public function of the strip gate: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from vitrail.kernels._common.checks import check_dims, check_floating, check_shape
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.strip_gate.op import fused_support, run_strip_gate
from vitrail.kernels.strip_gate.reference import strip_gate_reference

_NAME = "strip_gate"


@shortened
def strip_gate(x: Tensor, logits_h: Tensor, logits_w: Tensor, *, skip: bool = False, backend: str = "auto") -> Tensor:
    r"""Multiplies a map by the sigmoids of a strip along its height and of one along its width.

    :math:`y_{c,i,j} = x_{c,i,j}\, \sigma(h_{c,i})\, \sigma(w_{c,j})`, plus :math:`x_{c,i,j}` with `skip` (ELA,
    arXiv 2403.01123, the module's last step). It belongs to convolutional networks, so its maps are (B, C, H, W).

    Args:
        x: Map, (B, C, H, W), any strides, any floating dtype.
        logits_h: Strip along the height, (B, C, H). Half-precision maps may come with float32 strips; the gates
            are then rounded to the map's dtype.
        logits_w: Strip along the width, (B, C, W), in the dtype of `logits_h`.
        skip: Add `x` to the result.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (B, C, H, W) in x's dtype, also under autocast; channels-last if `x` is.

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    _check(x, logits_h, logits_w)
    if choose_backend(_NAME, backend, fused_support(x), x) == "triton":
        return run_strip_gate(x, logits_h, logits_w, skip)
    return strip_gate_reference(x, logits_h, logits_w, skip)


def _check(x: Tensor, logits_h: Tensor, logits_w: Tensor) -> None:
    check_dims(_NAME, "x", x, "(B, C, H, W)")
    check_shape(_NAME, "logits_h", logits_h, x.shape[:3])
    check_shape(_NAME, "logits_w", logits_w, (*x.shape[:2], x.shape[3]))
    check_floating(_NAME, x=x, logits_h=logits_h, logits_w=logits_w)
    if logits_w.dtype != logits_h.dtype:
        raise ValueError(f"{_NAME}: logits_w has dtype {logits_w.dtype}, logits_h {logits_h.dtype}; they must agree")
    if not x.device == logits_h.device == logits_w.device:
        raise ValueError(
            f"{_NAME}: x is on {x.device}, logits_h on {logits_h.device}, logits_w on {logits_w.device}; "
            "they must agree"
        )
