"""Measures operators against other ways to compute the same, after checking that they do compute the same."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase
from vitrail.tools._common.measure import (
    Timed,
    Timing,
    capture_graph,
    copy_bandwidth,
    environment,
    measure_in_turns,
    nbytes,
    never,
    waits_for_gpu,
)
from vitrail.tools._common.table import Row

PASSES = ("forward", "forward+backward")
PEERS = ("none", "fast", "all")
_CHECKED_IMAGES = 4
_OURS_MAY, _PEERS_MAY = 2.0, 10.0  # times the error of the eager reference


@dataclass(frozen=True)
class KernelSettings:
    """What all cases of a run have in common.

    Attributes:
        device: Where.
        dtype: Of the inputs.
        min_time: Seconds of measurement for each implementation and pass.
        peers: "none" measures only this package's implementations, "fast" those too that need no compilation.
        late: Tells whether it is so late that no other peer shall be prepared.
        host: Measure the host's time of a call in place of the device's.
    """

    device: torch.device
    dtype: torch.dtype
    min_time: float
    peers: str = "all"
    late: Callable[[], bool] = never
    host: bool = False


@dataclass
class _Entry:
    """An implementation in a case.

    Attributes:
        name: Its name.
        one: What it is.
        error: How far it is from the truth.
        correct: Whether that is near enough; None if it was not checked.
        note: Why it is not timed at all.
        figures: What was measured in each pass; a "note" tells why there is nothing.
    """

    name: str
    one: Implementation
    error: float | None = None
    correct: bool | None = None
    note: str | None = None
    figures: dict[str, Row] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("vitrail")


def bench_kernels(
    cases: Sequence[KernelCase],
    settings: KernelSettings,
    report: Callable[[str], None],
    done: Callable[[list[Row]], None],
) -> None:
    """Checks and times every implementation of every case; the implementations of a case in alternation.

    What is wrong, does not fit into memory, fails or comes too late has a row without times that says so.

    Args:
        cases: What to compute.
        settings: What all have in common.
        report: Called with one line on what happens now.
        done: Called with the rows of a case as soon as it is done.
    """
    bandwidth = copy_bandwidth(settings.device)
    facts = {
        **environment(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "copy_bytes_per_s": bandwidth,
    }
    with torch._dynamo.config.patch(recompile_limit=256):  # every shape is a recompilation of the same code
        for case in cases:
            rows = _Bench(case, settings, bandwidth, report).rows()
            done([{**row, **facts} for row in rows])
            _forget(settings.device)


class _Bench:
    """One case on its way through the check and the measurements."""

    def __init__(
        self,
        case: KernelCase,
        settings: KernelSettings,
        bandwidth: float,
        report: Callable[[str], None],
    ) -> None:
        self.case, self.settings, self.bandwidth = case, settings, bandwidth
        self.report = lambda text: report(f"{case.operator} {case.name}: {text}")
        self.inputs = make_inputs(case, settings.device, settings.dtype, seed=0)
        self.entries = [_Entry(name, one) for name, one in case.implementations.items() if self._is_wanted(name, one)]

    def rows(self) -> list[Row]:
        """Checks, then measures every pass."""
        self._check()
        for kind in PASSES:
            self._measure(kind)
        return [self._row(entry, kind) for kind in PASSES for entry in self.entries]

    def _is_wanted(self, name: str, one: Implementation) -> bool:
        if self.settings.peers == "none":
            return name.startswith("vitrail") and not one.compiles
        return self.settings.peers == "all" or not one.compiles

    def _check(self) -> None:
        self.report("computing in float64")
        inputs, device = self.inputs, self.settings.device
        if self.case.jumps:
            inputs = make_inputs(self.case, device, torch.float32, seed=0)
        try:
            check = Check(self.case, inputs, plain=self.case.jumps or device.type == "cpu")
        except Exception as error:
            for entry in self.entries:
                entry.note = f"not checked: the reference: {_describe(error)}"
            return
        for entry in self.entries:
            compiles = self._compiles(entry) and not check.plain
            verb = "compiling" if compiles else "checking"
            entry.note = self._try(entry, f"{verb} {entry.name}", check.judge)
            if entry.correct is False:
                entry.note = "wrong"
            elif entry.correct and entry.one.compiles and device.type == "cpu":
                entry.note = "not compiled on a CPU"

    def _compiles(self, entry: _Entry) -> bool:
        return entry.one.compiles and self.settings.device.type == "cuda"

    def _measure(self, kind: str) -> None:
        """Times what is right, all in turns."""
        settings, on_gpu = self.settings, self.settings.device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        ready: dict[str, Timed] = {}

        def prepare(entry: _Entry) -> None:
            runs, figures = self._runs(entry.one, kind), entry.figures[kind]
            if on_gpu:
                figures["peak_memory_bytes"] = _peak_memory(runs[0], settings.device)
                figures["cuda_graph"] = not settings.host and not waits_for_gpu(runs[0])
            ready[entry.name] = capture_graph(runs, pool) if figures["cuda_graph"] else Timed(runs[0])

        for entry in self.entries:
            entry.figures[kind] = {"peak_memory_bytes": None, "cuda_graph": False, "note": entry.note}
            if entry.note is None:
                verb = "compiling" if self._compiles(entry) else "preparing"
                entry.figures[kind]["note"] = self._try(entry, f"{verb} {entry.name}, {kind}", prepare)
        self.report(f"measuring {kind}")
        measured = measure_in_turns(list(ready.values()), settings.device, settings.min_time, settings.host)
        timings = dict(zip(ready, measured, strict=True))
        floor = bytes_moved(self.inputs, kind) / self.bandwidth
        for entry in self.entries:
            entry.figures[kind] |= _figures(timings.get(entry.name), timings.get(self.case.ours), floor)

    def _try(self, entry: _Entry, what: str, step: Callable[[_Entry], None]) -> str | None:
        """Does a step for one implementation; what goes wrong is returned as a note on it, and the run goes on."""
        if (entry.one.compiles or not entry.is_ours) and self.settings.late():
            return "skipped: time limit"
        self.report(what)
        try:
            step(entry)
        except Exception as error:
            note = _describe(error)
        else:
            return None
        _forget(self.settings.device, keep_compiled=True)  # here the error no longer holds on to tensors
        return note

    def _runs(self, one: Implementation, kind: str) -> list[Callable[[], object]]:
        """One pass as functions without arguments: on a GPU over so many inputs that none stays in the cache."""
        sets = [self.inputs]
        if self.settings.device.type == "cuda" and not self.settings.host:
            cache = torch.cuda.get_device_properties(self.settings.device).L2_cache_size
            copies = min(16, math.ceil(2 * cache / bytes_moved(self.inputs, kind)))
            sets += [self._like_inputs(seed) for seed in range(2, copies + 1)]
        return [_run_on(one, kind, inputs) for inputs in sets]

    def _like_inputs(self, seed: int) -> list[Tensor]:
        """Other numbers, the same tables: an implementation may have made something of these."""
        drawn = make_inputs(self.case, self.settings.device, self.settings.dtype, seed)
        return [new if new.is_floating_point() else old for new, old in zip(drawn, self.inputs, strict=True)]

    def _row(self, entry: _Entry, kind: str) -> Row:
        return {
            "operator": self.case.operator,
            "case": self.case.name,
            "pass": kind,
            "implementation": entry.name,
            "whole_job": entry.one.whole_job,
            "host_time": self.settings.host,
            "correct": entry.correct,
            "relative_error": entry.error,
            "checked_dtype": "float32" if self.case.jumps else str(self.settings.dtype).removeprefix("torch."),
            "floor_ms": bytes_moved(self.inputs, kind) / self.bandwidth * 1e3,
            **entry.figures[kind],
        }


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
        grad = torch.randn(few[0].shape, device=few[0].device, generator=generator)
        self.grad = grad.to(few[0].dtype)
        exact = [_leaf(x.double() if x.is_floating_point() else x) for x in few]
        self.truth = _results(case.reference, exact, self.grad)
        eager = _results(case.reference, [_leaf(x) for x in few], self.grad)
        eps = torch.finfo(inputs[0].dtype).eps
        self.allowed = [error + eps / 2 for error in map(_relative_error, eager, self.truth)]

    def judge(self, entry: _Entry) -> None:
        """Fills in an implementation's error and whether it is right: ours within twice the reference's error.

        A peer may be less exact, as long as it computes the same: within ten times.
        """
        forward_only = self.inputs[0].device.type in entry.one.forward_only
        errors = self.errors(functools.partial(entry.one.whole, plain=self.plain), forward_only)
        factor = _OURS_MAY if entry.is_ours else _PEERS_MAY
        entry.error = max(errors)
        allowed = self.allowed[:1] if forward_only else self.allowed
        entry.correct = all(error <= factor * may for error, may in zip(errors, allowed, strict=True))

    def errors(self, run: Callable[..., Tensor], forward_only: bool = False) -> list[float]:
        """Relative errors of the output and of every gradient."""
        if forward_only:
            with torch.no_grad():
                out = run(*(x.detach() for x in self.inputs))
            return [_relative_error(self._of_images(out, True), self.truth[0])]
        grad = self.grad
        if self.images is not None:
            grad = grad.new_zeros(self.inputs[0].shape).index_copy(0, self.images, grad)
        out, *gradients = _results(run, self.inputs, grad)
        if out.shape != self.inputs[0].shape:
            raise ValueError(f"the result has shape {tuple(out.shape)}, expected {tuple(self.inputs[0].shape)}")
        per_image = [spec.per_image for spec, x in zip(self.case.inputs, self.inputs, strict=True) if _is_leaf(x)]
        errors = [_relative_error(self._of_images(out, True), self.truth[0])]
        for got, want, split in zip(gradients, self.truth[1:], per_image, strict=True):
            if split and self.images is not None:  # what other images get counts as an error
                want = want.new_zeros(got.shape).index_copy(0, self.images, want)
            errors.append(_relative_error(got, want))
        return errors

    def _of_images(self, x: Tensor, per_image: bool) -> Tensor:
        return x.detach()[self.images] if per_image and self.images is not None else x.detach()


def make_inputs(case: KernelCase, device: torch.device, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The inputs of a case, the same for every implementation; floating ones ask for gradients."""
    return [spec.make(device, dtype, seed * len(case.inputs) + place) for place, spec in enumerate(case.inputs)]


