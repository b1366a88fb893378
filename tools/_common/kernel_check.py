"""Judges whether an implementation of an operator computes what the operator is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase

_CHECKED_IMAGES = 4
_OURS_MAY, _PEERS_MAY = 2.0, 10.0  # times the error of the eager reference


class Verdict(NamedTuple):
    """The largest relative error of an implementation, over its output and gradients, and whether all are allowed."""

    error: float
    correct: bool


class Check:
    """Compares implementations of a case with its reference in float64: the output and every gradient.

    The truth takes several times the memory and time of what it judges, so that it is computed for a few images only,
    spread from the first to the last. The others get an incoming gradient of zero; then the gradients of what all
    images share are those of these few as well. Nothing of the implementation that is judged is made smaller.
    """

    def __init__(self, case: KernelCase, inputs: Sequence[Tensor], plain: bool = True) -> None:
        """Computes the truth, and how far the eager reference in the inputs' dtype is from it.

        Args:
            case: What is computed.
            inputs: From what.
            plain: Judge what is compiled as it was before.
        """
        self.case, self.inputs, self.plain = case, inputs, plain
        self.images = None
        if any(spec.per_image for spec in case.inputs):
            n_images = len(inputs[0])
            steps = torch.linspace(0, n_images - 1, min(n_images, _CHECKED_IMAGES), device=inputs[0].device)
            self.images = steps.round().long()
        few = [self._of_images(x, spec.per_image) for x, spec in zip(inputs, case.inputs, strict=True)]
        generator = torch.Generator(few[0].device).manual_seed(1)
        grad = torch.randn(tuple(case.output_shape(*few)), device=few[0].device, generator=generator)
        self.grad = grad.to(few[0].dtype)
        exact = [leaf(x.double() if x.is_floating_point() else x) for x in few]
        self.truth = _results(case.reference, exact, self.grad)
        eager = _results(case.reference, [leaf(x) for x in few], self.grad)
        eps = torch.finfo(inputs[0].dtype).eps
        self.allowed = [error + eps / 2 for error in map(relative_error, eager, self.truth)]

    def judge(self, one: Implementation, is_ours: bool) -> Verdict:
        """Whether an implementation is right: ours within twice the reference's error.

        A peer may be less exact, as long as it computes the same: within ten times.
        """
        forward_only = self.inputs[0].device.type in one.forward_only
        errors = self.errors(functools.partial(one.whole, plain=self.plain), forward_only)
        allowed = self.allowed[:1] if forward_only else self.allowed
        factor = _OURS_MAY if is_ours else _PEERS_MAY
        correct = all(error <= factor * may for error, may in zip(errors, allowed, strict=True))
        return Verdict(max(errors), correct)

    def errors(self, run: Callable[..., Tensor], forward_only: bool = False) -> list[float]:
        """Relative errors of the output and of every gradient."""
        if forward_only:
            with torch.no_grad():
                out = run(*(x.detach() for x in self.inputs))
            return [relative_error(self._of_images(out, True), self.truth[0])]
        grad, shape = self.grad, tuple(self.case.output_shape(*self.inputs))
        if self.images is not None:
            grad = grad.new_zeros(shape).index_copy(0, self.images, grad)
        out, *gradients = _results(run, self.inputs, grad)
        if out.shape != shape:
            raise ValueError(f"the result has shape {tuple(out.shape)}, expected {shape}")
        per_image = [spec.per_image for spec, x in zip(self.case.inputs, self.inputs, strict=True) if is_leaf(x)]
        errors = [relative_error(self._of_images(out, True), self.truth[0])]
        for got, want, split in zip(gradients, self.truth[1:], per_image, strict=True):
            if split and self.images is not None:  # what other images get counts as an error
                want = want.new_zeros(got.shape).index_copy(0, self.images, want)
            errors.append(relative_error(got, want))
        return errors

    def _of_images(self, x: Tensor, per_image: bool) -> Tensor:
        return x.detach()[self.images] if per_image and self.images is not None else x.detach()


def make_inputs(case: KernelCase, device: torch.device, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The inputs of a case, the same for every implementation; floating ones ask for gradients."""
    return [spec.make(device, dtype, seed * len(case.inputs) + place) for place, spec in enumerate(case.inputs)]


def _results(run: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of `run(*inputs)` and the gradient of every floating input."""
    out = run(*inputs)
    leaves = [x for x in inputs if is_leaf(x)]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def leaf(x: Any, with_gradient: bool = True) -> Any:
    """A copy that asks for gradients, if it is a floating tensor."""
    return x.detach().clone().requires_grad_(with_gradient) if is_leaf(x) else x


def relative_error(got: Tensor, want: Tensor) -> float:
    """The difference's norm divided by the wanted norm; infinite if that is not a number."""
    difference, norm = (got.double() - want).norm().item(), want.norm().item()
    error = difference / norm if norm else difference
    return math.inf if math.isnan(error) else error
