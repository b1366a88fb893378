"""Multi-head softmax attention inside the windows of a (B, H, W, C) map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.kernels._common.recording import surely
from vitrail.kernels.relative_position_bias import relative_position_bias
from vitrail.kernels.window_attention import window_attention_packed
from vitrail.layers._heads import head_width


def position_bias(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """`vitrail.kernels.relative_position_bias`, in TorchScript too: (heads, h * w, h * w)."""
    if torch.jit.is_scripting():
        return torch.ops.vitrail.relative_position_bias(table, window_size)
    return relative_position_bias(table, window_size)


def padding_key_value(
    qkv_bias: Optional[Tensor],  # noqa: UP045 -- TorchScript reads the annotations
    qkv: Tensor,
    padded: bool,
) -> tuple[Optional[Tensor], Optional[Tensor]]:  # noqa: UP045
    """Key and value, (heads, D) each, of a position that is zero before the projection to `qkv`.

    Args:
        qkv_bias: Bias of the projection, (3 * heads * D,), or None.
        qkv: What it projected, (B, H, W, 3, heads, D).
        padded: False where there is no such position: None and None, whose gradients need not be written and added.
    """
    if not padded:
        return None, None
    if qkv_bias is None:
        zeros = torch.zeros(2, qkv.shape[4], qkv.shape[5], dtype=qkv.dtype, device=qkv.device)
        return zeros[0], zeros[1]
    bias = qkv_bias.view(3, qkv.shape[4], qkv.shape[5])
    return bias[1], bias[2]


def may_be_padded(x: Tensor, multiples: tuple[int, int]) -> bool:
    """Whether the height or width of the map x, (B, H, W, ...), may be none of the multiples of a window or grid."""
    return not (surely(x.shape[1] % multiples[0] == 0) and surely(x.shape[2] % multiples[1] == 0))


@register_notrace_module
class WindowAttention(nn.Module):
    """Projects q, k, v once, attends inside (shifted) windows, projects back; (B, H, W, C) to (B, H, W, C).

    Computes what Swin (arXiv 2103.14030, section 3.2) and DaViT (arXiv 2204.03645) compute by padding their input
    with zeros to multiples of the window: a padded position takes part as a key and value that equal the bias of
    the projection (zeros without one).

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        window_size: Window height and width in tokens.
        shift_size: Cyclic shift of the windows in tokens, smaller than the window.
        qkv_bias: Add a bias to q, k and v.
        rel_pos_bias: Learn a bias on the logits for each head and each offset inside the window.
        proj_bias: Add a bias to the output projection.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or the window or shift is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        rel_pos_bias: bool = False,
        proj_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width("WindowAttention", dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.window_size = window = to_pair("WindowAttention", "window_size", window_size, 1)
        self.shift_size = shift = to_pair("WindowAttention", "shift_size", shift_size, 0)
        if shift[0] >= window[0] or shift[1] >= window[1]:
            raise ValueError(f"WindowAttention: shift_size is {shift}; allowed: smaller than window_size {window}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        if rel_pos_bias:
            n_offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
            table = torch.empty(n_offsets, num_heads, device=device, dtype=dtype)
            self.relative_position_bias_table = nn.Parameter(table)
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        else:
            self.register_parameter("relative_position_bias_table", None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), for any H and W."""
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], x.shape[2], 3, self.num_heads, self.head_dim)
        bias = None
        if self.relative_position_bias_table is not None:
            bias = position_bias(self.relative_position_bias_table, self.window_size)
        pad_k, pad_v = padding_key_value(self.qkv.bias, qkv, may_be_padded(x, self.window_size))
        if torch.jit.is_scripting():
            y = torch.ops.vitrail.window_attention_packed(
                qkv, bias, pad_k, pad_v, self.window_size, self.shift_size, self.scale, False
            )
        else:
            y = window_attention_packed(
                qkv,
                window_size=self.window_size,
                shift_size=self.shift_size,
                bias=bias,
                pad_k=pad_k,
                pad_v=pad_v,
                scale=self.scale,
            )
        return self.proj(y.flatten(3))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift_size={self.shift_size}"
