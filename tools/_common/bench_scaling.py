"""Measures how training speeds up with the number of processes, and that it stays the same training."""

from __future__ import annotations

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
_WARM_UP = 3


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
        steps: Training steps a round.
        rounds: How often all have their turn.
        check_steps: Length of the loss curves; 0 for none.
        check_batch: Images of all processes together in a step of the curves.
    """

    device: torch.device
    batch_size: int
    img_size: tuple[int, int] | None
    amp: str | None
    processes: tuple[int, ...]
    sharded: bool
    sync_bn: bool
    compile: bool
    steps: int
    rounds: int
    check_steps: int
    check_batch: int


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


@dataclass
class _Job:
    """A model in training on the first processes; on the others there is nothing to do."""

    mode: str
    scaling: str
    processes: int
    batch: int
    step: Callable[[], Tensor] | None = None
    peak_memory: int | None = None

    def facts(self) -> Row:
        return {
            "mode": self.mode, "scaling": self.scaling, "processes": self.processes, "batch_per_process": self.batch
        }  # fmt: skip


def bench_scaling(
    names: Sequence[str], settings: Settings, report: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Measures models in alternation over numbers of processes. All processes call it together.

    Args:
        names: Entry points of timm or of this package.
        settings: What all have in common.
        report: Called with one line on what happens now.

    Returns:
        Rows of speed and memory, and rows of loss curves; the same on every process.
    """
    groups = Groups(sorted({1, *settings.processes}))
    speeds, curves = [], []
    facts = {**environment(settings.device), "amp": settings.amp, "compiled": settings.compile}
    for name in names:
        speeds += [{"model": name, **row, **facts} for row in _measure_speed(name, settings, groups, report)]
        if settings.check_steps:
            curves += [{"model": name, **row, **facts} for row in _compare_losses(name, settings, groups, report)]
    return speeds, curves


