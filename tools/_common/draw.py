"""What a model looks at in one image: maps and rectangles that `draw_page` paints over it.

All follows from the layers' own computation on their eager references. The share that a query takes from a place is the
derivative of the attention's result by the value at that place, which for attention is its weight, whatever the kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels.retention.reference import manhattan_distance
from vitrail.kernels.routing_attention import region_routes
from vitrail.kernels.routing_attention.reference import region_size
from vitrail.layers.channel import ChannelAttention
from vitrail.layers.explain import layer_inputs
from vitrail.layers.gated_retention import SwatRetention
from vitrail.layers.retention import Retention
from vitrail.layers.routing import RoutingAttention
from vitrail.layers.strip import EfficientLocalAttention
from vitrail.layers.varied_window import VariedWindowAttention

_MOST_HEADS = 8
_CONVOLUTIONS = ("lepe", "lce")


class Box(NamedTuple):
    """A rectangle in fractions of the image, from 0 to 1; `color` is a number that picks one of the palette."""

    left: float
    top: float
    right: float
    bottom: float
    color: int = 0
    filled: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: What it shows.
        heat: Values over the whole image, (h, w), in any resolution; None for none.
        boxes: Rectangles over it.
        query: Place (x, y) in fractions of the image that the picture is about, if it is about one.
    """

    title: str
    heat: Tensor | None = None
    boxes: Sequence[Box] = field(default_factory=list)
    query: tuple[float, float] | None = None


def all_panels(model: nn.Module, image: Tensor, query: tuple[float, float]) -> dict[str, list[Panel]]:
    """Everything that can be drawn of a model, by kind; kinds that it does not have are left out.

    Args:
        model: In eval mode, on the CPU.
        image: (1, C, H, W), normalised.
        query: Place (x, y) in fractions of the image.
    """
    drawn = {kind: draw(model, image, query) for kind, draw in KINDS.items()}
    return {kind: panels for kind, panels in drawn.items() if panels}


