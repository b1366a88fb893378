"""What a case of `benchmark.py --kernels` is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

SUITES = ("gpu", "cpu", "host")
_FLEX_BLOCK = 128
Prepare = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Input:
    """How one input of a case is drawn.

    Attributes:
        draw: Makes the input from a generator, on its device. Floating inputs get gradients.
        per_image: The first axis counts images, which are computed independently; the check then looks at some only.
            False for parameters and tables.
        exact: A floating input that stays in float32 where the run is in half precision.
    """

    draw: Callable[[torch.Generator], Tensor]
    per_image: bool = True
    exact: bool = False

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
        """The input for a run in `dtype`."""
        drawn = self.draw(torch.Generator(device).manual_seed(seed))
        if not drawn.is_floating_point():
            return drawn
        return drawn.to(torch.float32 if self.exact else dtype).requires_grad_()


def normal(*shape: int, mean: float = 0.0, std: float = 1.0, per_image: bool = True, exact: bool = False) -> Input:
    """An input of normally distributed numbers."""

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device) * std + mean

    return Input(draw, per_image, exact)


def parameter(*shape: int, mean: float = 0.0, std: float = 1.0, exact: bool = False) -> Input:
    """Like `normal`, for what all images share."""
    return normal(*shape, mean=mean, std=std, per_image=False, exact=exact)


def _as_given(*inputs: Any) -> tuple[Any, ...]:
    return inputs


def _as_computed(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator. Only `run` is timed; all three are differentiable, for the check.

    Attributes:
        run: From what `prepare` returned to an output.
        prepare: From the case's inputs to what `run` starts from: tensors, of which it may receive copies, and others.
        finish: From `run`'s output to the output of the operator.
        whole_job: False if `prepare` or `finish` do a part of the work that others are timed with.
        plain: `run` before it was compiled, where it is: its first call takes long, and only GPUs are worth that.
        forward_only: Device types on which it has no backward pass, and is checked without.
    """

    run: Callable[..., Tensor]
    prepare: Prepare = _as_given
    finish: Callable[[Tensor], Tensor] = _as_computed
    whole_job: bool = True
    plain: Callable[..., Tensor] | None = None
    forward_only: tuple[str, ...] = ()

    @property
    def compiles(self) -> bool:
        """Whether the first call compiles."""
        return self.plain is not None

    def whole(self, *inputs: Tensor, plain: bool = False) -> Tensor:
        """From the case's inputs to the operator's output; with `plain` as it was before it was compiled."""
        run = self.plain if plain and self.plain is not None else self.run
        return self.finish(run(*self.prepare(*inputs)))


def compiled(run: Callable[..., Tensor], prepare: Prepare = _as_given, **rest: Any) -> Implementation:
    """`run` under `torch.compile`."""
    return Implementation(torch.compile(run, dynamic=False, fullgraph=True), prepare, plain=run, **rest)


def _all(*inputs: Tensor) -> float:
    return 1.0


def _shape_of_first(*inputs: Tensor) -> torch.Size:
    return inputs[0].shape


@dataclass(frozen=True)
class KernelCase:
    """An operator at one size.

    Attributes:
        operator: Name of the operator.
        name: What tells the case from the operator's others.
        inputs: What is computed from; the output has the dtype of the first.
        reference: The definition, for any dtype and any number of images.
        implementations: What is measured, by name. Those of this package have names that start with "vitrail".
        ours: The implementation that the others are compared to.
        jumps: Rounding may change the result as a whole, because something is chosen by size. Then the check is in
            float32, whatever the run is in, and what is compiled is checked uncompiled.
        needed: From the inputs to the part of the operations, counted by shapes, that these inputs call for.
        output_shape: From the inputs to the shape of the output: that of the first, if nothing else is said.
    """

    operator: str
    name: str
    inputs: Sequence[Input]
    reference: Callable[..., Tensor]
    implementations: Mapping[str, Implementation]
    ours: str = "vitrail"
    jumps: bool = False
    needed: Callable[..., float] = _all
    output_shape: Callable[..., Sequence[int]] = _shape_of_first


def stack_qkv(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """(B, H, W, 3, heads, D) as one projection leaves it, and the other inputs."""
    return torch.stack((q, k, v), 3), *rest


def flex(run: Callable[..., Tensor], prepare: Prepare = _as_given, **rest: Any) -> Implementation:
    """A compiled function around `flex_attention`, which has no backward pass on a CPU."""

    def plain(*arguments: Any) -> Tensor:
        # Otherwise `flex_attention` hands itself to the compiler, which takes longer than all the rest of a dry run.
        with mock.patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, create=True):
            return run(*arguments)

    return dataclasses.replace(compiled(run, prepare, forward_only=("cpu",), **rest), plain=plain)


def block_mask(n_tokens: int, visible: Callable[..., Tensor], queries: Tensor, keys: Tensor, images: Tensor) -> Any:
    """The `BlockMask` of `flex_attention` in which some pairs of tokens see each other.

    It is counted from the pairs, for large maps have no memory for a mask of all pairs.

    Args:
        n_tokens: Tokens of an image.
        visible: Function of (batch, head, query, key) positions.
        queries: Position of the query of every visible pair, (pairs,).
        keys: Position of its key, like `queries`.
        images: Image of the pair, from 0, like `queries`; one image if the mask is the same for all.
    """
    n_blocks = -(-n_tokens // _FLEX_BLOCK)
    cells = (images * n_blocks + queries // _FLEX_BLOCK) * n_blocks + keys // _FLEX_BLOCK
    counts = torch.bincount(cells, minlength=(int(images.max()) + 1) * n_blocks**2).view(-1, 1, n_blocks, n_blocks)
    whole = counts == _FLEX_BLOCK**2
    return flex_attention.BlockMask.from_kv_blocks(
        *_ordered((counts > 0) & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(n_tokens, n_tokens),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number and, foremost, indices of the blocks that are marked: (..., rows) and (..., rows, columns), int32."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()
