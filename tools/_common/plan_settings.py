"""Compares the settings in which a model can train on many GPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import timm
from torch import nn

from vitrail.tools._common.plan_links import Cluster, Traffic, replicas_traffic, shards_traffic
from vitrail.tools._common.plan_memory import PARTS, Setting, StepMemory, build_model, find_units, measure_step
from vitrail.tools._common.table import Row

_BUCKET = 25 * 2**20  # of `vitrail.models.mm.parallel.replicate`
_CLOSE = 0.02  # how near the largest batch is sought


@dataclass(frozen=True)
class Limits:
    """Of one GPU.

    Attributes:
        memory: Bytes that PyTorch's allocator can have.
        flops: Floating-point operations a second, at most.
        images_per_s: Measured training speed, if known.
    """

    memory: float
    flops: float
    images_per_s: float | None = None


def plan_model(
    name: str,
    cluster: Cluster,
    limits: Limits,
    batch: int,
    size: tuple[int, int] | None = None,
    amp: str | None = None,
    sharded: bool = False,
    checkpointing: bool = False,
    search: bool = True,
) -> list[Row]:
    """One row for every setting: replicas and shards, without and with checkpointing.

    Args:
        name: An entry point of timm or of this package.
        cluster: The GPUs.
        limits: Of each of them.
        batch: Images a step on all GPUs together.
        size: Height and width; None for the model's own.
        amp: "bf16", "fp16" or None for float32.
        sharded: Only shards.
        checkpointing: Only with checkpointing.
        search: Look for every setting's largest batch; else only where no setting holds the one asked for.
    """
    size = size or tuple(timm.get_pretrained_cfg(name).input_size[1:])
    modes = ["single"] if cluster.gpus == 1 else ["shards"] if sharded else ["replicas", "shards"]
    model = build_model(name, size).to("meta")
    settings = [
        Setting(batch // cluster.gpus, size, amp, mode, cluster.gpus, recompute)
        for recompute in ((True,) if checkpointing else (False, True))
        for mode in modes
    ]
    rows = [{"model": name, **_plan_setting(model, setting, cluster, limits)} for setting in settings]
    if search or not any(row["fits"] for row in rows):
        for row, setting in zip(rows, settings, strict=True):
            row["largest_batch"] = _search_batch(model, setting, row["reserved_bytes"], limits)
    return rows


def recommend(rows: Sequence[Row]) -> str:
    """Which of a model's rows to use, in words: the first that fits, or the one that fits with the fewest parts.

    Replicas come before shards, which send more, and both before checkpointing, which computes more.
    """
    fitting = [row for row in rows if row["fits"]]
    if fitting:
        row = fitting[0]
        return f"train with {row['setting']}, {row['batch_per_gpu']} images a GPU; {_describe_traffic(row)}"
    row = max(rows, key=lambda row: row["largest_batch"])
    if not row["largest_batch"]:
        return "not even one image a GPU fits; take smaller images or GPUs with more memory"
    wanted = row["batch_per_gpu"]
    parts = next(n for n in range(1, wanted + 1) if wanted % n == 0 and wanted // n <= row["largest_batch"])
    return (
        f"no setting holds {wanted} images a GPU; train with {row['setting']} and accumulate the gradients of {parts} "
        f"times {wanted // parts}; {_describe_traffic(row)}"
    )


def _describe_traffic(row: Row) -> str:
    if row["gpus"] == 1:
        return "nothing is sent"
    sending, arithmetic = row["communication_ms"], row["arithmetic_ms"]
    # Two thirds of the arithmetic are the backward pass, behind which gradients travel.
    hidden = "it can hide behind" if sending <= arithmetic * 2 / 3 else "more than can surely hide behind"
    return (
        f"sending takes at least {sending:.2f} ms, {hidden} the backward pass of at least {arithmetic * 2 / 3:.2f} ms"
    )


def _find_traffic(model: nn.Module, setting: Setting, cluster: Cluster) -> Traffic:
    if setting.mode == "single":
        return Traffic(0.0, 0.0, 0)
    if setting.mode == "replicas":
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return replicas_traffic(gradients, _BUCKET, cluster)
    return shards_traffic(find_units(model, setting.amp), 4, cluster)  # gradients are reduced in float32


def _measure(model: nn.Module, setting: Setting) -> StepMemory:
    trained = copy.deepcopy(model)
    trained.set_grad_checkpointing(setting.checkpointing)
    return measure_step(trained, setting)


def _search_batch(model: nn.Module, setting: Setting, reserved: int, limits: Limits) -> int:
    def measure(batch: int) -> int:
        return _measure(model, replace(setting, batch=batch)).reserved

    return find_largest_batch({setting.batch: reserved}, measure, limits.memory)


def _plan_setting(model: nn.Module, setting: Setting, cluster: Cluster, limits: Limits) -> Row:
    traffic = _find_traffic(model, setting, cluster)
    found = _measure(model, setting)
    arithmetic = found.flops / limits.flops
    sending = traffic.seconds(cluster)
    return {
        "setting": {"single": "one GPU"}.get(setting.mode, setting.mode)
        + (", checkpointing" if setting.checkpointing else ""),
        "mode": setting.mode,
        "checkpointing": setting.checkpointing,
        "img_size": list(setting.size),
        "amp": setting.amp,
        "gpus": cluster.gpus,
        "gpus_per_host": cluster.per_host,
        "link_bytes_per_s": [cluster.inside, cluster.between],
        "memory_bytes": limits.memory,
        "batch_per_gpu": setting.batch,
        "peak_bytes": found.peak,
        "reserved_bytes": found.reserved,
        "parts": {part: found.parts.get(part, 0) for part in PARTS},
        "fits": found.reserved <= limits.memory,
        "largest_batch": None,
        "sent": traffic.inside + traffic.between,
        "sent_inside_bytes": traffic.inside,
        "sent_between_bytes": traffic.between,
        "collectives": traffic.collectives,
        "communication_ms": sending * 1e3,
        "arithmetic_ms": arithmetic * 1e3,
        "flops": found.flops,
        "efficiency": _bound_efficiency(setting, sending, limits),
    }


def find_largest_batch(known: dict[int, int], measure: Callable[[int], int], memory: float) -> int:
    """The largest number of images whose step fits into memory, to 2 %; 0 if not even one does.

    Args:
        known: Bytes by number of images, one entry or more; what is measured is added.
        measure: Bytes for a number of images.
        memory: Bytes that there are.
    """
    while True:
        fitting = max((n for n, nbytes in known.items() if nbytes <= memory), default=0)
        beyond = min((n for n, nbytes in known.items() if nbytes > memory), default=None)
        guess = _guess_batch(known, fitting, beyond, memory)
        is_close = known.get(fitting, 0) >= memory * (1 - _CLOSE)
        if is_close or (beyond is not None and guess <= fitting * (1 + _CLOSE)):
            return fitting
        known[guess] = measure(guess)


def _guess_batch(known: dict[int, int], fitting: int, beyond: int | None, memory: float) -> int:
    """Where the line through two known numbers meets the memory: those around it, or the two largest."""
    if beyond is None:
        before = max((n for n in known if n < fitting), default=0)
        per_image = (known[fitting] - known.get(before, 0)) / (fitting - before)
        guess = fitting + (memory - known[fitting]) / max(per_image, 1)
        return int(min(max(guess, fitting * (1 + _CLOSE) + 1), 8 * fitting))
    low = known.get(fitting, 0)
    guess = int(fitting + (memory - low) * (beyond - fitting) / (known[beyond] - low))
    return min(guess, beyond - 1)


def _bound_efficiency(setting: Setting, sending: float, limits: Limits) -> tuple[float, float] | None:
    """Speed against that of as many single GPUs: with nothing hidden, and with all hidden that can be."""
    if limits.images_per_s is None:
        return None
    step = setting.batch / limits.images_per_s
    return step / (step + sending), step / max(step, sending)
