"""Measures operators against other ways to compute the same, after checking that they do compute the same."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitrail.tools._common.kernel_cases.common import Implementation, KernelCase
from vitrail.tools._common.kernel_check import Check, is_leaf, leaf, make_inputs
from vitrail.tools._common.measure import (
    Timed,
    Timing,
    capture_graph,
    copy_bandwidth,
    environment,
    matmul_speed,
    measure_in_turns,
    nbytes,
    never,
    peak_memory,
    percentiles,
    waits_for_gpu,
)
from vitrail.tools._common.table import Row
from vitrail.tools._common.turns import Turns

PASSES = ("forward", "forward+backward")
PEERS = ("none", "fast", "all")


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
        turns: Processes that share the device.
    """

    device: torch.device
    dtype: torch.dtype
    min_time: float
    peers: str = "all"
    late: Callable[[], bool] = never
    host: bool = False
    turns: Turns = field(default_factory=Turns)


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
    facts = {**environment(settings.device), "dtype": str(settings.dtype).removeprefix("torch.")}
    limits = functools.cache(functools.partial(_measure_limits, settings))
    with torch._dynamo.config.patch(recompile_limit=256):  # every shape is a recompilation of the same code
        for case in cases:
            rows = _Bench(case, settings, limits, report).rows()
            done([{**row, **facts, **limits()._asdict()} for row in rows])
            _forget(settings.device)


class _Limits(NamedTuple):
    """The two lines of the roofline: what a large copy moves, and what a large matrix product computes, in a second."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float


def _measure_limits(settings: KernelSettings) -> _Limits:
    min_time = min(0.2, settings.min_time)
    return _Limits(
        copy_bandwidth(settings.device, min_time), matmul_speed(settings.device, settings.dtype, min_time)
    )  # fmt: skip


class _Bench:
    """One case on its way through the check and the measurements."""

    def __init__(
        self,
        case: KernelCase,
        settings: KernelSettings,
        limits: Callable[[], _Limits],
        report: Callable[[str], None],
    ) -> None:
        """`limits` are measured when they are first asked for: in this process's turn."""
        self.case, self.settings, self.limits = case, settings, limits
        self.report = lambda text: report(f"{case.operator} {case.name}: {text}")
        self.inputs = make_inputs(case, settings.device, settings.dtype, seed=0)
        self.flops: dict[str, int] = {}
        self.entries = [_Entry(name, one) for name, one in case.implementations.items() if self._is_wanted(name, one)]

    def rows(self) -> list[Row]:
        """Checks, then measures every pass."""
        self.settings.turns.prepare()
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
            entry.note = self._try(entry, f"{verb} {entry.name}", functools.partial(_judge, check))
            if entry.correct is False:
                entry.note = "wrong"
            elif entry.correct and entry.one.compiles and device.type == "cpu":
                entry.note = "not compiled on a CPU"

    def _compiles(self, entry: _Entry) -> bool:
        return entry.one.compiles and self.settings.device.type == "cuda"

    def _measure(self, kind: str) -> None:
        """Times what is right, all in turns."""
        settings, on_gpu = self.settings, self.settings.device.type == "cuda"
        settings.turns.prepare()
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        ready: dict[str, Timed] = {}
        by_name = {entry.name: entry for entry in self.entries}

        def prepare(entry: _Entry) -> None:
            runs, figures = self._runs(entry.one, kind), entry.figures[kind]
            if entry.name == self.case.ours:
                self.flops[kind] = round(_count_flops(runs[0]) * self.case.needed(*self.inputs))
            if on_gpu:
                runs[0]()  # what only the first call allocates does not count
                figures["peak_memory_bytes"] = peak_memory(runs[0], settings.device)
                figures["cuda_graph"] = not settings.host and not waits_for_gpu(runs[0])
            ready[entry.name] = capture_graph(runs, pool) if figures["cuda_graph"] else Timed(runs[0])

        for entry in self.entries:
            entry.figures[kind] = {"peak_memory_bytes": None, "cuda_graph": False, "note": entry.note}
            if entry.note is None:
                verb = "compiling" if self._compiles(entry) else "preparing"
                entry.figures[kind]["note"] = self._try(entry, f"{verb} {entry.name}, {kind}", prepare)
        self.report(f"measuring {kind}")
        try:
            with settings.turns.measuring() as alone:
                self.limits()
                measured = measure_in_turns(list(ready.values()), settings.device, settings.min_time, settings.host)
        except torch.OutOfMemoryError:
            for name in ready:
                by_name[name].figures[kind]["note"] = "out of memory beside the others"
            measured, ready, alone = [], {}, True
        timings = dict(zip(ready, measured, strict=True))
        floor = self._floor(kind)
        for entry in self.entries:
            entry.figures[kind] |= _figures(timings.get(entry.name), timings.get(self.case.ours), floor)
            entry.figures[kind]["alone"] = alone

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
            copies = min(16, math.ceil(2 * cache / bytes_moved(self.case, self.inputs, kind)))
            sets += [self._like_inputs(seed) for seed in range(2, copies + 1)]
        return [_run_on(one, kind, inputs) for inputs in sets]

    def _floor(self, kind: str) -> float:
        """Seconds of the least traffic."""
        return bytes_moved(self.case, self.inputs, kind) / self.limits().copy_bytes_per_s

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
            "floor_ms": self._floor(kind) * 1e3,
            "flops": self.flops.get(kind),
            **entry.figures[kind],
        }


def _judge(check: Check, entry: _Entry) -> None:
    entry.error, entry.correct = check.judge(entry.one, entry.is_ours)


def bytes_moved(case: KernelCase, inputs: Sequence[Tensor], kind: str) -> int:
    """Least traffic: every input read once, every result written once.

    The backward pass reads the inputs and the incoming gradient and writes a gradient for every floating input.
    """
    out = math.prod(case.output_shape(*inputs)) * inputs[0].element_size()
    forward = nbytes(*inputs) + out
    if kind == "forward":
        return forward
    return forward + nbytes(*inputs) + out + nbytes(*(x for x in inputs if x.is_floating_point()))


def _run_on(one: Implementation, kind: str, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A function without arguments that computes one pass of an implementation."""
    with_backward = kind == "forward+backward"
    with torch.no_grad():
        arguments = [leaf(x, with_backward) for x in one.prepare(*inputs)]
    if not with_backward:
        return lambda: one.run(*arguments)
    leaves = [x for x in arguments if is_leaf(x)]
    grad = torch.randn_like(one.run(*arguments))
    return lambda: torch.autograd.grad(one.run(*arguments), leaves, grad)


class _FlopCounter(TorchDispatchMode):
    """Adds up floating-point operations of products and convolutions, two for each multiply-add.

    PyTorch's own counter tells modules apart, too, and therefore cannot follow gradients of leaves through them.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _count_flops(run: Callable[[], object]) -> int:
    with _FlopCounter() as counter:
        run()
    return counter.total


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
    return {
        **percentiles(timing),
        "bandwidth_share": floor / timing.percentile(50) if timing else None,
        "ours_speedup": ours.speed_against(timing) if timing and ours else None,
    }
