"""Registers an operator and its backward with `torch.library`: schemas, devices, shapes without data, autograd.

`vitrail.kernels._common.direct` tells which calls need not go through what is registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitrail.kernels._common.direct import direct_kind, need_gradients
from vitrail.kernels._common.gradients import fake_gradients, requested_gradients
from vitrail.kernels._common.overload import ReplayingOverload
from vitrail.kernels._common.replay import Replayed


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
    tells_needed: bool = False,
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
        tells_needed: The backward's last argument says of every gradient whether it is needed; those that are not may
            be left empty.

    Returns:
        The operator, to be called with all its arguments by position.
    """
    described = [argument.strip() for argument in arguments.split(",")]
    n_tensors = sum(argument.startswith("Tensor") for argument in described)
    n_saved = n_tensors - adds_last
    needs = ["bool[] needed"] if tells_needed else []
    backward_arguments = ", ".join(["Tensor grad", *described[:n_saved], *described[n_tensors:], *needs])
    results = ", ".join(f"Tensor {gradient}" for gradient in gradients)

    def fake_gradients_of_inputs(grad: Tensor, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        needed = inputs[-1] if tells_needed else (True,) * len(gradients)
        wanted = [tensor if is_needed else None for tensor, is_needed in zip(inputs, needed, strict=False)]
        fakes = fake_gradients(grad, wanted)
        return fakes if len(fakes) > 1 else fakes[0]

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:n_saved])
        ctx.constants = inputs[n_tensors:]

    def run_backward(ctx: Any, grad: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        tensors: list[Tensor] = []
        inputs = (grad, *ctx.saved_tensors, *ctx.constants)
        if tells_needed:
            inputs = (*inputs, list(needed[: len(gradients)]))
        kind = None if torch.is_grad_enabled() else direct_kind(inputs, tensors)
        if kind is None:
            found = getattr(torch.ops.vitrail, f"{name}_backward")(*inputs)
        else:
            found = replayed_backward.run(kind, tensors, inputs)
        found = found if len(gradients) > 1 else (found,)
        return requested_gradients(needed, (*found, grad) if adds_last else found)

    def run_dispatched_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return run_backward(ctx, grad, ctx.needs_input_grad)

    replayed = _implement(name, arguments, "Tensor", forward)
    replayed_backward = _implement(f"{name}_backward", backward_arguments, f"({results})", backward)
    torch.library.register_fake(f"vitrail::{name}")(fake_forward)
    torch.library.register_fake(f"vitrail::{name}_backward")(fake_backward or fake_gradients_of_inputs)
    torch.library.register_autograd(f"vitrail::{name}", run_dispatched_backward, setup_context=save_inputs)
    return Operator(name, replayed, _differentiable(f"vitrail_{name}", replayed, save_inputs, run_backward))


def register_choice(
    name: str, arguments: str, forward: Callable[..., Tensor], fake_forward: Callable[..., Tensor]
) -> Operator:
    """Defines `vitrail::NAME`, whose result holds whole numbers and has no gradient; see `register_operator`."""
    replayed = _implement(name, arguments, "Tensor", forward)
    torch.library.register_fake(f"vitrail::{name}")(fake_forward)
    return Operator(name, replayed, None)


def _implement(name: str, arguments: str, results: str, implementation: Callable[..., Any]) -> Replayed:
    """Defines an operator and implements it on all devices; returns what calls that nothing watches run."""
    replayed = Replayed(implementation)
    torch.library.define(f"vitrail::{name}", f"({arguments}) -> {results}")

    def run(*inputs: Any) -> Any:
        tensors: list[Tensor] = []
        kind = direct_kind(inputs, tensors)
        return implementation(*inputs) if kind is None else replayed.run(kind, tensors, inputs)

    for device in ("CPU", "CUDA"):
        torch.library.impl(f"vitrail::{name}", device)(run)
    ReplayingOverload.of(getattr(torch.ops.vitrail, name).default, replayed)
    return replayed


def _differentiable(
    name: str, replayed: Replayed, save_inputs: Callable[..., None], run_backward: Callable[..., Any]
) -> Callable[..., Tensor]:
    """What `register_autograd` makes of an operator, for calls that do not go through the dispatcher.

    It takes the call's kind and tensors, then the arguments.
    """

    def run_forward(ctx: Any, kind: Hashable, tensors: Sequence[Tensor], *inputs: Any) -> Tensor:
        output: Tensor = replayed.run(kind, tensors, inputs)
        save_inputs(ctx, inputs, output)
        return output

    def run_direct_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *needed = ctx.needs_input_grad
        return None, None, *run_backward(ctx, grad, needed)

    methods = {"forward": staticmethod(run_forward), "backward": staticmethod(run_direct_backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    return function.apply


class Operator:
    """A registered operator, called with all its arguments by position.

    Args:
        name: As which it is registered.
        replayed: Its implementation.
        differentiable: The same with gradients, if it has any; see `_differentiable`.
    """

    def __init__(self, name: str, replayed: Replayed, differentiable: Callable[..., Tensor] | None) -> None:
        self.dispatched = getattr(torch.ops.vitrail, name)
        self.dispatched.default.operator = self
        self.replayed, self.differentiable = replayed, differentiable

    def __call__(self, *arguments: Any) -> Tensor:
        tensors: list[Tensor] = []
        kind = direct_kind(arguments, tensors)
        if kind is None:
            return self.dispatched(*arguments)
        return self.run(kind, tensors, arguments)

    def run(self, kind: Hashable, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> Tensor:
        """A call that goes directly; its kind and its tensors are those that `direct_kind` finds."""
        if self.differentiable is not None and need_gradients(tensors):
            return self.differentiable(kind, tensors, *arguments)
        return self.replayed.run(kind, tensors, arguments)
