"""The two forms of Gated-SwinRMT's attention on (B, H, W, C) maps: retention inside windows, with gates.

Only the abstract of the paper (arXiv 2604.06014) could be read and no code was found: what is here is our reading of
it. Every choice that the abstract leaves open is an argument, whose default is the reading that we recommend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitrail.kernels._common.checks import to_pair
from vitrail.kernels.retention import decomposed_retention, retention
from vitrail.layers._heads import head_width
from vitrail.layers.depthwise import DepthwiseConv2d
from vitrail.layers.norm import LayerNorm
from vitrail.layers.retention import check_decay, manhattan_decay, rotate, rotation_of, scripted_retention

_NORM_EPS = 1e-6


def balanced_slopes(num_heads: int, halving: bool, like: Tensor) -> Tensor:
    """Slopes of ALiBi (arXiv 2108.12409) for the first half of the heads, their negatives for the second, (heads,).

    With n heads in the first half (the larger one if `num_heads` is odd), the i-th has `2^(-8 i / n)`, or `2^-i` with
    `halving`. On the device of `like`, in at least float32.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    n_positive = (num_heads + 1) // 2
    steps = torch.arange(1, n_positive + 1, device=like.device, dtype=dtype)
    half = torch.exp2(-steps if halving else -8.0 * steps / n_positive)
    return torch.cat((half, -half[: num_heads - n_positive]))


