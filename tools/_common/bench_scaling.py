"""Measures how training speeds up with the number of processes, and that it stays the same training."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitrail.models.mm.classifier import TimmClassifier
from vitrail.models.mm.optim import AUTOCAST_DTYPES, TimmOptimWrapperConstructor
from vitrail.models.mm.parallel import replicate, shard
from vitrail.models.mm.seeding import derive_seed, seed_everything
from vitrail.tools._common.measure import environment
from vitrail.tools._common.table import Row

_CLASSES_SHOWN = 10
_WARM_UP = 4  # replicas settle their buckets in the first three
_WARM_UP_OF_GRAPH = 12  # replicas time their first ten iterations, by events that no graph can hold


@dataclass(frozen=True)
class Settings:
    """What all measurements have in common.

    Attributes:
        device: Of this process.
        batch_size: Images a process in weak scaling, and of all processes together in strong scaling.
        img_size: Height and width; None for each model's own.
        amp: "bf16", "fp16" or None for float32.
        processes: Numbers of processes to compare, ascending.
        sharded: Measure shards as well as replicas.
        sync_bn: Batch norms see all processes' images.
        compile: Compile the models.
        cuda_graph: Measure one process and replicas once more, with the step as a CUDA graph.
        bucket_mb: Size of the pieces in which the gradients of replicas travel.
        steps: Training steps a round.
        rounds: How often all have their turn.
        check_steps: Length of the loss curves; 0 for none.
        check_batch: Images of all processes together in a step of the curves.
        check_float32: Loss curves in float32 besides those in the precision `amp`.
        time_limit: Seconds after which no further round and no further curve begins; None for no limit.
    """

    device: torch.device
    batch_size: int
    img_size: tuple[int, int] | None
    amp: str | None
    processes: tuple[int, ...]
    sharded: bool
    sync_bn: bool
    compile: bool
    cuda_graph: bool
    bucket_mb: float
    steps: int
    rounds: int
    check_steps: int
    check_batch: int
    check_float32: bool
    time_limit: float | None


class Groups:
    """Process groups of the first n processes, and a barrier that keeps waiting GPUs idle."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._by_size = {size: dist.new_group(list(range(size))) for size in sizes}
        self._waiting = dist.new_group(backend="gloo")

    def __getitem__(self, size: int) -> Any:
        return self._by_size[size]

    def wait(self) -> None:
        """Waits for all processes."""
        dist.barrier(self._waiting)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, self._waiting)
        return values


class Results:
    """Rows as they are found; whoever is told of every change keeps them when a run is cut off.

    Attributes:
        speeds: Rows of speed and memory.
        curves: Rows of loss curves.
    """

    def __init__(self, changed: Callable[[list[Row], list[Row]], None]) -> None:
        self.speeds: list[Row] = []
        self.curves: list[Row] = []
        self._changed = changed

    def set_speeds(self, model: str, rows: list[Row]) -> None:
        """Replaces a model's rows of speed: every round makes them surer."""
        self.speeds = [row for row in self.speeds if row["model"] != model] + rows
        self._changed(self.speeds, self.curves)

    def add_curve(self, row: Row) -> None:
        """Adds a row of a loss curve."""
        self.curves.append(row)
        self._changed(self.speeds, self.curves)


@dataclass
class _Job:
    """A model in training on the first processes; on the others there is nothing to do."""

    mode: str
    scaling: str
    processes: int
    batch: int
    launch: str = "eager"
    step: Callable[[], object] | None = None
    peak_memory: int | None = None
    failure: str | None = None

    def facts(self) -> Row:
        return {
            "mode": self.mode, "scaling": self.scaling, "processes": self.processes, "batch_per_process": self.batch,
            "launch": self.launch,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.mode}, {self.processes} x {self.batch} images, {self.launch}"


