"""Registers an operator and its backward with `torch.library`: schemas, devices, shapes without data, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitrail.kernels._common.gradients import fake_gradients, requested_gradients


def like_first(first: Tensor, *_: Any) -> Tensor:
    """Shape of a result like the operator's first input, contiguous."""
    return torch.empty(first.shape, dtype=first.dtype, device=first.device)


def like_first_of_packed(packed: Tensor, *_: Any) -> Tensor:
    """Shape of a result like one part of the operator's first input, (B, H, W, parts, heads, D)."""
    return like_first(packed.select(3, 0))


def register_operator(
    name: str,
    arguments: str,
    gradients: Sequence[str],
    forward: Callable[..., Tensor],
    backward: Callable[..., Tensor | tuple[Tensor, ...]],
    fake_forward: Callable[..., Tensor] = like_first,
    fake_backward: Callable[..., tuple[Tensor, ...]] | None = None,
    adds_last: bool = False,
) -> None:
    """Defines `vitrail::NAME` and `vitrail::NAME_backward`, which PyTorch's autograd runs behind it.

    The operator saves its inputs and nothing else.

    Args:
        name: Of the operator.
        arguments: Its inputs in the schema language, tensors first.
        gradients: Names of what the backward returns: the gradients of the first inputs, in their order.
        forward: Computes it on the CPU and on CUDA devices.
        backward: Computes the gradients from the result's gradient and all inputs.
        fake_forward: Shape of the result; by default that of the first input.
        fake_backward: Shapes of the gradients; by default those of their inputs, contiguous, and empty where absent.
        adds_last: The last tensor is added to the result: it is not saved, the backward does not take it, and its
            gradient is the result's own.
    """
    described = [argument.strip() for argument in arguments.split(",")]
    n_tensors = sum(argument.startswith("Tensor") for argument in described)
    n_saved = n_tensors - adds_last
    backward_arguments = ", ".join(["Tensor grad", *described[:n_saved], *described[n_tensors:]])
    results = ", ".join(f"Tensor {gradient}" for gradient in gradients)

    def fake_gradients_of_inputs(grad: Tensor, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        fakes = fake_gradients(grad, inputs[: len(gradients)])
        return fakes if len(fakes) > 1 else fakes[0]

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:n_saved])
        ctx.constants = inputs[n_tensors:]

    def run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = getattr(torch.ops.vitrail, f"{name}_backward")(grad, *ctx.saved_tensors, *ctx.constants)
        found = found if len(gradients) > 1 else (found,)
        return requested_gradients(ctx, (*found, grad) if adds_last else found)

    torch.library.define(f"vitrail::{name}", f"({arguments}) -> Tensor")
    torch.library.define(f"vitrail::{name}_backward", f"({backward_arguments}) -> ({results})")
    for device in ("CPU", "CUDA"):
        torch.library.impl(f"vitrail::{name}", device)(forward)
        torch.library.impl(f"vitrail::{name}_backward", device)(backward)
    torch.library.register_fake(f"vitrail::{name}")(fake_forward)
    torch.library.register_fake(f"vitrail::{name}_backward")(fake_backward or fake_gradients_of_inputs)
    torch.library.register_autograd(f"vitrail::{name}", run_backward, setup_context=save_inputs)
