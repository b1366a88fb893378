"""Registration of `vitrail::layer_norm` with PyTorch.

The operator runs on any device: what `fused_support` accepts goes to the Triton kernels, everything else to the
reference. It saves its inputs only; the backward, which reads the rows anyway, recomputes their statistics.
Like all pointwise operators it has no entry in PyTorch's FLOP counter.
"""

from __future__ import annotations

from torch import Tensor

from vitrail.kernels._common.dispatch import FUSED_HEAD_DIMS, Support, triton_support
from vitrail.kernels._common.gradients import reference_gradients
from vitrail.kernels._common.registration import register_operator
from vitrail.kernels.layer_norm.reference import layer_norm_reference

MOST_CHANNELS = 8192  # a program holds whole rows in its registers


def fused_support(x: Tensor) -> Support:
    """The one place that says when layer normalisation is handed to the reference, and why."""
    # The gradient of a single value is zero, of which a fused multiply-add leaves the rounding.
    if not 2 <= x.shape[-1] <= MOST_CHANNELS:
        return Support(False, f"Triton kernels take rows of 2 to {MOST_CHANNELS} values, the input has {x.shape[-1]}")
    # There are no heads: only device and dtype matter else, and any width that the shared conditions allow stands for
    # all.
    return triton_support(x, FUSED_HEAD_DIMS[0])


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if fused_support(x).ok:
        from vitrail.kernels.layer_norm.triton import layer_norm_forward

        return layer_norm_forward(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps).contiguous()


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if fused_support(x).ok:
        from vitrail.kernels.layer_norm.triton import layer_norm_backward

        return layer_norm_backward(grad, x, weight, bias, eps)
    d_x, d_weight, d_bias = reference_gradients(layer_norm_reference, (x, weight, bias), (eps,), grad)
    return d_x, d_weight, d_bias


run_layer_norm = register_operator(
    "layer_norm",
    "Tensor x, Tensor? weight, Tensor? bias, float eps",
    ("d_x", "d_weight", "d_bias"),
    _forward,
    _backward,
)