class _Bench:
    """All measurements of one model."""

    def __init__(
        self, name: str, settings: Settings, groups: Groups, started: float, report: Callable[[str], None]
    ) -> None:
        self.name, self.settings, self.groups, self.started = name, settings, groups, started
        self.report = lambda text: report(f"[{time.perf_counter() - started:6.1f} s] {name}: {text}")
        self.size = _image_size(name, settings)
        seed_everything(0)
        self.template = _build_model(name, self.size, settings.device)
        self.facts = {
            "model": name, **environment(settings.device), "amp": settings.amp, "compiled": settings.compile
        }  # fmt: skip

    def time_is_up(self) -> bool:
        """Whether the limit has passed on the first process; the same answer on all, which call it together."""
        limit = self.settings.time_limit
        return limit is not None and self.groups.gather(time.perf_counter() - self.started > limit)[0]

    def measure_speed(self, results: Results) -> None:
        """Measures every job in turns, and tells the results after every round."""
        jobs = _plan_jobs(self.settings)
        for job in jobs:
            self._prepare_together(job)
        jobs = [job for job in jobs if job.failure is None]
        seconds: list[list[float]] = [[] for _ in jobs]
        for turn in range(self.settings.rounds):
            if turn and self.time_is_up():
                self.report(f"out of time after {turn} of {self.settings.rounds} rounds")
                break
            for job, spent in list(zip(jobs, seconds, strict=True))[:: -1 if turn % 2 else 1]:
                self.groups.wait()
                if job.step is not None:
                    spent.append(_time(job.step, self.settings))
            gathered = self.groups.gather((seconds, [job.peak_memory for job in jobs]))
            results.set_speeds(self.name, [{**self.facts, **row} for row in _speed_rows(jobs, gathered)])
            self.report(f"round {turn + 1} of {self.settings.rounds}")

    def _prepare_together(self, job: _Job) -> None:
        self.groups.wait()
        if dist.get_rank() < job.processes:
            try:
                self._prepare(job)
            except RuntimeError as error:  # of a graph; an eager step that fails would fail in training, too
                if job.launch == "eager":
                    raise
                job.failure = str(error)
        failures = [text for text in self.groups.gather(job.failure) if text is not None]
        if failures:
            job.failure, job.step = failures[0], None
            self.report(f"{job}: left out, {failures[0].splitlines()[0]}")
        else:
            memory = f", {job.peak_memory / 1e9:.2f} GB" if job.peak_memory else ""
            self.report(f"{job}: ready{memory}")

    def _prepare(self, job: _Job) -> None:
        """Builds the training step and takes it through its first iterations, counting memory in the last one."""
        settings = self.settings
        gc.collect()
        images, labels = _make_batch(settings, self.size, job.batch, 0)
        _finish(settings)
        on_gpu = settings.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(settings.device) if on_gpu else 0
        sync_bn = settings.sync_bn and job.processes > 1
        recorded = job.launch == "graph"
        # What a graph holds has to happen in one stream, from the first iteration on.
        stream = torch.cuda.Stream() if recorded else None
        with torch.cuda.stream(stream):
            train = self.build_step(job, settings.amp, sync_bn)
            turns = _WARM_UP_OF_GRAPH if recorded else _WARM_UP
            for turn in range(turns):
                if on_gpu and turn == turns - 1:
                    torch.cuda.reset_peak_memory_stats(settings.device)
                train(images, labels)
        _finish(settings)
        job.peak_memory = torch.cuda.max_memory_allocated(settings.device) - before if on_gpu else None
        job.step = lambda: train(images, labels)
        if stream is not None:
            job.step = _record(job.step, stream)

    def build_step(self, job: _Job, amp: str | None, sync_bn: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """A training step as `vitrail.tools.train` does it: forward, loss, backward, AdamW; returns the loss."""
        settings = self.settings
        seed_everything(0)
        model: nn.Module = copy.deepcopy(self.template)
        if settings.compile:
            model.backbone.compile()
        if job.mode == "replicas":
            model = replicate(
                model, settings.device, process_group=self.groups[job.processes], sync_bn=sync_bn,
                static_graph=not settings.compile, bucket_cap_mb=settings.bucket_mb,
            )  # fmt: skip
        elif job.mode == "shards":
            precision = AUTOCAST_DTYPES[amp] if amp else None
            group = self.groups[job.processes]
            model = shard(model, settings.device, process_group=group, precision=precision, sync_bn=sync_bn)
        optimizer: Row = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}
        if job.launch == "graph":
            return _graph_step(model, {**optimizer, "capturable": True}, amp, settings.device)
        return _train_step(model, optimizer, amp, settings.device)

    def compare_losses(self, results: Results) -> None:
        """Loss curves on the same global batches; batch norms see all processes' images, or they would differ."""
        amp = self.settings.amp
        for precision in (None, amp) if amp and self.settings.check_float32 else (amp,):
            expected: list[float] = []
            for job in _plan_curves(self.settings):
                if self.time_is_up():
                    self.report("out of time for further loss curves")
                    return
                losses = self._loss_curve(job, precision)
                expected = expected or losses
                deviation = max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True))
                name = precision or "float32"
                row = {"precision": name, "first": losses[0], "last": losses[-1], "deviation": deviation}
                results.add_curve({**self.facts, **job.facts(), **row, "losses": losses})
                self.report(f"{job}, {name}: losses deviate by {deviation:.1e}")

    def _loss_curve(self, job: _Job, amp: str | None) -> list[float]:
        """Mean loss of all processes in every step; the same list on every process, members or not."""
        self.groups.wait()
        rank, losses = dist.get_rank(), []
        if rank < job.processes:
            train = self.build_step(job, amp, sync_bn=job.processes > 1)
            for step in range(self.settings.check_steps):
                images, labels = _make_batch(self.settings, self.size, job.batch * job.processes, step)
                losses.append(train(images[rank :: job.processes], labels[rank :: job.processes]).detach())
        members = self.groups.gather([float(loss) for loss in losses])[: job.processes]
        return [statistics.fmean(values) for values in zip(*members, strict=True)]