def _plan_jobs(settings: Settings) -> list[_Job]:
    """One process first: the others' efficiency refers to it."""
    jobs = [_Job("one process", "-", 1, settings.batch_size)]
    for count in settings.processes:
        if count > 1:
            jobs.append(_Job("replicas", "weak", count, settings.batch_size))
            if settings.sharded:
                jobs.append(_Job("shards", "weak", count, settings.batch_size))
            if settings.batch_size % count == 0:
                jobs.append(_Job("replicas", "strong", count, settings.batch_size // count))
    return jobs


def _measure_speed(name: str, settings: Settings, groups: Groups, report: Callable[[str], None]) -> list[Row]:
    jobs = _plan_jobs(settings)
    for job in jobs:
        report(f"{name}: preparing {job.mode}, {job.processes} x {job.batch} images")
        groups.wait()
        if dist.get_rank() < job.processes:
            _prepare(job, name, settings, groups)
    report(f"{name}: measuring {len(jobs)} settings in turns")
    seconds: list[list[float]] = [[] for _ in jobs]
    for turn in range(settings.rounds):
        for job, spent in list(zip(jobs, seconds, strict=True))[:: -1 if turn % 2 else 1]:
            groups.wait()
            if job.step is not None:
                spent.append(_time(job.step, settings))
    gathered = groups.gather((seconds, [job.peak_memory for job in jobs]))
    rows = [_speed_row(job, i, gathered) for i, job in enumerate(jobs)]
    for row in rows:
        row["efficiency"] = row["images_per_s"] / (rows[0]["images_per_s"] * row["processes"])
    return rows


def _prepare(job: _Job, name: str, settings: Settings, groups: Groups) -> None:
    """Builds the training step and takes it through its first iterations, counting memory in the later ones."""
    gc.collect()
    on_gpu = settings.device.type == "cuda"
    before = torch.cuda.memory_allocated(settings.device) if on_gpu else 0
    sync_bn = settings.sync_bn and job.processes > 1
    train = _build_step(job, name, settings, groups, settings.amp, sync_bn)
    images, labels = _make_batch(settings, _image_size(name, settings), job.batch, 0)
    job.step = lambda: train(images, labels)
    for turn in range(_WARM_UP):
        if on_gpu and turn == 1:
            torch.cuda.reset_peak_memory_stats(settings.device)
        job.step()
    job.peak_memory = torch.cuda.max_memory_allocated(settings.device) - before if on_gpu else None


def _time(step: Callable[[], Tensor], settings: Settings) -> float:
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


def _speed_row(job: _Job, index: int, gathered: Sequence[Any]) -> Row:
    """The slowest process of every round counts, and the median round."""
    members = gathered[: job.processes]
    slowest = [max(times) for times in zip(*(seconds[index] for seconds, _ in members), strict=True)]
    median = statistics.median(slowest)
    peaks = [memory[index] for _, memory in members]
    return {
        **job.facts(),
        "images_per_s": job.batch * job.processes / median,
        "step_ms": median * 1e3,
        "step_ms_fastest": min(slowest) * 1e3,
        "step_ms_slowest": max(slowest) * 1e3,
        "peak_memory_bytes": None if peaks[0] is None else max(peaks),
    }


def _build_step(
    job: _Job, name: str, settings: Settings, groups: Groups, amp: str | None, sync_bn: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """A training step as `vitrail.tools.train` does it: forward, loss, backward, AdamW."""
    seed_everything(0)
    model: nn.Module = TimmClassifier({"name": name})
    height, width = _image_size(name, settings)
    if hasattr(model.backbone, "set_input_size"):
        model.backbone.set_input_size(img_size=(height, width))
    model = model.to(settings.device).train()
    if settings.compile:
        model.backbone.compile()
    if job.mode == "replicas":
        group = groups[job.processes]
        model = replicate(model, settings.device, process_group=group, sync_bn=sync_bn, static_graph=True)
    elif job.mode == "shards":
        precision = AUTOCAST_DTYPES[amp] if amp else None
        group = groups[job.processes]
        model = shard(model, settings.device, process_group=group, precision=precision, sync_bn=sync_bn)
    wrapper: Row = {"optimizer": {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}}
    if amp:
        wrapper |= {"type": "AutocastOptimWrapper", "precision": amp, "device_type": settings.device.type}
    optimizer = TimmOptimWrapperConstructor(wrapper)(model)
    nothing = torch.zeros(0, dtype=torch.long, device=settings.device)

    def train(images: Tensor, labels: Tensor) -> Tensor:
        batch = {"images": images, "labels": labels, "indices": nothing, "unreadable": nothing}
        return model.train_step(batch, optimizer)["loss"]

    return train


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


def _compare_losses(name: str, settings: Settings, groups: Groups, report: Callable[[str], None]) -> list[Row]:
    """Loss curves on the same global batches; batch norms see all processes' images, or they would differ."""
    rows = []
    for amp in dict.fromkeys([None, settings.amp]):
        alone = _Job("one process", "loss", 1, settings.check_batch)
        several = [
            _Job(mode, "loss", count, settings.check_batch // count)
            for count in settings.processes
            if count > 1 and settings.check_batch % count == 0
            for mode in (["replicas", "shards"] if settings.sharded else ["replicas"])
        ]
        expected: list[float] = []
        for job in [alone, *several]:
            report(f"{name}: loss curve of {job.mode}, {job.processes} x {job.batch} images, {amp or 'float32'}")
            losses = _loss_curve(job, name, settings, groups, amp)
            expected = expected or losses
            deviation = max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True))
            facts = {**job.facts(), "precision": amp or "float32"}
            rows.append({**facts, "first": losses[0], "last": losses[-1], "deviation": deviation, "losses": losses})
    return rows


def _loss_curve(job: _Job, name: str, settings: Settings, groups: Groups, amp: str | None) -> list[float]:
    """Mean loss of all processes in every step; the same list on every process, members or not."""
    groups.wait()
    rank, losses = dist.get_rank(), []
    if rank < job.processes:
        train = _build_step(job, name, settings, groups, amp, sync_bn=job.processes > 1)
        size = _image_size(name, settings)
        for step in range(settings.check_steps):
            images, labels = _make_batch(settings, size, job.batch * job.processes, step)
            losses.append(float(train(images[rank :: job.processes], labels[rank :: job.processes]).detach()))
    members = groups.gather(losses)[: job.processes]
    return [statistics.fmean(values) for values in zip(*members, strict=True)]
