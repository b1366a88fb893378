"""BiFormer's whole attention layer: projection, choice of routes, attention, position term, projection.

Here the routes follow from the input, so that rounding may change which regions are chosen. The regions of the input
differ by more than noise, and the check is in float32, where that hardly ever happens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels._common.dispatch import settings
from vitrail.layers.routing import RoutingAttention
from vitrail.tools._common.kernel_cases.common import Implementation, Input, KernelCase, compiled, parameter
from vitrail.tools._common.kernel_cases.routing_attention import (
    ROUTING_SHAPES,
    RoutingShape,
    gather_regions,
    join_regions,
    split_regions,
)

# Of the layer, in the order in which they are passed on.
PARAMETERS = ("qkv.weight", "qkv.bias", "lepe.weight", "lepe.bias", "proj.weight", "proj.bias")


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in ROUTING_SHAPES[suite]]


def _case(shape: RoutingShape) -> KernelCase:
    dim = shape.heads * shape.dim
    narrow = (2 * dim) ** -0.5  # the input's variance is 2
    parameters = (
        parameter(3 * dim, dim, std=narrow),
        parameter(3 * dim, std=0.1),
        parameter(dim, 1, 5, 5, std=0.2),
        parameter(dim, std=0.1),
        parameter(dim, dim, std=dim**-0.5),
        parameter(dim, std=0.1),
    )
    eager, authors = _ours(shape, "eager"), authors_layer(shape.heads, shape.dim, shape.regions, shape.topk)
    return KernelCase(
        "routing_layer",
        str(shape),
        (_distinct_regions(shape), *parameters),
        eager,
        {
            "vitrail": Implementation(_ours(shape, "auto")),
            "eager": Implementation(eager),
            "authors'": Implementation(authors),
            "vitrail compiled": compiled(_ours(shape, "auto")),
            "authors' compiled": compiled(authors),
        },
        jumps=True,
    )


def _distinct_regions(shape: RoutingShape) -> Input:
    """A map (B, H, W, C) of noise and, of equal variance, one vector for each region."""
    dim = shape.heads * shape.dim
    rows, columns = -(-shape.height // shape.regions), -(-shape.width // shape.regions)

    def draw(generator: torch.Generator) -> Tensor:
        size = (shape.batch, shape.regions, shape.regions, dim)
        means = torch.randn(size, generator=generator, device=generator.device)
        means = means.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, : shape.height, : shape.width]
        return means + torch.randn(means.shape, generator=generator, device=generator.device)

    return Input(draw)


def _ours(shape: RoutingShape, backend: str) -> Callable[..., Tensor]:
    layer = RoutingAttention(shape.heads * shape.dim, shape.heads, shape.regions, shape.topk, device="meta")

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        before = settings.default_backend
        settings.default_backend = backend
        try:
            return torch.func.functional_call(layer, dict(zip(PARAMETERS, parameters, strict=True)), (x,))
        finally:
            settings.default_backend = before

    return run


def authors_layer(heads: int, head_dim: int, n_regions: int, topk: int) -> Callable[..., Tensor]:
    """The layer in the steps of BiFormer's authors: padded input, regions, gathered keys and values, one softmax."""
    dim = heads * head_dim
    scale = dim**-0.5

    def run(x: Tensor, qkv: Tensor, qkv_bias: Tensor, lepe: Tensor, lepe_bias: Tensor, wo: Tensor, wo_bias: Tensor):
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % n_regions, 0, -height % n_regions))
        regions = split_regions(F.linear(x, qkv, qkv_bias), n_regions)  # (B, R, tokens, 3 C)
        q, kv = regions.split((dim, 2 * dim), -1)
        v_map = join_regions(kv[..., dim:], n_regions, x.shape[1]).permute(0, 3, 1, 2).contiguous()
        position = F.conv2d(v_map, lepe, lepe_bias, padding=2, groups=dim).permute(0, 2, 3, 1)

        means = q.mean(2).detach(), kv[..., :dim].mean(2).detach()
        routes = (means[0] * scale @ means[1].transpose(1, 2)).topk(topk, dim=-1).indices
        k, v = gather_regions(kv, routes).split(dim, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))  # (B, R, heads, tokens, D)
        out = ((q * scale) @ k.transpose(-1, -2)).softmax(-1) @ v
        out = join_regions(out.transpose(2, 3).flatten(3), n_regions, x.shape[1]) + position
        return F.linear(out, wo, wo_bias)[:, :height, :width]

    return run