def bench_scaling(names: Sequence[str], settings: Settings, report: Callable[[str], None], results: Results) -> None:
    """Measures models in alternation over numbers of processes. All processes call it together.

    Args:
        names: Entry points of timm or of this package.
        settings: What all have in common.
        report: Called with one line on what happens now.
        results: Takes rows of speed and memory, and rows of loss curves; the same on every process.
    """
    started = time.perf_counter()
    report(f"{dist.get_world_size()} processes on {settings.device.type}")
    groups = Groups(sorted({1, *settings.processes}))
    for name in names:
        bench = _Bench(name, settings, groups, started, report)
        bench.measure_speed(results)
        if settings.check_steps:
            bench.compare_losses(results)


def _plan_jobs(settings: Settings) -> list[_Job]:
    """One process first: the others' efficiency refers to it."""
    batch, jobs = settings.batch_size, []
    for launch in ("eager", "graph") if settings.cuda_graph else ("eager",):
        jobs.append(_Job("one process", "-", 1, batch, launch))
        for count in settings.processes:
            if count > 1:
                jobs.append(_Job("replicas", "weak", count, batch, launch))
                if settings.sharded and launch == "eager":
                    jobs.append(_Job("shards", "weak", count, batch))
                if batch % count == 0:
                    jobs.append(_Job("replicas", "strong", count, batch // count, launch))
    return jobs


def _plan_curves(settings: Settings) -> list[_Job]:
    several = [
        _Job(mode, "loss", count, settings.check_batch // count)
        for count in settings.processes
        if count > 1 and settings.check_batch % count == 0
        for mode in (["replicas", "shards"] if settings.sharded else ["replicas"])
    ]
    return [_Job("one process", "loss", 1, settings.check_batch), *several]


def _time(step: Callable[[], object], settings: Settings) -> float:
    """Seconds of a step, over a round of them."""
    step()  # brings the processes of a group in line
    _finish(settings)
    start = time.perf_counter()
    for _ in range(settings.steps):
        step()
    _finish(settings)
    return (time.perf_counter() - start) / settings.steps


def _finish(settings: Settings) -> None:
    if settings.device.type == "cuda":
        torch.cuda.synchronize(settings.device)


def _speed_rows(jobs: Sequence[_Job], gathered: Sequence[Any]) -> list[Row]:
    """The slowest process of every round counts, and the median round."""
    rows = []
    for index, job in enumerate(jobs):
        members = gathered[: job.processes]
        slowest = [max(times) for times in zip(*(seconds[index] for seconds, _ in members), strict=True)]
        median = statistics.median(slowest)
        peaks = [memory[index] for _, memory in members]
        rows.append({
            **job.facts(),
            "images_per_s": job.batch * job.processes / median,
            "step_ms": median * 1e3,
            "step_ms_fastest": min(slowest) * 1e3,
            "step_ms_slowest": max(slowest) * 1e3,
            "rounds": len(slowest),
            "peak_memory_bytes": None if peaks[0] is None else max(peaks),
        })  # fmt: skip
    alone = {row["launch"]: row["images_per_s"] for row in rows if row["processes"] == 1}
    for row in rows:
        reference = alone.get(row["launch"])
        row["efficiency"] = row["images_per_s"] / (reference * row["processes"]) if reference else None
    return rows


def _build_model(name: str, size: tuple[int, int], device: torch.device) -> TimmClassifier:
    model = TimmClassifier({"name": name})
    if hasattr(model.backbone, "set_input_size"):
        model.backbone.set_input_size(img_size=size)
    return model.to(device).train()


def _train_step(
    model: nn.Module, optimizer: Row, amp: str | None, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    wrapper: Row = {"optimizer": optimizer}
    if amp:
        wrapper |= {"type": "AutocastOptimWrapper", "precision": amp, "device_type": device.type}
    optim_wrapper = TimmOptimWrapperConstructor(wrapper)(model)
    nothing = torch.zeros(0, dtype=torch.long, device=device)

    def train(images: Tensor, labels: Tensor) -> Tensor:
        batch = {"images": images, "labels": labels, "indices": nothing, "unreadable": nothing}
        return model.train_step(batch, optim_wrapper)["loss"]

    return train


def _graph_step(
    model: nn.Module, optimizer: Row, amp: str | None, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """The same arithmetic without the host's look at the loss, which a graph cannot hold."""
    adamw = TimmOptimWrapperConstructor({"optimizer": optimizer}).build_optimizer(model)
    nothing = torch.zeros(0, dtype=torch.long, device=device)

    def train(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, AUTOCAST_DTYPES.get(amp or ""), enabled=amp is not None):
            loss = model(images, labels, nothing, nothing, mode="loss")["loss_cls"]
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        return loss

    return train


def _record(step: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: NCCL's own watches over earlier collectives by calls that are forbidden meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()

    def replay(kept: Callable[[], object] = step) -> None:  # a graph reads the step's tensors by address
        graph.replay()

    return replay


def _image_size(name: str, settings: Settings) -> tuple[int, int]:
    import timm

    if settings.img_size:
        return settings.img_size
    height, width = timm.get_pretrained_cfg(name).input_size[1:]
    return height, width


def _make_batch(settings: Settings, size: tuple[int, int], batch: int, step: int) -> tuple[Tensor, Tensor]:
    """Noise over a pattern for each class, so that there is something to learn."""
    generator = torch.Generator(settings.device).manual_seed(derive_seed("patterns"))
    options: Row = {"generator": generator, "device": settings.device}
    patterns = torch.randn(_CLASSES_SHOWN, 3, *size, **options)
    generator.manual_seed(derive_seed("batch", step))
    labels = torch.randint(_CLASSES_SHOWN, (batch,), **options)
    return patterns[labels] + torch.randn(batch, 3, *size, **options), labels
