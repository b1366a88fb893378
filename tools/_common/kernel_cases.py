"""What `benchmark.py --kernels` measures: for each operator its cases and the ways to compute them.

To add an operator, write a function that returns its cases for a device type and add it to `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

from vitrail.kernels.channel_attention import channel_attention, channel_attention_packed
from vitrail.kernels.routing_attention import routing_attention
from vitrail.kernels.window_attention import window_attention, window_attention_packed

EVERYWHERE = ("cpu", "cuda")


def _as_given(*inputs: Tensor) -> tuple[Tensor, ...]:
    return inputs


def _as_computed(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator. Only `run` is timed; all three are differentiable, for the check.

    Attributes:
        run: From what `prepare` returned to an output.
        prepare: From the case's inputs to the layout that `run` starts from.
        finish: From `run`'s output to the output of the operator.
        devices: Device types it runs on.
        whole_job: False if `prepare` or `finish` do a part of the work that others are timed with.
    """

    run: Callable[..., Tensor]
    prepare: Callable[..., Sequence[Tensor]] = _as_given
    finish: Callable[[Tensor], Tensor] = _as_computed
    devices: tuple[str, ...] = EVERYWHERE
    whole_job: bool = True

    def whole(self, *inputs: Tensor) -> Tensor:
        """From the case's inputs to the operator's output."""
        return self.finish(self.run(*self.prepare(*inputs)))


@dataclass(frozen=True)
class KernelCase:
    """An operator at one size.

    Attributes:
        operator: Name of the operator.
        name: What tells the case from the operator's others.
        shapes: Shapes of the inputs, all of which get gradients; the output has the shape of the first.
        reference: The definition, for any dtype.
        implementations: What is measured, by name.
        ours: The implementation that the others are compared to.
    """

    operator: str
    name: str
    shapes: Sequence[tuple[int, ...]]
    reference: Callable[..., Tensor]
    implementations: Mapping[str, Implementation]
    ours: str = "vitrail"


class _WindowShape(NamedTuple):
    batch: int
    size: int
    heads: int
    dim: int
    window: int
    shift: int

    def __str__(self) -> str:
        text = f"B{self.batch} {self.size}x{self.size}x{self.heads * self.dim} h{self.heads} w{self.window}"
        return f"{text} s{self.shift}" if self.shift else text


# The stages of Swin-T at 224 pixels, then single stages at the batch of other published figures.
_WINDOW_SHAPES = {
    "cuda": (
        _WindowShape(128, 56, 3, 32, 7, 3),
        _WindowShape(128, 28, 6, 32, 7, 3),
        _WindowShape(128, 14, 12, 32, 7, 3),
        _WindowShape(128, 7, 24, 32, 7, 0),
        _WindowShape(64, 56, 3, 32, 7, 3),
        _WindowShape(64, 14, 12, 32, 7, 3),
        _WindowShape(64, 56, 3, 32, 14, 7),
    ),
    "cpu": (_WindowShape(2, 14, 2, 16, 7, 3), _WindowShape(1, 7, 4, 16, 7, 0)),
}


def _window_attention_cases(device_type: str) -> list[KernelCase]:
    """Swin's shifted windows with a bias, from image-shaped (B, H, W, heads, D) to the same."""
    return [_window_case(shape) for shape in _WINDOW_SHAPES[device_type]]


def _window_case(shape: _WindowShape) -> KernelCase:
    image = (shape.batch, shape.size, shape.size, shape.heads, shape.dim)
    tokens = shape.window**2
    return KernelCase(
        "window_attention",
        str(shape),
        (image, image, image, (shape.heads, tokens, tokens)),
        _ours(shape, "eager"),
        {
            "vitrail": Implementation(_ours(shape, "auto")),
            "vitrail packed": Implementation(_ours_packed(shape), _pack),
            "eager": Implementation(_ours(shape, "eager")),
            "eager compiled": Implementation(
                torch.compile(_ours(shape, "eager"), dynamic=False, fullgraph=True), devices=("cuda",)
            ),
            "timm": Implementation(_timm_core(shape, _softmax_attention), _pack),
            "timm compiled": Implementation(
                torch.compile(_timm_core(shape, _softmax_attention), dynamic=False, fullgraph=True),
                _pack,
                devices=("cuda",),
            ),
            "timm SDPA": Implementation(_timm_core(shape, F.scaled_dot_product_attention), _pack),
            "flex_attention": Implementation(_flex(shape), _pack, devices=("cuda",)),
            "SDPA in windows": _attention_alone(shape),
        },
    )


