"""Times several things in turns, so that their ratios hold on a machine whose speed drifts."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_LEAST_ROUNDS = 5
_CHUNKS_PER_MEASUREMENT = 8
_MOST_CALLS_AHEAD = 20  # the host must not run so far ahead that it has to wait for a place in the GPU's queue


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
        run: Does the work once or several times over.
        calls: How many times one `run` does it.
    """

    run: Callable[[], object]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        chunks: One list per round, of the seconds of every call in that round.
    """

    chunks: list[list[float]]

    def percentile(self, percent: float) -> float:
        """Percentile of the seconds of all calls, linearly interpolated."""
        values = sorted(value for chunk in self.chunks for value in chunk)
        position = (len(values) - 1) * percent / 100
        low = int(position)
        high = min(low + 1, len(values) - 1)
        return values[low] + (values[high] - values[low]) * (position - low)

    def speed_against(self, other: Timing) -> float:
        """How many times as fast as `other`: the median over rounds, in which both ran within moments."""
        pairs = zip(self.chunks, other.chunks, strict=True)
        return statistics.median(statistics.median(theirs) / statistics.median(ours) for ours, theirs in pairs)


def measure_in_turns(
    timed: Sequence[Timed], device: torch.device, min_time: float, on_host: bool = False, cpu_time: bool = False
) -> list[Timing]:
    """Times all of `timed`, in alternation.

    Each has its turn in every round, for a chunk of calls; every second round goes backwards. It ends when each has
    run for `min_time` seconds and there were five rounds.

    Args:
        timed: What to time; it has been run before, so that nothing is compiled or tuned any more.
        device: Where it runs: CUDA events measure on a GPU, a clock elsewhere.
        min_time: Seconds of measurement for each.
        on_host: Measure how long a call keeps the host, which does not wait for the GPU.
        cpu_time: Count the time that the process, all its threads together, had a processor; other work of the machine
            counts less than on the wall's clock.
    """
    now = time.process_time if cpu_time else time.perf_counter
    clock = _GpuClock(device) if device.type == "cuda" and not on_host else _HostClock(device, now)
    chunk_seconds = min_time / _CHUNKS_PER_MEASUREMENT
    repeats = [_repeats_for(one, clock, chunk_seconds) for one in timed]
    chunks: list[list[list[float]]] = [[] for _ in timed]
    spent = [0.0] * len(timed)
    order = list(range(len(timed)))
    while timed and (min(spent) < min_time or len(chunks[0]) < _LEAST_ROUNDS):
        for index in order:
            seconds = clock.time_calls(timed[index].run, repeats[index])
            spent[index] += sum(seconds)
            chunks[index].append([value / timed[index].calls for value in seconds])
        order.reverse()
    return [Timing(rounds) for rounds in chunks]


class _HostClock:
    """Measures how long calls take on the host."""

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        self.device, self.now = device, now
        self.most_calls = _MOST_CALLS_AHEAD if device.type == "cuda" else 1000

    def time_calls(self, run: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of each of `repeats` calls."""
        self._wait()
        seconds = []
        for _ in range(repeats):
            start = self.now()
            run()
            seconds.append(self.now() - start)
        self._wait()
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _GpuClock:
    """Measures how long calls take on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.most_calls = 1000

    def time_calls(self, run: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of each of `repeats` calls."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize(self.device)
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def _repeats_for(timed: Timed, clock: _HostClock | _GpuClock, seconds: float) -> int:
    """How many runs fill a chunk; also warms up."""
    typical = statistics.median(clock.time_calls(timed.run, 3))
    return max(1, min(clock.most_calls, round(seconds / max(typical, 1e-7))))


def capture_graph(runs: Sequence[Callable[[], object]], pool: Any = None) -> Timed:
    """Records calls as one CUDA graph, whose replay does them all without work on the host.

    The result holds on to `runs`: a graph reads the tensors of its calls by address and keeps none of them alive.

    Args:
        runs: The calls.
        pool: Memory for what they allocate (`torch.cuda.graph_pool_handle`), so that graphs which never run at the
            same time and whose results nobody reads take the memory of the largest, not of all.
    """
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # lazy initialisation may not happen inside a capture
        for _ in range(3):
            runs[0]()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for run in runs:
                run()
    finally:
        torch.cuda.set_stream(current)  # which a capture that fails does not do

    def replay(kept: Sequence[Callable[[], object]] = tuple(runs)) -> None:
        graph.replay()

    return Timed(replay, len(runs))


def waits_for_gpu(run: Callable[[], object]) -> bool:
    """Whether a call waits for the GPU, to read a number say; then it cannot become a CUDA graph."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def copy_bandwidth(device: torch.device, min_time: float = 0.2) -> float:
    """Bytes a second that copying a large tensor moves, reads and writes together; measured for `min_time` seconds."""
    size = 2**29 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (timing,) = measure_in_turns([Timed(lambda: target.copy_(source))], device, min_time)
    return 2 * size / timing.percentile(50)


def matmul_speed(device: torch.device, dtype: torch.dtype, min_time: float = 0.2) -> float:
    """Floating-point operations a second of a large matrix product; measured for `min_time` seconds."""
    size = 8192 if device.type == "cuda" else 256
    matrix = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(matrix)
    (timing,) = measure_in_turns([Timed(lambda: torch.mm(matrix, matrix, out=out))], device, min_time)
    return 2 * size**3 / timing.percentile(50)


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call allocates at most, over what there was before; its result counts, until it is there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def after(seconds: float | None) -> Callable[[], bool]:
    """A function that tells whether `seconds` have passed since now; with None they never do."""
    if seconds is None:
        return never
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def never() -> bool:
    """No."""
    return False


def nbytes(*tensors: Tensor) -> int:
    """Bytes that the elements of tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code that is measured."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "timm": version_of("timm"),
        "vitrail": version_of("vitrail"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    """Model of the processor where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """An installed package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; None for an installed package.

    The environment variable VITRAIL_COMMIT tells it of a copy whose `.git` is missing or that of another commit.
    """
    if told := os.environ.get("VITRAIL_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()
