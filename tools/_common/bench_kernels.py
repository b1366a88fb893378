"""Measures operators against other ways to compute the same, after checking that they do compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitrail.tools._common.kernel_cases import Implementation, KernelCase
from vitrail.tools._common.measure import (
    Timed,
    Timing,
    capture_graph,
    copy_bandwidth,
    environment,
    measure_in_turns,
    nbytes,
)
from vitrail.tools._common.table import Row

PASSES = ("forward", "forward+backward")


def bench_kernels(
    cases: Sequence[KernelCase],
    device: torch.device,
    dtype: torch.dtype,
    min_time: float,
    report: Callable[[str], None],
) -> list[Row]:
    """Checks and times every implementation of every case; the implementations of a case in alternation.

    What is wrong is not timed: its row has `correct` false and no times.

    Args:
        cases: What to compute.
        device: Where.
        dtype: Of the inputs.
        min_time: Seconds of measurement for each implementation and pass.
        report: Called with one line on what happens now.
    """
    bandwidth = copy_bandwidth(device)
    facts = {**environment(device), "dtype": str(dtype).removeprefix("torch."), "copy_bytes_per_s": bandwidth}
    rows = []
    with torch._dynamo.config.patch(recompile_limit=256):  # every shape is a recompilation of the same code
        for case in cases:
            report(f"checking {case.operator} {case.name}")
            found = _bench_case(case, device, dtype, min_time, bandwidth, report)
            rows += [{**row, **facts} for row in found]
            torch.compiler.reset()
    return rows


def _bench_case(
    case: KernelCase,
    device: torch.device,
    dtype: torch.dtype,
    min_time: float,
    bandwidth: float,
    report: Callable[[str], None],
) -> list[Row]:
    inputs = _make_inputs(case, device, dtype)
    usable = {name: one for name, one in case.implementations.items() if device.type in one.devices}
    errors, allowed = _check(case, usable, inputs)
    right = {
        name: one for name, one in usable.items() if all(e <= a for e, a in zip(errors[name], allowed, strict=True))
    }
    rows = []
    for kind in PASSES:
        report(f"timing {case.operator} {case.name}, {kind}")
        floor = _bytes_moved(inputs, kind) / bandwidth
        timed = [_timed(one, kind, case, inputs) for one in right.values()]
        timings = dict(zip(right, measure_in_turns(timed, device, min_time), strict=True))
        for name in usable:
            row = {"operator": case.operator, "case": case.name, "pass": kind, "implementation": name}
            row |= {"whole_job": usable[name].whole_job, "correct": name in right, "relative_error": max(errors[name])}
            rows.append(row | {"floor_ms": floor * 1e3} | _figures(timings.get(name), timings.get(case.ours), floor))
    return rows


def _make_inputs(case: KernelCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Normally distributed inputs that ask for gradients, the same for every implementation."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_() for shape in case.shapes
    ]


def _check(
    case: KernelCase, usable: dict[str, Implementation], inputs: Sequence[Tensor]
) -> tuple[dict[str, list[float]], list[float]]:
    """Errors of every implementation against float64, for the output and each gradient; and the errors allowed.

    Allowed is twice the error of the eager reference in the same dtype, and the dtype's resolution on top.
    """
    truth = _results(case.reference, [t.detach().double().requires_grad_() for t in inputs])
    errors = {name: _relative_errors(_results(one.whole, inputs), truth) for name, one in usable.items()}
    eager = _relative_errors(_results(case.reference, inputs), truth)
    return errors, [2 * error + torch.finfo(inputs[0].dtype).eps for error in eager]


def _results(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output of `run(*inputs)` and the gradient of every input, for a fixed incoming gradient."""
    out = run(*inputs)
    generator = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, device=out.device, dtype=torch.float32, generator=generator).to(inputs[0].dtype)
    gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    return [out.detach(), *gradients]


def _relative_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """For each tensor the difference's norm divided by the wanted norm; infinite if that is not a number."""
    errors = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return [math.inf if math.isnan(error) else error for error in errors]


def _timed(one: Implementation, kind: str, case: KernelCase, inputs: Sequence[Tensor]) -> Timed:
    """One implementation ready for timing: on a GPU a CUDA graph over so many inputs that none stays in the cache."""
    device = inputs[0].device
    sets = [inputs]
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(16, math.ceil(2 * cache / _bytes_moved(inputs, kind)))
        sets += [_make_inputs(case, device, inputs[0].dtype, seed) for seed in range(2, copies + 1)]
    runs = [_run_on(one, kind, tensors) for tensors in sets]
    if device.type == "cuda":
        return capture_graph(runs)
    return Timed(runs[0])


def _run_on(one: Implementation, kind: str, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A function without arguments that computes one pass of an implementation."""
    with_backward = kind == "forward+backward"
    leaves = [t.detach().clone().requires_grad_(with_backward) for t in one.prepare(*inputs)]
    if not with_backward:
        return lambda: one.run(*leaves)
    grad = torch.randn_like(one.run(*leaves))
    return lambda: torch.autograd.grad(one.run(*leaves), leaves, grad)


def _bytes_moved(inputs: Sequence[Tensor], kind: str) -> int:
    """Least traffic: every input read once, every result written once; the output is like the first input.

    The backward pass reads the inputs and the incoming gradient and writes a gradient for every input.
    """
    out = nbytes(inputs[0])
    forward = nbytes(*inputs) + out
    return forward if kind == "forward" else forward + 2 * nbytes(*inputs) + out


def _figures(timing: Timing | None, ours: Timing | None, floor: float) -> Row:
    if timing is None:
        return dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "bandwidth_share", "ours_speedup"))
    return {
        "p20_ms": timing.percentile(20) * 1e3,
        "p50_ms": timing.percentile(50) * 1e3,
        "p80_ms": timing.percentile(80) * 1e3,
        "bandwidth_share": floor / timing.percentile(50),
        "ours_speedup": ours.speed_against(timing) if ours else None,
    }