def _ours(shape: _WindowShape, backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return window_attention(q, k, v, window_size=shape.window, shift_size=shape.shift, bias=bias, backend=backend)

    return run


def _ours_packed(shape: _WindowShape) -> Callable[..., Tensor]:
    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        return window_attention_packed(qkv, window_size=shape.window, shift_size=shape.shift, bias=bias)

    return run


def _pack(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3, heads, D) as one projection leaves it, and the bias."""
    return torch.stack((q, k, v), 3), bias


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + attn_mask).softmax(-1) @ v


def _timm_core(shape: _WindowShape, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Roll, partition, attention, reverse and roll back in the way of timm's Swin block."""

    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = _split_windows(qkv, shape)
        return _join_windows(attention(q, k, v, attn_mask=_mask(bias, shape)), shape)

    return run


def _split_windows(qkv: Tensor, shape: _WindowShape) -> tuple[Tensor, ...]:
    """(B, H, W, 3, heads, D) -> q, k, v, each (B * windows, heads, T, D)."""
    x = qkv.flatten(3)
    if shape.shift:
        x = torch.roll(x, (-shape.shift, -shape.shift), (1, 2))
    x = window_partition(x, (shape.window, shape.window))  # (B * windows, w, w, 3 * heads * D)
    return x.reshape(len(x), -1, 3, shape.heads, shape.dim).permute(2, 0, 3, 1, 4).unbind(0)


def _join_windows(out: Tensor, shape: _WindowShape) -> Tensor:
    """(B * windows, heads, T, D) -> (B, H, W, heads, D)."""
    x = out.transpose(1, 2).reshape(len(out), shape.window, shape.window, -1)
    x = window_reverse(x, (shape.window, shape.window), shape.size, shape.size)
    if shape.shift:
        x = torch.roll(x, (shape.shift, shape.shift), (1, 2))
    return x.unflatten(-1, (shape.heads, shape.dim))


def _regions(shape: _WindowShape, device: torch.device) -> Tensor:
    """Number of the region that every token of the rolled map came from, (windows, T)."""
    index = torch.arange(shape.size, device=device)
    part = (index >= shape.size - shape.window).int() + (index >= shape.size - shape.shift).int()
    regions = (3 * part[:, None] + part[None, :])[None, :, :, None]
    return window_partition(regions, (shape.window, shape.window)).flatten(1)


def _mask(bias: Tensor, shape: _WindowShape) -> Tensor:
    """The bias, with -inf between regions: (1 or B * windows, heads, T, T)."""
    if not shape.shift:
        return bias[None]
    regions = _regions(shape, bias.device)
    hidden = regions[:, :, None] != regions[:, None, :]
    mask = torch.zeros(hidden.shape, dtype=bias.dtype, device=bias.device).masked_fill(hidden, float("-inf"))
    tokens = bias.shape[-1]
    mask = mask.view(1, -1, 1, tokens, tokens).expand(shape.batch, -1, shape.heads, -1, -1)
    return bias + mask.reshape(-1, shape.heads, tokens, tokens)


def _flex(shape: _WindowShape) -> Callable[..., Tensor]:
    """flex_attention, compiled, with bias and regions looked up in its score function; the rest as in timm."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        regions = _regions(shape, qkv.device)

        def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            value = value + bias[head, query, key]
            if not shape.shift:
                return value
            window = batch % len(regions)
            return torch.where(regions[window, query] == regions[window, key], value, float("-inf"))

        q, k, v = _split_windows(qkv, shape)
        return _join_windows(flex_attention(q, k, v, score_mod=score), shape)

    return torch.compile(run, dynamic=False, fullgraph=True)


def _attention_alone(shape: _WindowShape) -> Implementation:
    """SDPA on windows that lie ready, with the mask made in advance: the part of the job that SDPA itself is."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        windows = (x.contiguous() for x in _split_windows(torch.stack((q, k, v), 3), shape))
        return *windows, _mask(bias, shape)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Implementation(run, prepare, lambda out: _join_windows(out, shape), whole_job=False)


class _ChannelShape(NamedTuple):
    batch: int
    size: int
    groups: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} {self.size}x{self.size}x{self.groups * self.dim} g{self.groups}"


# The stages of DaViT-T at 224 pixels.
_CHANNEL_SHAPES = {
    "cuda": (
        _ChannelShape(64, 56, 3, 32),
        _ChannelShape(64, 28, 6, 32),
        _ChannelShape(64, 14, 12, 32),
        _ChannelShape(64, 7, 24, 32),
    ),
    "cpu": (_ChannelShape(2, 14, 2, 16),),
}


def _channel_attention_cases(device_type: str) -> list[KernelCase]:
    """DaViT's attention between the channels of a group, from image-shaped (B, H, W, groups, D) to the same."""
    return [_channel_case(shape) for shape in _CHANNEL_SHAPES[device_type]]


def _channel_case(shape: _ChannelShape) -> KernelCase:
    image = (shape.batch, shape.size, shape.size, shape.groups, shape.dim)
    return KernelCase(
        "channel_attention",
        str(shape),
        (image, image, image),
        _eager_channels,
        {
            "vitrail": Implementation(channel_attention),
            "vitrail packed": Implementation(channel_attention_packed, _stack),
            "eager": Implementation(_eager_channels),
            "eager compiled": Implementation(
                torch.compile(_eager_channels, dynamic=False, fullgraph=True), devices=("cuda",)
            ),
            "timm": Implementation(_timm_channels, _stack),
            "timm compiled": Implementation(
                torch.compile(_timm_channels, dynamic=False, fullgraph=True), _stack, devices=("cuda",)
            ),
        },
    )


def _eager_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return channel_attention(q, k, v, backend="eager")


