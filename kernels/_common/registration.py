"""Registers an operator and its backward with `torch.library`: schemas, devices, shapes without data, autograd.

`vitrail.kernels._common.direct` tells which calls need not go through what is registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitrail.kernels._common.direct import is_watched
from vitrail.kernels._common.gradients import fake_gradients, requested_gradients
from vitrail.kernels._common.replay import Replayed
from vitrail.kernels._common.shortcut import ReplayingOverload, need_gradients

Operator = Callable[..., Tensor]


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
) -> Operator:
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

    Returns:
        The operator, to be called with all its arguments by position.
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
        inputs = (grad, *ctx.saved_tensors)
        through = torch.is_grad_enabled() or is_watched(inputs)
        run = getattr(torch.ops.vitrail, f"{name}_backward") if through else fast_backward
        found = run(*inputs, *ctx.constants)
        found = found if len(gradients) > 1 else (found,)
        return requested_gradients(ctx, (*found, grad) if adds_last else found)

    fast_forward = _implement(name, arguments, "Tensor", forward)
    fast_backward = _implement(f"{name}_backward", backward_arguments, f"({results})", backward)
    torch.library.register_fake(f"vitrail::{name}")(fake_forward)
    torch.library.register_fake(f"vitrail::{name}_backward")(fake_backward or fake_gradients_of_inputs)
    torch.library.register_autograd(f"vitrail::{name}", run_backward, setup_context=save_inputs)
    differentiable = _differentiable(f"vitrail_{name}", fast_forward, save_inputs, run_backward)
    return _operator(getattr(torch.ops.vitrail, name), n_tensors, fast_forward, differentiable)


def register_choice(name: str, arguments: str, forward: Operator, fake_forward: Operator) -> Operator:
    """Defines `vitrail::NAME`, whose result holds whole numbers and has no gradient; see `register_operator`."""
    n_tensors = sum(argument.strip().startswith("Tensor") for argument in arguments.split(","))
    fast = _implement(name, arguments, "Tensor", forward)
    torch.library.register_fake(f"vitrail::{name}")(fake_forward)
    return _operator(getattr(torch.ops.vitrail, name), n_tensors, fast, fast)


def _implement(name: str, arguments: str, results: str, implementation: Callable[..., Any]) -> Replayed:
    """Defines an operator and implements it on all devices; returns what a call that nothing watches runs."""
    fast = Replayed(implementation)
    torch.library.define(f"vitrail::{name}", f"({arguments}) -> {results}")

    def run(*inputs: Any) -> Any:
        return (implementation if is_watched([t for t in inputs if isinstance(t, Tensor)]) else fast)(*inputs)

    for device in ("CPU", "CUDA"):
        torch.library.impl(f"vitrail::{name}", device)(run)
    ReplayingOverload.of(getattr(torch.ops.vitrail, name).default, fast)
    return fast


def _differentiable(
    name: str, forward: Callable[..., Tensor], save_inputs: Callable[..., None], run_backward: Callable[..., Any]
) -> Operator:
    """What `register_autograd` makes of an operator, for calls that do not go through the dispatcher."""

    def run_forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        save_inputs(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    return function.apply


def _operator(dispatched: Operator, n_tensors: int, forward: Operator, differentiable: Operator) -> Operator:
    """A function that takes the dispatcher's way, the direct one, or the direct one with gradients."""

    def call(*arguments: Any) -> Tensor:
        tensors = arguments[:n_tensors]
        if is_watched(tensors):
            return dispatched(*arguments)
        if need_gradients(tensors):
            return differentiable(*arguments)
        return forward(*arguments)

    return call
