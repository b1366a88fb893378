"""Dense convolutions of maps that lie channels-last, which `torch.compile` leaves in that layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from vitrail.kernels._common.checks import autocast_together, check_alike
from vitrail.kernels._common.direct import need_gradients
from vitrail.kernels._common.gradients import empty_gradient
from vitrail.kernels._common.recording import records_graph
from vitrail.kernels._common.registration import register_operator


@register_notrace_module
class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` for networks on (B, H, W, C) maps: same arguments, parameters and results.

    Where Inductor compiles a graph with convolutions, it lays all maps with four axes that come before or behind one as
    it takes a (B, C, H, W) image to be best: the second axis innermost. Those of (B, H, W, C) networks then have their
    rows innermost, and are copied before and behind every operator that wants the channels there. So where
    `torch.compile` records a call for training, the convolution is an operator of its own, `vitrail::conv2d`, which
    calls PyTorch's. In inference, whose norms Inductor computes and fuses with such copies, it is left to Inductor.

    Compiled training as a CUDA graph on an H100 (bfloat16, 128 images of 224 x 224, torch 2.11), images/s without and
    with the operator: DaViT-T 5,860 and 7,092, BiFormer-T 6,776 and 7,607, BiFormer-S 3,824 and 3,843. Inference:
    DaViT-T and BiFormer within 1 % of each other, RMT-T 16,680 and 14,743.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W')."""
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript leaves out a branch on this call alone
            if self.padding_mode == "zeros" and not isinstance(self.padding, str):
                return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self._conv_forward(x, self.weight, self.bias)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` with numbers for both axes; in compiled training the result is channels-last, see `Conv2d`.

    Args:
        x: Map, (B, C, H, W).
        weight: (out_channels, C / groups, kernel height, kernel width).
        bias: Added to the result, (out_channels,).
        stride: Pixels between the filter's places.
        padding: Zeros before and after both axes.
        dilation: Pixels between the filter's taps.
        groups: Parts of the channels that are convolved on their own.

    Raises:
        ValueError: Dtypes, devices or channels do not fit together, in compiled training; else PyTorch raises its own.
    """
    if not _is_compiled_training(x, weight):
        return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    x, weight = autocast_together(x, weight)
    if bias is not None:
        (bias,) = autocast_together(bias)
    check_alike("conv2d", ("dtype", "device"), x=x, weight=weight, bias=bias)
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(f"conv2d: x has {x.shape[1]} channels, weight takes {weight.shape[1] * groups}")
    y = _run_conv2d(x.permute(0, 2, 3, 1), weight, stride, padding, dilation, groups)
    # The bias is no part of the operator: the compiler adds it together with what comes next.
    return (y if bias is None else y + bias).permute(0, 3, 1, 2)


def _is_compiled_training(x: Tensor, weight: Tensor) -> bool:
    """Whether `torch.compile` records gradients of a batch of maps, on a device for which there is an operator."""
    if not torch.compiler.is_compiling() or records_graph():
        return False
    return x.dim() == 4 and x.device.type in ("cpu", "cuda") and need_gradients((x, weight))


def _forward(x: Tensor, weight: Tensor, *constants: Any) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, *constants).permute(0, 2, 3, 1).contiguous()


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        groups,
        (*needed, False),
    )
    return (
        d_x.permute(0, 2, 3, 1).contiguous() if needed[0] else empty_gradient(grad),
        d_weight.contiguous() if needed[1] else empty_gradient(grad),
    )


def _fake_forward(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    size = [
        (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return x.new_empty((x.shape[0], *size, weight.shape[0]))


_run_conv2d = register_operator(
    "conv2d",
    "Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups",
    ("d_x", "d_weight"),
    _forward,
    _backward,
    _fake_forward,
    tells_needed=True,
)


@register_flop_formula(torch.ops.vitrail.conv2d)
def _forward_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(_channels_first(x_shape), weight_shape, _channels_first(out_shape))


@register_flop_formula(torch.ops.vitrail.conv2d_backward)
def _backward_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, *constants: Any, **_: Any) -> int:
    """As many for each gradient that is computed."""
    flops = conv_flop_count(_channels_first(x_shape), weight_shape, _channels_first(grad_shape))
    return flops * sum(constants[-1])


def _channels_first(shape: Sequence[int]) -> list[int]:
    batch, height, width, channels = shape
    return [batch, channels, height, width]