def _stack(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (torch.stack((q, k, v), 3),)


def _timm_channels(qkv: Tensor) -> Tensor:
    """The core of timm's DaViT channel block, on tokens; its scale multiplies k."""
    batch, height, width, _, groups, dim = qkv.shape
    q, k, v = qkv.reshape(batch, height * width, 3, groups, dim).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((k * dim**-0.5).transpose(-1, -2) @ v).softmax(-1)
    out = (weights @ q.transpose(-1, -2)).transpose(-1, -2)
    return out.transpose(1, 2).reshape(batch, height, width, groups, dim)


class _RoutingShape(NamedTuple):
    batch: int
    height: int
    width: int
    heads: int
    dim: int
    regions: int
    topk: int

    def __str__(self) -> str:
        size = f"B{self.batch} {self.height}x{self.width}x{self.heads * self.dim} h{self.heads}"
        return f"{size} {self.regions}x{self.regions} regions top-{self.topk}"

    def routes(self, device_type: str) -> Tensor:
        """Distinct regions for each region, drawn at random, (B, R, topk)."""
        regions = self.regions**2
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand((self.batch, regions, regions), generator=generator)
        return scores.topk(self.topk).indices.to(device_type)


# The routed stages of BiFormer at 224 pixels, and the first two in detection.
_ROUTING_SHAPES = {
    "cuda": (
        _RoutingShape(64, 56, 56, 2, 32, 7, 1),
        _RoutingShape(64, 28, 28, 4, 32, 7, 4),
        _RoutingShape(64, 14, 14, 8, 32, 7, 16),
        _RoutingShape(2, 200, 336, 2, 32, 16, 1),
        _RoutingShape(2, 100, 168, 4, 32, 16, 4),
    ),
    "cpu": (_RoutingShape(1, 14, 14, 2, 16, 7, 4),),
}


def _routing_attention_cases(device_type: str) -> list[KernelCase]:
    """BiFormer's attention to the tokens of given regions, from image-shaped (B, H, W, heads, D) to the same."""
    return [_routing_case(shape, shape.routes(device_type)) for shape in _ROUTING_SHAPES[device_type]]


def _routing_case(shape: _RoutingShape, routes: Tensor) -> KernelCase:
    image = (shape.batch, shape.height, shape.width, shape.heads, shape.dim)
    eager, gathered = _routed(shape, routes, "eager"), _gathered(shape, routes)
    compiled = {"dynamic": False, "fullgraph": True}
    implementations = {
        "vitrail": Implementation(_routed(shape, routes, "auto")),
        "vitrail packed": Implementation(_unpacked(_routed(shape, routes, "auto")), _stack),
        "eager": Implementation(eager),
        "eager compiled": Implementation(torch.compile(eager, **compiled), devices=("cuda",)),
    }
    if shape.height % shape.regions == 0 == shape.width % shape.regions:
        implementations["gather"] = Implementation(gathered)
        implementations["gather compiled"] = Implementation(torch.compile(gathered, **compiled), devices=("cuda",))
    return KernelCase("routing_attention", str(shape), (image, image, image), eager, implementations)


def _routed(shape: _RoutingShape, routes: Tensor, backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routing_attention(q, k, v, routes, n_regions=shape.regions, backend=backend)

    return run


def _unpacked(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The same from (B, H, W, 3, heads, D), as one projection leaves it; stacking the gradients is timed too."""

    def run_packed(qkv: Tensor) -> Tensor:
        return run(*qkv.unbind(3))

    return run_packed


def _gathered(shape: _RoutingShape, routes: Tensor) -> Callable[..., Tensor]:
    """As the authors do it: keys and values of all regions, expanded for each region, gathered by its routes.

    The backward of that gather fills a gradient of the expanded size. For maps of whole regions.
    """
    rows, columns = shape.height // shape.regions, shape.width // shape.regions
    regions, tokens = shape.regions**2, rows * columns

    def split(x: Tensor) -> Tensor:
        x = x.view(shape.batch, shape.regions, rows, shape.regions, columns, -1).transpose(2, 3)
        return x.reshape(shape.batch, regions, tokens, -1)

    def gather(x: Tensor) -> Tensor:
        x = split(x)
        index = routes[..., None, None].expand(-1, -1, -1, tokens, x.shape[-1])
        chosen = x[:, None].expand(-1, regions, -1, -1, -1).gather(2, index)
        return heads_first(chosen.flatten(2, 3))

    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(-1, (shape.heads, shape.dim)).transpose(2, 3)  # (B, R, heads, tokens, D)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (heads_first(split(q)) * shape.dim**-0.5 @ gather(k).transpose(-2, -1)).softmax(-1)
        out = (weights @ gather(v)).transpose(2, 3)
        out = out.reshape(shape.batch, shape.regions, shape.regions, rows, columns, -1).transpose(2, 3)
        return out.reshape(q.shape)

    return run


OPERATORS: dict[str, Callable[[str], list[KernelCase]]] = {
    "window_attention": _window_attention_cases,
    "channel_attention": _channel_attention_cases,
    "routing_attention": _routing_attention_cases,
}