def class_activation(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """Grad-CAM of the most likely class: where the last map speaks for it.

    Source: arXiv 1610.02391. The class has its name where the model's configuration tells it (`label_names`).
    """
    logits, maps = _with_maps(model, image)
    if logits.dim() != 2 or logits.shape[1] < 1 or not maps:
        return []
    best = int(logits[0].argmax())
    last = maps[-1]
    (gradient,) = torch.autograd.grad(logits[0, best], last)
    heat = (gradient.mean((2, 3), keepdim=True) * last).sum(1)[0].relu()
    chance = logits[0].softmax(0)[best].item()
    names = getattr(model, "pretrained_cfg", {}).get("label_names") or ()
    title = names[best] if len(names) == logits.shape[1] else f"class {best}"
    return [Panel(f"{title}, {100 * chance:.0f} %", heat.detach())]


def receptive_fields(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """How much each pixel moves the centre of a stage's map; the share is that of pixels above 5 % of the largest.

    Shown is the square root of the absolute gradients, summed over the colours.
    """
    image = image.clone().requires_grad_()
    _, maps = _with_maps(model, image)
    panels = []
    for index, stage in enumerate(maps):
        centre = stage[0, :, stage.shape[2] // 2, stage.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, image, retain_graph=True)
        heat = gradient[0].abs().sum(0)
        share = (heat > 0.05 * heat.max()).float().mean().item()
        panels.append(Panel(f"stage {index + 1}: {100 * share:.2g} % of the image", heat.sqrt()))
    return panels


def query_attention(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """Weights of the query (circle) in the last spatial attention of every stage, averaged over the heads."""
    panels = []
    for name, layer in _last_of_stages(model, _is_spatial_attention).items():
        inputs = layer_inputs(model, image, {name: layer})[name]
        panels.append(Panel(_short(name), attention_weights(layer, inputs, query).mean(0), query=query))
    return panels


def attention_weights(layer: nn.Module, inputs: tuple[Any, ...], query: tuple[float, float]) -> Tensor:
    """Weights with which one query of an attention layer takes the values of all positions, (heads, H, W).

    Args:
        layer: With a projection `qkv` to all queries, keys and values, in this order, and a projection `proj`.
        inputs: What it is called with; first the map, (1, H, W, C).
        query: Place (x, y) in fractions of the map.
    """
    height, width = inputs[0].shape[1:3]
    row, column = _token(query, height, width)
    with torch.enable_grad():
        values, result = (_retained if isinstance(layer, SwatRetention) else _projected)(layer, inputs)
        (gradient,) = torch.autograd.grad(result[0, row, column].sum(), values)
    gradient = gradient.reshape(*gradient.shape[:3], -1, layer.num_heads, layer.head_dim)[:, :height, :width, -1]
    return gradient[0].mean(-1).permute(2, 0, 1)


def _projected(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What a layer projects its map to, the values last, and what attention makes of it, up to a gate's factors."""
    kept: dict[str, Tensor] = {}

    def keep_qkv(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        kept["qkv"] = output.detach().requires_grad_()
        return kept["qkv"]

    def keep_result(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept["result"] = given[0]

    handles = [layer.qkv.register_forward_hook(keep_qkv), layer.proj.register_forward_pre_hook(keep_result)]
    for name in _CONVOLUTIONS:  # they add values, too, but are no attention
        if hasattr(layer, name):
            handles.append(getattr(layer, name).register_forward_pre_hook(_without_gradient_of_values))
    # Routed attention's convolution is part of its operator: a filter of zeros leaves the values' gradient alone.
    filters = {"lepe.weight": torch.zeros_like(layer.lepe.weight)} if isinstance(layer, RoutingAttention) else {}
    try:
        torch.func.functional_call(layer, filters, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return kept["qkv"], kept["result"].reshape(*inputs[0].shape[:3], -1)


def _retained(layer: SwatRetention, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Gated values and the result of the retention; the norm between it and the projection hides the weights."""
    kept: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        v = v.detach().requires_grad_()
        kept.append((v, type(layer)._attend(layer, q, k, v, *settings)))
        return kept[-1][1]

    layer._attend = attend  # type: ignore[method-assign]
    try:
        layer(*inputs)
    finally:
        del layer._attend
    return kept[0]


def _without_gradient_of_values(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """For a convolution that is given values and what to add to them."""
    values, *added = given
    return values.detach(), *added


def routed_regions(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """The regions (yellow) to which that of the query (red) is routed in the last routed block of every stage."""
    panels = []
    for name, layer in _last_of_stages(model, lambda m: isinstance(m, RoutingAttention)).items():
        (x,) = layer_inputs(model, image, {name: layer})[name]
        height, width = x.shape[1:3]
        with torch.no_grad():
            q, k, _ = layer.qkv(x).view(1, height, width, 3, layer.num_heads, layer.head_dim).unbind(3)
            bias = layer.qkv.bias.view(3, layer.num_heads, layer.head_dim)
            routes = region_routes(q, k, n_regions=layer.n_regions, topk=layer.topk, pad_q=bias[0], pad_k=bias[1])
        (tall, wide), _ = region_size(height, width, layer.n_regions)
        row, column = _token(query, height, width)
        here = row // tall * layer.n_regions[1] + column // wide

        def box(region: int, color: int, filled: bool, sizes: tuple[int, ...] = (tall, wide, height, width)) -> Box:
            down, right = divmod(region, layer.n_regions[1])  # noqa: B023 -- used in this turn of the loop only
            return _clipped(right * sizes[1], down * sizes[0], sizes[1], sizes[0], sizes[3], sizes[2], color, filled)

        boxes = [box(region, 0, True) for region in routes[0, here].tolist()]
        panels.append(Panel(f"{_short(name)}: top {layer.topk}", None, [*boxes, box(here, 1, False)], query))
    return panels


def learned_windows(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """The query's window (white) and those that its heads read instead (colours), in the last block of every stage."""
    panels = []
    for name, layer in _last_of_stages(model, lambda m: isinstance(m, VariedWindowAttention)).items():
        (x,) = layer_inputs(model, image, {name: layer})[name]
        height, width = x.shape[1:3]
        with torch.no_grad():
            offsets, stretch = layer.predict_windows(x)
        (tall, wide), (top, left) = layer.window_size, layer.pad_start(x)
        row, column = _token(query, height, width)
        down, right = (row + top) // tall, (column + left) // wide
        centre_y, centre_x = (down + 0.5) * tall - top, (right + 0.5) * wide - left
        boxes = [_around(centre_x, centre_y, wide, tall, width, height, 0)]
        shown = min(layer.num_heads, _MOST_HEADS)
        for head in range(shown):
            move, factor = offsets[0, down, right, head].tolist(), stretch[0, down, right, head].tolist()
            y, x_centre = centre_y + move[0], centre_x + move[1]
            boxes.append(_around(x_centre, y, wide * factor[1], tall * factor[0], width, height, head + 1))
        panels.append(Panel(f"{_short(name)}: {shown} of {layer.num_heads} heads", None, boxes, query))
    return panels


def neighborhoods(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """The tokens (yellow) that the query (circle) sees in the last two neighborhood blocks of every stage."""
    try:
        from vitrail.kernels.neighborhood_attention.reference import axis_neighborhood
        from vitrail.layers.neighborhood import NeighborhoodAttention
    except ImportError:
        return []
    panels = []
    for name, layer in _last_of_stages(model, lambda m: isinstance(m, NeighborhoodAttention), 2).items():
        (x,) = layer_inputs(model, image, {name: layer})[name]
        lengths = x.shape[1:3]
        token = _token(query, *lengths)
        rows, columns = (
            axis_neighborhood(
                length, layer.kernel_size[a], layer.stride[a], layer.dilation[a], layer.is_causal[a], x.device
            ).position[token[a]]
            for a, length in enumerate(lengths)
        )
        boxes = [
            _clipped(column, row, 1, 1, lengths[1], lengths[0], 0, True)
            for row in rows.tolist()
            for column in columns.tolist()
            if row < lengths[0] and column < lengths[1]
        ]
        panels.append(Panel(f"{_short(name)}: dilation {layer.dilation[0]}", None, boxes, query))
    return panels


def decay_fields(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """The decay around the query (circle) in the last block of every stage; a head's number is its factor a token.

    Of the first, the middle and the last head.

    Decomposed stages have the same field as full ones: the distances along rows and columns add up.
    """
    panels = []
    for name, layer in _last_of_stages(model, lambda m: isinstance(m, Retention)).items():
        x, _, decay = layer_inputs(model, image, {name: layer})[name]
        height, width = x.shape[1:3]
        row, column = _token(query, height, width)
        distance = manhattan_distance((height, width), decay)[row * width + column].view(height, width)
        for head in sorted({0, layer.num_heads // 2, layer.num_heads - 1}):
            heat = (decay[head] * distance).exp()
            panels.append(Panel(f"{_short(name)}, head {head + 1}: {decay[head].exp():.3f}", heat, query=query))
    return panels


def strip_gates(model: nn.Module, image: Tensor, query: tuple[float, float]) -> list[Panel]:
    """The product of both strips in the last layer of every stage, of the channel in which it varies most.

    The normalisation before the gates makes the mean over the channels nearly flat.
    """
    panels = []
    for name, layer in _last_of_stages(model, lambda m: isinstance(m, EfficientLocalAttention)).items():
        (x,) = layer_inputs(model, image, {name: layer})[name]
        with torch.no_grad():
            rows, columns = (logits.sigmoid()[0] for logits in layer.strip_logits(x))
        all_gates = rows[:, :, None] * columns[:, None]
        channel = int(all_gates.flatten(1).std(1).argmax())
        gates = all_gates[channel]
        title = f"{_short(name)}, channel {channel}: {gates.min():.2f} to {gates.max():.2f}"
        panels.append(Panel(title, gates))
    return panels


def upsampled(heat: Tensor, height: int, width: int) -> Tensor:
    """A map in the image's resolution, scaled to 0..1."""
    heat = F.interpolate(heat[None, None].float(), (height, width), mode="bilinear", align_corners=False)[0, 0]
    heat = heat - heat.min()
    return heat / heat.max().clamp(min=1e-12)


def _with_maps(model: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's output and the maps (B, C, H, W) behind its stages, with their graph."""
    maps: list[Tensor] = []
    handles = [stage.register_forward_hook(lambda _m, _i, out: maps.append(out)) for stage in _stages(model)]
    try:
        with torch.enable_grad():
            logits = model(image)
    finally:
        for handle in handles:
            handle.remove()
    return logits, maps


def _stages(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(entry["module"]) for entry in model.feature_info]


def _last_of_stages(model: nn.Module, wanted: Callable[[nn.Module], bool], count: int = 1) -> dict[str, nn.Module]:
    """The last wanted layers of every stage, by their names in the model."""
    found: dict[str, nn.Module] = {}
    for entry in model.feature_info:
        root = entry["module"]
        inside = [(f"{root}.{n}", m) for n, m in model.get_submodule(root).named_modules() if wanted(m)]
        found.update(inside[-count:])
    return found


def _is_spatial_attention(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "qkv", None), nn.Linear)
        and hasattr(module, "proj")
        and not isinstance(module, ChannelAttention)
    )


def _token(query: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    """Row and column of the token at a place."""
    return min(int(query[1] * height), height - 1), min(int(query[0] * width), width - 1)


def _around(x: float, y: float, wide: float, tall: float, width: int, height: int, color: int) -> Box:
    wide, tall = abs(wide), abs(tall)
    return Box((x - wide / 2) / width, (y - tall / 2) / height, (x + wide / 2) / width, (y + tall / 2) / height, color)


def _clipped(left: int, top: int, wide: int, tall: int, width: int, height: int, color: int, filled: bool) -> Box:
    return Box(
        left / width, top / height, min(left + wide, width) / width, min(top + tall, height) / height, color, filled
    )


def _short(name: str) -> str:
    """A layer's place for people: stage and block, counted from 1, where the name has them."""
    found = re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name)
    if found is None:
        return name.removesuffix(".attn").removesuffix(".se")
    return f"stage {int(found[1]) + 1}, block {int(found[2]) + 1}"


# What there is to draw; the first line of each docstring explains the picture to its viewer.
KINDS: dict[str, Callable[[nn.Module, Tensor, tuple[float, float]], list[Panel]]] = {
    "class activation": class_activation,
    "routed regions": routed_regions,
    "learned windows": learned_windows,
    "neighborhoods": neighborhoods,
    "decay fields": decay_fields,
    "strip gates": strip_gates,
    "attention of the query": query_attention,
    "effective receptive fields": receptive_fields,
}
