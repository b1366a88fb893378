"""Linear attention on a (B, H, W, C) map, and the convolutions that bring locality back to it."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels.linear_attention import linear_attention_packed
from vitrail.layers._heads import head_width
from vitrail.layers.depthwise import DepthwiseConv2d


@register_notrace_module
class LinearAttention(nn.Module):
    """Projects q, k, v once, attends globally without a softmax, projects back; (B, H, W, C) to (B, H, W, C).

    Source: L2ViT (arXiv 2501.16182), as released.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        floor: Least denominator, above 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or `floor` is not above 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        floor: float = 100.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not floor > 0:
            raise ValueError(f"LinearAttention: floor is {floor}; allowed: above 0")
        self.num_heads = num_heads
        self.head_dim = head_width("LinearAttention", dim, num_heads)
        self.floor = float(floor)
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, device=device, dtype=dtype))
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_temperature()

    @torch.jit.ignore
    def reset_temperature(self) -> None:
        """Sets every head's temperature to the usual scale of logits."""
        nn.init.constant_(self.temperature, self.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), for any H and W."""
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], x.shape[2], 3, self.num_heads, self.head_dim)
        temperature = self.temperature.flatten()
        if torch.jit.is_scripting():
            y = torch.ops.vitrail.linear_attention_packed(qkv, temperature, self.floor)
        else:
            y = linear_attention_packed(qkv, temperature, floor=self.floor)
        return self.proj(y.flatten(3))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, floor={self.floor}"


class LocalConcentration(nn.Module):
    """Depth-wise 7x7 convolution, GELU, batch norm, depth-wise 7x7 convolution, on (B, H, W, C).

    Source: L2ViT (arXiv 2501.16182), the local concentration module, as released.

    Args:
        dim: Channels C.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv1 = DepthwiseConv2d(dim, 7, gelu=True, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.conv2 = DepthwiseConv2d(dim, 7, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        # The permutations are views of one channels-last map.
        return self.conv2(self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
