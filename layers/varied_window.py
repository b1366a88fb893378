"""Varied-size window attention on a (B, H, W, C) map: every window and head predicts which part of the map it reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.kernels._common.recording import padding_to, records_graph
from vitrail.kernels.varied_window_attention import varied_window_attention_packed
from vitrail.layers._heads import head_width
from vitrail.layers.window import position_bias

PADDINGS = ("end", "center")
OFFSET_NORMS = ("padded", "floor", "floor_swapped")


@register_notrace_module
class VariedWindowAttention(nn.Module):
    """Projects q, k, v once, samples keys and values from predicted windows, attends, projects back.

    Source: VSA (arXiv 2204.08446, section 3.2). Every window's average predicts, for each head, an offset and a
    change of scale; a prediction of zero is the ordinary window, and so are freshly made layers. Padded positions
    are zero behind the projection: they attend as keys with the logit `bias` and the value 0.

    Where the map is a multiple of the window, all forms below compute the same. Elsewhere the authors' releases
    differ in where they pad and by what number of windows (across, down) they divide a predicted offset:

    ========================================  =========  ===================
    form                                      `padding`  `offset_norm`
    ========================================  =========  ===================
    Swin-based class (2023), the default      "end"      "padded"
    classification with ViTAEv2 (2022)        "end"      "floor"
    detection with ViTAEv2 (2022)             "center"   "floor_swapped"
    ========================================  =========  ===================

    "padded" divides by the number of windows that cover the map; "floor" by that of whole windows in it;
    "floor_swapped" does so with across and down exchanged. The last two divide by zero below one window.

    Args:
        dim: Channels C of the input.
        num_heads: Attention heads.
        window_size: Window height and width in tokens.
        out_dim: Channels of the output, a multiple of `num_heads`; `dim` by default. The logits are scaled by
            `(dim // num_heads) ** -0.5`, as released, whatever the heads' width is.
        qkv_bias: Add a bias to q, k and v.
        padding: "end" pads at the bottom and right, "center" on all sides.
        offset_norm: "padded", "floor" or "floor_swapped".
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A width is no multiple of `num_heads`, the window is not positive, or a form is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        padding: str = "end",
        offset_norm: str = "padded",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding not in PADDINGS:
            raise ValueError(f"VariedWindowAttention: padding is {padding!r}; allowed: {', '.join(PADDINGS)}")
        if offset_norm not in OFFSET_NORMS:
            raise ValueError(
                f"VariedWindowAttention: offset_norm is {offset_norm!r}; allowed: {', '.join(OFFSET_NORMS)}"
            )
        out_dim = dim if out_dim is None else out_dim
        self.num_heads = num_heads
        self.head_dim = head_width("VariedWindowAttention", out_dim, num_heads)
        self.scale = max(dim // num_heads, 1) ** -0.5
        self.window_size = window = to_pair("VariedWindowAttention", "window_size", window_size, 1)
        self.padding = padding
        self.offset_norm = offset_norm
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias, device=device, dtype=dtype)
        # For each head: offset right, offset down, change of the horizontal scale, of the vertical scale.
        self.transform = nn.Linear(dim, 4 * num_heads, device=device, dtype=dtype)
        self.proj = nn.Linear(out_dim, out_dim, device=device, dtype=dtype)
        n_offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(n_offsets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the projections as PyTorch does and the bias table with deviation 0.02; predicts ordinary windows."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()
        nn.init.zeros_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, out_dim), for any H and W.

        Raises:
            ValueError: The map is smaller than one window and `offset_norm` is not "padded".
        """
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], x.shape[2], 3, self.num_heads, self.head_dim)
        offsets, stretch = self.predict_windows(x)
        bias = position_bias(self.relative_position_bias_table, self.window_size)
        start = self.pad_start(x)
        if torch.jit.is_scripting():
            y = torch.ops.vitrail.varied_window_attention_packed(
                qkv, offsets, stretch, bias, self.window_size, start, self.scale
            )
        else:
            y = varied_window_attention_packed(
                qkv,
                offsets,
                stretch,
                window_size=self.window_size,
                pad_start=start,
                bias=bias,
                scale=self.scale,
            )
        return self.proj(y.flatten(3))

    def pad_start(self, x: Tensor) -> list[int]:
        """Rows and columns (top, left) of padding before the map (B, H, W, C)."""
        if self.padding == "end":
            return [0, 0]
        return [-x.shape[1] % self.window_size[0] // 2, -x.shape[2] % self.window_size[1] // 2]

    def predict_windows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where every window and head reads, in tokens, in at least float32, also under autocast.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            Offsets (down, right) and factors on the extent (vertical, horizontal), (B, rows, columns, heads, 2) each.

        Raises:
            ValueError: The map is smaller than one window and `offset_norm` is not "padded".
        """
        pooled = self._window_means(x.permute(0, 3, 1, 2), self.pad_start(x))
        pooled = F.leaky_relu(pooled.permute(0, 2, 3, 1))  # (B, rows, columns, C)
        predicted = self._regress(pooled).view(pooled.shape[0], pooled.shape[1], pooled.shape[2], self.num_heads, 4)
        down, right = self._tokens_per_offset(x.shape[1], x.shape[2], pooled.shape[1], pooled.shape[2])
        offsets = torch.stack((predicted[..., 1] * down, predicted[..., 0] * right), -1)
        return offsets, 1 + predicted[..., 2:].flip(-1)

    def _window_means(self, x: Tensor, start: list[int]) -> Tensor:
        """Means over the windows of (B, C, H, W); positions outside the map are zeros that count, as released."""
        height, width = self.window_size
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript leaves out a branch on this call alone
            if records_graph():
                # Other runtimes count otherwise at the border: what is recorded for them has whole windows.
                down, right = padding_to(x.shape[2] + start[0], height), padding_to(x.shape[3] + start[1], width)
                return F.avg_pool2d(F.pad(x, (start[1], right, start[0], down)), [height, width])
        # No padding is materialised.
        return F.avg_pool2d(x, [height, width], [height, width], start, ceil_mode=True, divisor_override=height * width)

    def _regress(self, pooled: Tensor) -> Tensor:
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        pooled, weight, bias = pooled.to(dtype), self.transform.weight.to(dtype), self.transform.bias.to(dtype)
        if torch.jit.is_scripting():
            return F.linear(pooled, weight, bias)
        device_type = pooled.device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return F.linear(pooled, weight, bias)
        with torch.autocast(device_type, enabled=False):
            return F.linear(pooled, weight, bias)

    def _tokens_per_offset(self, height: int, width: int, rows: int, columns: int) -> tuple[float, float]:
        """Tokens (down, right) that a predicted offset of 1 moves a window.

        The prediction over a number of windows is a coordinate in which the padded map reaches from -1 to 1.
        """
        down, right = rows, columns
        if self.offset_norm != "padded":
            down, right = height // self.window_size[0], width // self.window_size[1]
            if self.offset_norm == "floor_swapped":
                down, right = width // self.window_size[1], height // self.window_size[0]
            if down == 0 or right == 0:
                raise ValueError(
                    f"VariedWindowAttention: the map is {height} x {width}, smaller than the window "
                    f"{self.window_size}, and offset_norm '{self.offset_norm}' divides by the number of whole windows; "
                    "allowed: larger maps, or offset_norm 'padded'"
                )
        return (rows * self.window_size[0] - 1) / (2 * down), (columns * self.window_size[1] - 1) / (2 * right)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, window_size={self.window_size}, padding={self.padding!r}, "
            f"offset_norm={self.offset_norm!r}"
        )
