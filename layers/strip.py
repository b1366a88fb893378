"""Efficient local attention (ELA): gates a map by attention along its rows and its columns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels.strip_gate import strip_gate


class StripForm(NamedTuple):
    """What distinguishes the four published forms.

    Attributes:
        kernel_size: Positions that the convolution along a strip sees.
        conv_group_width: Channels in one group of that convolution.
        norm_groups: Groups of the normalisation.
    """

    kernel_size: int
    conv_group_width: int
    norm_groups: int


FORMS = {
    "t": StripForm(kernel_size=5, conv_group_width=1, norm_groups=32),
    "b": StripForm(kernel_size=7, conv_group_width=1, norm_groups=16),
    "s": StripForm(kernel_size=5, conv_group_width=8, norm_groups=16),
    "l": StripForm(kernel_size=7, conv_group_width=8, norm_groups=16),
}


@register_notrace_module
class EfficientLocalAttention(nn.Module):
    """Multiplies a map by a gate for each row and one for each column of every channel (ELA, arXiv 2403.01123).

    The means over rows and over columns pass through one shared convolution along the strip, one shared group
    normalisation and a sigmoid. Parameter names and values are those of the author's module (github.com/Xuwei86/
    ELA_Code); timm's `EfficientLocalAttn` is another module, whose weights do not fit. It belongs to convolutional
    networks and therefore maps (B, C, H, W) to (B, C, H, W); channels-last maps stay channels-last.

    Args:
        dim: Channels C, a multiple of 32 for form "t", of 16 for the others.
        form: "t", "b", "s" or "l", see `FORMS`.
        skip: Add the input to the result, as the author's ResNets do.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `form` is unknown, or its groups do not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        form: str = "l",
        skip: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec = _form_for(dim, form)
        self.form = form
        self.skip = skip
        self.conv = nn.Conv1d(
            dim,
            dim,
            spec.kernel_size,
            padding=spec.kernel_size // 2,
            groups=dim // spec.conv_group_width,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.gn = nn.GroupNorm(spec.norm_groups, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), for any H and W."""
        logits_h, logits_w = self.strip_logits(x)
        if torch.jit.is_scripting():
            return torch.ops.vitrail.strip_gate(x, logits_h, logits_w, self.skip)
        return strip_gate(x, logits_h, logits_w, skip=self.skip)

    def strip_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the sigmoids turn into gates: (B, C, H) for the rows and (B, C, W) for the columns."""
        # Rows of a large map have similar means: half precision would round away what they differ in.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self._along_strip(x.mean(3, dtype=dtype)), self._along_strip(x.mean(2, dtype=dtype))

    def _along_strip(self, means: Tensor) -> Tensor:
        return self.gn(self.conv(means.to(self.conv.weight.dtype)))

    def extra_repr(self) -> str:
        return f"form={self.form!r}, skip={self.skip}"


def _form_for(dim: int, form: str) -> StripForm:
    if form not in FORMS:
        raise ValueError(f"EfficientLocalAttention: form is {form!r}; allowed: {', '.join(map(repr, FORMS))}")
    spec = FORMS[form]
    multiple = math.lcm(spec.norm_groups, spec.conv_group_width)
    if dim < 1 or dim % multiple:
        raise ValueError(f"EfficientLocalAttention: dim is {dim}; form {form!r} takes multiples of {multiple}")
    return spec
