"""What the operators' backward registrations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def reference_gradients(
    reference: Callable[..., Tensor], tensors: Sequence[Tensor | None], constants: Sequence[object], grad: Tensor
) -> tuple[Tensor, ...]:
    """Recomputes `reference(*tensors, *constants)` and returns the gradient of every tensor.

    The gradient of an absent (None) tensor is an empty tensor, since operators cannot return None.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    given = [leaf for leaf in leaves if leaf is not None]
    with torch.enable_grad():
        out = reference(*leaves, *constants)
    gradients = iter(torch.autograd.grad(out, given, grad, allow_unused=True, materialize_grads=True))
    return tuple(empty_gradient(grad) if leaf is None else next(gradients).contiguous() for leaf in leaves)


def empty_gradient(like: Tensor) -> Tensor:
    """What a backward operator returns in place of the gradient of an absent input."""
    return like.new_empty(0)


def zeros_or_empty(like: Tensor, tensor: Tensor | None) -> Tensor:
    """The gradient of an input that has no influence: zeros, or `empty_gradient` where it is absent."""
    return empty_gradient(like) if tensor is None else torch.zeros_like(tensor, memory_format=torch.contiguous_format)


def fake_gradients(grad: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Shapes of a backward operator's results: a contiguous gradient of each tensor, an empty one if it is absent."""
    return tuple(
        empty_gradient(grad) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors
    )


def requested_gradients(needed: Sequence[bool], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """One entry for each input of the forward operator: its gradient if it is needed, else None.

    `gradients` belong to the first inputs; those behind them are constants.
    """
    nothing = (None,) * (len(needed) - len(gradients))
    return (*[g if is_needed else None for g, is_needed in zip(gradients, needed, strict=False)], *nothing)