class _WindowRetention(nn.Module):
    """What both gated forms share: projections, windows that adapt to the map, the convolution of the values."""

    def __init__(
        self,
        activation: str,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        initial_value: float,
        heads_range: float,
        decomposed: bool,
        rotation: bool,
        adaptive_window: str,
        pad_first: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_decay(name, initial_value, heads_range)
        _check_choice(name, "adaptive_window", adaptive_window, ("clip", "divisor"))
        self.num_heads = num_heads
        self.head_dim = head_width(name, dim, num_heads)
        if rotation and self.head_dim % 2:
            raise ValueError(f"{name}: rotation needs heads of even width; dim is {dim}, num_heads {num_heads}")
        self.window_size = window = to_pair(name, "window_size", window_size, 1)
        self.shift_size = shift = to_pair(name, "shift_size", shift_size, 0)
        if shift[0] >= window[0] or shift[1] >= window[1]:
            raise ValueError(f"{name}: shift_size is {shift}; allowed: smaller than window_size {window}")
        self.activation = activation
        self.initial_value = float(initial_value)
        self.heads_range = float(heads_range)
        self.decomposed = decomposed
        self.rotation = rotation
        self.grow_to_divisor = adaptive_window == "divisor"
        self.pad_first = pad_first
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.lce = DepthwiseConv2d(dim, 5, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def _windows(self, x: Tensor) -> tuple[int, int, int, int]:
        """Height, width, vertical and horizontal shift of the windows for a map (B, H, W, C)."""
        window_h = _adapt(self.window_size[0], x.shape[1], self.grow_to_divisor)
        window_w = _adapt(self.window_size[1], x.shape[2], self.grow_to_divisor)
        shift_h = self.shift_size[0] if x.shape[1] > window_h else 0
        shift_w = self.shift_size[1] if x.shape[2] > window_w else 0
        return window_h, window_w, shift_h, shift_w

    def _pad(self, x: Tensor) -> Tensor:
        """Pads a map (B, H, W, C) with zeros to whole windows if it is padded before the projection."""
        if not self.pad_first:
            return x
        window_h, window_w, _, _ = self._windows(x)
        return F.pad(x, (0, 0, 0, -x.shape[2] % window_w, 0, -x.shape[1] % window_h))

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a map (B, H, W, C), (B, H, W, heads, head_dim) each."""
        heads = (h.shape[0], h.shape[1], h.shape[2], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(h).view(heads).unbind(3)
        if self.rotation:
            window_h, window_w, shift_h, shift_w = self._windows(h)
            row = torch.remainder(torch.arange(h.shape[1], device=h.device) - shift_h, window_h)
            column = torch.remainder(torch.arange(h.shape[2], device=h.device) - shift_w, window_w)
            turns = rotation_of(row[:, None] * window_w + column, self.head_dim, h)
            q, k = rotate(q, turns), rotate(k, turns)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        slopes: Optional[Tensor] = None,  # noqa: UP045 -- TorchScript reads the annotation
        signed_slopes: bool = False,
        length_offset: bool = False,
    ) -> Tensor:
        window_h, window_w, shift_h, shift_w = self._windows(q)
        if torch.jit.is_scripting():
            y = scripted_retention(
                q,
                k,
                v,
                decay,
                slopes,
                [window_h, window_w],
                [shift_h, shift_w],
                self.activation,
                signed_slopes,
                length_offset,
                self.scale,
                self.decomposed,
            )
        else:
            y = (decomposed_retention if self.decomposed else retention)(
                q,
                k,
                v,
                decay,
                window_size=(window_h, window_w),
                shift_size=(shift_h, shift_w),
                activation=self.activation,
                slopes=slopes,
                signed_slopes=signed_slopes,
                length_offset=length_offset,
                scale=self.scale,
            )
        return y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift_size={self.shift_size}"


@register_notrace_module
class SwatRetention(_WindowRetention):
    """Sigmoid retention inside (shifted) windows with gated values, the SWAT form of Gated-SwinRMT.

    Only the abstract of the paper (arXiv 2604.06014) could be read and no code was found: this is our reading of it,
    with SWAT (arXiv 2502.18845) for the sigmoid and the balanced slopes. The defaults are the reading we recommend;
    the arguments from `initial_value` on are the choices that the abstract leaves open.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads; one half has positive slopes, the other the same slopes negated.
        window_size: Window height and width in tokens.
        shift_size: Cyclic shift of the windows in tokens, smaller than the window; 0 on an axis that one window covers.
        initial_value: Decay of the first head, see `manhattan_decay`.
        heads_range: Spread of the decays over the heads.
        decomposed: Attend along rows, then along columns; otherwise over the window at once.
        rotation: Rotate queries and keys by the raster index in the window.
        adaptive_window: Per axis: "clip" takes the map's size where it is smaller than the window; "divisor" the
            smallest divisor of the map's size that is not smaller than the window.
        pad_first: Pad to whole windows before the projection, so that padding takes part with the projection's
            biases, as in Swin; otherwise padding is hidden.
        decay_form: "bias_and_decay" takes slopes from the logits and decays behind the activation; "slopes" decays
            behind it by the slopes alone.
        slope_base: "geometric" for `2^(-8 i / n)`, i from 1 to the n heads of a half; "halving" for `2^-i`.
        signed_slopes: Slopes act on the signed offset, so that the halves look to opposite sides.
        length_offset: Take the logarithm of the attended window's tokens from the logits.
        output_norm: "head" for a LayerNorm over each head, shared by all; "channel" for one over C; "after_lce" for
            one over C behind the convolution's sum; "weight_sum" divides by the sum of the weights.
        gate_target: The SwiGLU gate multiplies the "value", or the "output" before the last projection.
        odd_heads: Allow odd `num_heads`, the larger half being positive.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, a size is out of range, or a choice is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] = 0,
        initial_value: float = 2.0,
        heads_range: float = 4.0,
        decomposed: bool = True,
        rotation: bool = False,
        adaptive_window: str = "clip",
        pad_first: bool = False,
        decay_form: str = "bias_and_decay",
        slope_base: str = "geometric",
        signed_slopes: bool = False,
        length_offset: bool = False,
        output_norm: str = "head",
        gate_target: str = "value",
        odd_heads: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_choice("SwatRetention", "decay_form", decay_form, ("bias_and_decay", "slopes"))
        _check_choice("SwatRetention", "slope_base", slope_base, ("geometric", "halving"))
        _check_choice("SwatRetention", "output_norm", output_norm, ("head", "channel", "after_lce", "weight_sum"))
        _check_choice("SwatRetention", "gate_target", gate_target, ("value", "output"))
        if num_heads % 2 and not odd_heads:
            raise ValueError(f"SwatRetention: num_heads is {num_heads}; allowed without odd_heads: even numbers")
        if signed_slopes and decay_form == "slopes":
            raise ValueError("SwatRetention: signed_slopes is True; allowed: only with decay_form 'bias_and_decay'")
        super().__init__(
            "sigmoid",
            dim,
            num_heads,
            window_size,
            shift_size,
            initial_value,
            heads_range,
            decomposed,
            rotation,
            adaptive_window,
            pad_first,
            device,
            dtype,
        )
        self.slopes_decay = decay_form == "slopes"
        self.halving_slopes = slope_base == "halving"
        self.signed_slopes = signed_slopes
        self.length_offset = length_offset
        self.output_norm = output_norm
        self.gates_value = gate_target == "value"
        self.gate = nn.Linear(dim, dim, device=device, dtype=dtype)
        width = self.head_dim if output_norm == "head" else dim
        self.norm = (
            nn.Identity()
            if output_norm == "weight_sum"
            else LayerNorm(width, eps=_NORM_EPS, device=device, dtype=dtype)
        )

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Normalised map h (B, H, W, C) of any size -> (B, H, W, C); the block's own input x is not used."""
        height, width = h.shape[1], h.shape[2]
        h = self._pad(h)
        q, k, v = self._project(h)
        gate = F.silu(self.gate(h))
        if self.gates_value:
            v = v * gate.view(v.shape)
        y = self.lce(v.flatten(3), self._normalised(q, k, v))
        if self.output_norm == "after_lce":
            y = self.norm(y)
        if not self.gates_value:
            y = y * gate
        return self.proj(y[:, :height, :width])

    def _normalised(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention with its norm, if that comes before the convolution: (B, H, W, C)."""
        decay = manhattan_decay(self.num_heads, self.initial_value, self.heads_range, q)
        slopes: Optional[Tensor] = balanced_slopes(self.num_heads, self.halving_slopes, q)  # noqa: UP045
        if self.slopes_decay and slopes is not None:
            decay, slopes = -slopes, None
        y = self._attend(q, k, v, decay, slopes, self.signed_slopes, self.length_offset)
        if self.output_norm == "weight_sum":
            # The sum of all weights of both passes; far from zero unless every logit is below -10.
            total = self._attend(q, k, torch.ones_like(v), decay, slopes, self.signed_slopes, self.length_offset)
            y = y / total.clamp(min=1e-6)
        elif self.output_norm == "head":
            y = self.norm(y)
        y = y.flatten(3)
        return self.norm(y) if self.output_norm == "channel" else y


@register_notrace_module
class GatedRetention(_WindowRetention):
    """Softmax retention inside (shifted) windows with a sigmoid gate, the Retention form of Gated-SwinRMT.

    Only the abstract of the paper (arXiv 2604.06014) could be read and no code was found: this is our reading of it,
    built on RMT (arXiv 2309.11523). The defaults are the reading we recommend; the arguments from `initial_value` on
    are the choices that the abstract leaves open.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        window_size: Window height and width in tokens.
        shift_size: Cyclic shift of the windows in tokens, smaller than the window; 0 on an axis that one window covers.
        initial_value: Decay of the first head, see `manhattan_decay`.
        heads_range: Spread of the decays over the heads.
        decomposed: As in `SwatRetention`.
        rotation: As in `SwatRetention`.
        adaptive_window: As in `SwatRetention`.
        pad_first: As in `SwatRetention`.
        gate_input: What the gate is projected from: "normalised", the tensor behind the block's norm, which feeds the
            queries; or "block", the tensor before it.
        gate_granularity: One gate for each "channel" or each "head".
        gate_bias: Initial bias of the gate before its sigmoid.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, a size is out of range, or a choice is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] = 0,
        initial_value: float = 2.0,
        heads_range: float = 4.0,
        decomposed: bool = True,
        rotation: bool = False,
        adaptive_window: str = "clip",
        pad_first: bool = False,
        gate_input: str = "normalised",
        gate_granularity: str = "channel",
        gate_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_choice("GatedRetention", "gate_input", gate_input, ("normalised", "block"))
        _check_choice("GatedRetention", "gate_granularity", gate_granularity, ("channel", "head"))
        super().__init__(
            "softmax",
            dim,
            num_heads,
            window_size,
            shift_size,
            initial_value,
            heads_range,
            decomposed,
            rotation,
            adaptive_window,
            pad_first,
            device,
            dtype,
        )
        self.gate_reads_block = gate_input == "block"
        self.gates_heads = gate_granularity == "head"
        self.gate_bias = gate_bias
        self.gate = nn.Linear(dim, num_heads if self.gates_heads else dim, device=device, dtype=dtype)
        self.reset_gate_bias()

    @torch.jit.ignore
    def reset_gate_bias(self) -> None:
        """Sets the gate's bias to its initial value."""
        nn.init.constant_(self.gate.bias, self.gate_bias)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Normalised map h and block input x, (B, H, W, C) each, of any size -> (B, H, W, C)."""
        height, width = h.shape[1], h.shape[2]
        gate = self.gate(x if self.gate_reads_block else h).sigmoid()
        q, k, v = self._project(self._pad(h))
        decay = manhattan_decay(self.num_heads, self.initial_value, self.heads_range, q)
        y = self.lce(v.flatten(3), self._attend(q, k, v, decay).flatten(3))
        y = y[:, :height, :width]
        if self.gates_heads:
            y = y.unflatten(3, [self.num_heads, self.head_dim]) * gate[..., None]
            return self.proj(y.flatten(3))
        return self.proj(y * gate)


def _adapt(window: int, size: int, grow_to_divisor: bool) -> int:
    """Size of the window on an axis of `size` tokens."""
    if size <= window:
        return size
    if grow_to_divisor:
        while size % window != 0:
            window += 1
    return window


def _check_choice(layer: str, name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{layer}: {name} is {value!r}; allowed: {', '.join(allowed)}")
