"""Strided convolutions of images, whose few channels GPUs' convolutions are slow with."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from vitrail.layers.conv import Conv2d, conv2d

MOST_IMAGE_CHANNELS = 4  # of an image; with more, cuDNN's own strided convolution keeps the tensor cores busy
_ALIGNMENT = 8  # channels, which the tensor cores take at once


@register_notrace_module
class ImageConv2d(Conv2d):
    """A strided convolution, computed on GPUs as one of stride 1 over blocks of pixels.

    The blocks are `stride` x `stride` pixels: an image of 3 channels becomes a smaller one of `3 * stride ** 2`
    (space to depth), and a filter padded with zeros to whole blocks meets it. The result is the same sum, in another
    order. cuDNN pads 3 channels to 8 and reads and writes each image twice more for it; for DaViT's 7x7 filter of
    stride 4 (bfloat16, 128 images of 224 x 224) it took 0.65 ms on an H100, a tenth of the whole model's inference.

    The result is channels-last, which all later maps then are, too: normalisations see contiguous channels, and to turn
    a map to (B, H, W, C) costs nothing.

    Parameters, arguments and results are those of `torch.nn.Conv2d`. Filters that it does not gain for (no stride,
    groups, dilation, more than four channels, padding that is no zeros) and CPUs have the usual computation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W'), channels-last."""
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript leaves out a branch on this call alone
            if x.is_cuda and self._gains(x):
                return self._convolve_blocks(x)
        return self._convolve(x.contiguous(memory_format=torch.channels_last))

    @torch.jit.unused
    def _gains(self, x: Tensor) -> bool:
        """Whether the filter strides over a batch of images that it fits into, and everything about it is plain."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            return False
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        strides = self.stride[0] == self.stride[1] > 1 and not isinstance(self.padding, str)
        return plain and strides and self.in_channels <= MOST_IMAGE_CHANNELS

    @torch.jit.unused
    def _convolve_blocks(self, x: Tensor) -> Tensor:
        stride, pads = self.stride[0], cast("tuple[int, int]", self.padding)
        spans = [_Span.of(x.shape[2 + i], self.kernel_size[i], stride, pads[i]) for i in (0, 1)]
        image = _to_blocks(x, [span.image for span in spans], stride)
        weight = _to_blocks(self.weight, [span.filter for span in spans], stride)
        return conv2d(image, weight, self.bias)


class _Span(NamedTuple):
    """Zeros before and after an axis of the image and of the filter that make whole blocks of both."""

    image: tuple[int, int]
    filter: tuple[int, int]

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, pad: int) -> _Span:
        """For an axis of the image of `size` pixels. Where zeros are negative, no filter meets the last pixels."""
        before = -(-pad // stride) * stride
        early = before - pad  # zeros that come with the block in which the padding begins
        blocks = -(-(early + kernel) // stride)
        outputs = (size + 2 * pad - kernel) // stride + 1
        after = (outputs - 1 + blocks) * stride - before - size
        return cls((before, after), (early, blocks * stride - early - kernel))


def _to_blocks(x: Tensor, zeros: list[tuple[int, int]], size: int) -> Tensor:
    """Pads a map and makes each block of size x size pixels one of all their channels: (B, C, H, W), channels-last.

    The channels are filled up with zeros to a multiple of what the tensor cores take.
    """
    x = F.pad(x, (*zeros[1], *zeros[0]))
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.pad(x, (0, -x.shape[3] % _ALIGNMENT)).permute(0, 3, 1, 2)
