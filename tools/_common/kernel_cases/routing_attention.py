"""BiFormer's attention to the tokens of given regions, from (B, H, W, heads, D) and routes to (B, H, W, heads, D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.kernels.routing_attention import routing_attention
from vitrail.tools._common.kernel_cases.common import (
    Implementation,
    Input,
    KernelCase,
    block_mask,
    compiled,
    flex,
    normal,
    stack_qkv,
)


class RoutingShape(NamedTuple):
    """Size of a routed layer."""

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

    @property
    def whole(self) -> bool:
        """Whether the map consists of whole regions."""
        return self.height % self.regions == 0 == self.width % self.regions


# The routed stages of BiFormer at 224 pixels, and the first two in detection.
ROUTING_SHAPES = {
    "gpu": (
        RoutingShape(64, 56, 56, 2, 32, 7, 1),
        RoutingShape(64, 28, 28, 4, 32, 7, 4),
        RoutingShape(64, 14, 14, 8, 32, 7, 16),
        RoutingShape(2, 200, 336, 2, 32, 16, 1),
        RoutingShape(2, 100, 168, 4, 32, 16, 4),
    ),
    "cpu": (RoutingShape(2, 8, 8, 2, 16, 4, 3), RoutingShape(1, 8, 7, 1, 16, 3, 2)),
    "host": (RoutingShape(8, 14, 14, 8, 32, 7, 16),),
}


def cases(suite: str) -> list[KernelCase]:
    """The cases of a suite."""
    return [_case(shape) for shape in ROUTING_SHAPES[suite]]


def _case(shape: RoutingShape) -> KernelCase:
    image = normal(shape.batch, shape.height, shape.width, shape.heads, shape.dim)
    eager, gathered = _ours(shape, "eager"), _gathered(shape)
    implementations = {
        "vitrail": Implementation(_ours(shape, "auto")),
        "vitrail packed": Implementation(_unpacked(_ours(shape, "auto")), stack_qkv),
        "eager": Implementation(eager),
    }
    if shape.whole:
        implementations["gather"] = Implementation(gathered)
    implementations["eager compiled"] = compiled(eager)
    if shape.whole:
        implementations["gather compiled"] = compiled(gathered)
        implementations["flex_attention"] = _flex(shape)
    return KernelCase("routing_attention", str(shape), (image, image, image, _routes(shape)), eager, implementations)


def _routes(shape: RoutingShape) -> Input:
    def draw(generator: torch.Generator) -> Tensor:
        """Distinct regions for each region, (B, R, topk)."""
        size = (shape.batch, shape.regions**2, shape.regions**2)
        return torch.rand(size, generator=generator, device=generator.device).topk(shape.topk).indices

    return Input(draw)


def _ours(shape: RoutingShape, backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> Tensor:
        return routing_attention(q, k, v, routes, n_regions=shape.regions, backend=backend)

    return run


def _unpacked(run: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same from (B, H, W, 3, heads, D), as one projection leaves it; stacking the gradients is timed too."""

    def run_packed(qkv: Tensor, routes: Tensor) -> Tensor:
        return run(*qkv.unbind(3), routes)

    return run_packed


def split_regions(x: Tensor, regions: int) -> Tensor:
    """(B, H, W, ...) of whole regions -> (B, R, tokens, ...)."""
    x = x.unflatten(2, (regions, -1)).unflatten(1, (regions, -1))  # (B, rows, h, columns, w, ...)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_regions(x: Tensor, regions: int, height: int) -> Tensor:
    """(B, R, tokens, ...) -> (B, H, W, ...): undoes `split_regions`."""
    x = x.unflatten(2, (height // regions, -1)).unflatten(1, (regions, regions))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def gather_regions(x: Tensor, routes: Tensor) -> Tensor:
    """(B, R, tokens, C) -> (B, R, topk * tokens, C): expanded for each region, then gathered by its routes.

    As BiFormer's authors do it. The backward of that gather fills a gradient of the expanded size.
    """
    index = routes[..., None, None].expand(-1, -1, -1, *x.shape[2:])
    return x[:, None].expand(-1, x.shape[1], -1, -1, -1).gather(2, index).flatten(2, 3)


def _gathered(shape: RoutingShape) -> Callable[..., Tensor]:
    """Attention to gathered regions, for maps of whole regions."""

    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(-1, (shape.heads, shape.dim)).transpose(2, 3)  # (B, R, heads, tokens, D)

    def run(q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> Tensor:
        q, k, v = (split_regions(x.flatten(3), shape.regions) for x in (q, k, v))
        keys, values = (heads_first(gather_regions(x, routes)) for x in (k, v))
        out = ((heads_first(q) * shape.dim**-0.5 @ keys.transpose(-2, -1)).softmax(-1) @ values).transpose(2, 3)
        return join_regions(out, shape.regions, shape.height)

    return run


def _flex(shape: RoutingShape) -> Implementation:
    """flex_attention on tokens that lie region by region, with the block mask of the routes made in advance."""
    from torch.nn.attention.flex_attention import flex_attention

    def prepare(q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> tuple[Any, ...]:
        tokens = (split_regions(x, shape.regions).flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v))
        return *tokens, region_mask(routes, shape)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask)

    def finish(out: Tensor) -> Tensor:
        return join_regions(out.transpose(1, 2).unflatten(1, (shape.regions**2, -1)), shape.regions, shape.height)

    return flex(run, prepare, finish=finish, whole_job=False)


def region_mask(routes: Tensor, shape: RoutingShape) -> Any:
    """The block mask in which a token sees those of the regions that its own is routed to."""
    regions, tokens = shape.regions**2, shape.height * shape.width // shape.regions**2
    routed = routes.new_zeros(len(routes), regions, regions, dtype=torch.bool).scatter_(2, routes, True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return routed[batch, query // tokens, key // tokens]

    images, own, _ = torch.meshgrid(*(torch.arange(n, device=routes.device) for n in routes.shape), indexing="ij")
    inside = torch.arange(tokens, device=routes.device)
    shape_of_pairs = (*routes.shape, tokens, tokens)
    queries = ((own * tokens)[..., None, None] + inside[:, None]).expand(shape_of_pairs)
    keys = ((routes * tokens)[..., None, None] + inside).expand(shape_of_pairs)
    images = images[..., None, None].expand(shape_of_pairs)
    return block_mask(regions * tokens, visible, queries.flatten(), keys.flatten(), images.flatten())