def bytes_moved(inputs: Sequence[Tensor], kind: str) -> int:
    """Least traffic: every input read once, every result written once; the output is like the first input.

    The backward pass reads the inputs and the incoming gradient and writes a gradient for every floating input.
    """
    out = nbytes(inputs[0])
    forward = nbytes(*inputs) + out
    if kind == "forward":
        return forward
    return forward + nbytes(*inputs) + out + nbytes(*(x for x in inputs if x.is_floating_point()))


def _results(run: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of `run(*inputs)` and the gradient of every floating input."""
    out = run(*inputs)
    leaves = [x for x in inputs if _is_leaf(x)]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _leaf(x: Any, with_gradient: bool = True) -> Any:
    """A copy that asks for gradients, if it is a floating tensor."""
    return x.detach().clone().requires_grad_(with_gradient) if _is_leaf(x) else x


def _relative_error(got: Tensor, want: Tensor) -> float:
    """The difference's norm divided by the wanted norm; infinite if that is not a number."""
    difference, norm = (got.double() - want).norm().item(), want.norm().item()
    error = difference / norm if norm else difference
    return math.inf if math.isnan(error) else error


def _run_on(one: Implementation, kind: str, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A function without arguments that computes one pass of an implementation."""
    with_backward = kind == "forward+backward"
    with torch.no_grad():
        arguments = [_leaf(x, with_backward) for x in one.prepare(*inputs)]
    if not with_backward:
        return lambda: one.run(*arguments)
    leaves = [x for x in arguments if _is_leaf(x)]
    grad = torch.randn_like(one.run(*arguments))
    return lambda: torch.autograd.grad(one.run(*arguments), leaves, grad)


def _peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call allocates at most besides its inputs."""
    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _forget(device: torch.device, keep_compiled: bool = False) -> None:
    """Gives the memory of failed or finished work on a GPU back, and what was compiled for it."""
    if device.type == "cuda":
        if not keep_compiled:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _describe(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


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
