"""Measures models: throughput, latency, memory, parameters, multiplications."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.tools._common.cli import ToolError, UsageError, unknown_name
from vitrail.tools._common.measure import Timed, Timing, capture_graph, environment, measure_in_turns
from vitrail.tools._common.table import Row

PRECISIONS = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "amp-bf16": torch.float32,
}


@dataclass(frozen=True)
class Settings:
    """What all models of a run have in common."""

    device: torch.device
    batch_size: int
    img_size: tuple[int, int] | None
    precision: str
    channels_last: bool
    train: bool
    compile: bool
    cuda_graph: bool
    min_time: float


@dataclass(frozen=True)
class _Candidate:
    """A model that stands ready, its facts, and one step of work on it."""

    facts: Row
    step: Callable[[], object]


def resolve(name: str) -> tuple[str, str]:
    """Splits "timm/NAME", "accelerated/NAME" or "NAME" into where a model comes from and its entry point.

    It comes from "timm", from "vitrail", or is timm's with `vitrail.accelerate` applied ("accelerated").

    Raises:
        UsageError: There is no such model; the message names the nearest ones.
    """
    ours = set(vitrail.list_models())
    source, _, plain = name.rpartition("/")
    if source not in ("", "timm", "accelerated"):
        raise UsageError(f"model is {name!r}; allowed: NAME, timm/NAME or accelerated/NAME")
    known = set(timm.list_models()) - (ours if source else set())
    if plain.split(".")[0] not in known:
        raise unknown_name("model", name, [f"{source}/{n}" for n in known] if source else known)
    return source or ("vitrail" if plain in ours else "timm"), plain


def bench_models(names: Sequence[str], reference: str, settings: Settings, report: Callable[[str], None]) -> list[Row]:
    """Measures models in alternation.

    Args:
        names: As `resolve` takes them; each is measured once.
        reference: The one of `names` to which the others' speed is compared.
        settings: What all have in common.
        report: Called with one line on what happens now.

    Raises:
        UsageError: A name is unknown.
        ToolError: A model cannot run at the chosen size or precision.
    """
    for name in names:
        resolve(name)
    candidates = []
    for name in dict.fromkeys(names):
        for compiled in (False, True) if settings.compile else (False,):
            report(f"preparing {name}{' (compiled)' if compiled else ''}")
            candidates.append(_prepare(name, compiled, settings))
    report(f"measuring {len(candidates)} models in turns")
    with _grad_mode(settings):
        timings = measure_in_turns([_timed(c, settings) for c in candidates], settings.device, settings.min_time)
    base = timings[next(i for i, c in enumerate(candidates) if c.facts["model"] == reference)]
    facts = environment(settings.device)
    return [
        {**candidate.facts, **_figures(timing, base, settings), "reference": reference, **facts}
        for candidate, timing in zip(candidates, timings, strict=True)
    ]


def _prepare(name: str, compiled: bool, settings: Settings) -> _Candidate:
    """Builds a model, counts it, runs one step of it, compiles it if asked, and measures its memory."""
    on_gpu = settings.device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated(settings.device) if on_gpu else 0
    source, entry_point = resolve(name)
    model, size = _build(source, entry_point, settings)
    facts: Row = {
        "model": name,
        "source": source,
        "variant": "compiled" if compiled else "eager",
        "mode": "train" if settings.train else "infer",
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "height": size[1],
        "width": size[2],
        "channels_last": settings.channels_last,
        "cuda_graph": settings.cuda_graph,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    try:
        facts["flops"] = _count_flops(model, size, settings)
        step = _make_step(model, size, compiled, settings)
        with _grad_mode(settings):
            step()
            if on_gpu:
                torch.cuda.synchronize(settings.device)
                torch.cuda.reset_peak_memory_stats(settings.device)
            step()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        shape = f"{settings.batch_size}x{'x'.join(map(str, size))}"
        raise ToolError(f"{name} cannot run on a {shape} {settings.precision} input: {error}") from error
    # Of the CPU's memory PyTorch keeps no count.
    facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(settings.device) - before if on_gpu else None
    return _Candidate(facts, step)


def _build(source: str, entry_point: str, settings: Settings) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model with random weights in the dtype, layout and mode asked for, and its (channels, height, width)."""
    model = timm.create_model(entry_point)
    channels, *default = model.default_cfg["input_size"]
    size = settings.img_size or (default[0], default[1])
    if list(size) != default and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    model = model.to(settings.device, PRECISIONS[settings.precision]).train(settings.train)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if source == "accelerated" and not vitrail.accelerate(model).replaced:
        raise UsageError(f"accelerated/{entry_point}: vitrail.accelerate replaces nothing in this model")
    return model, (channels, *size)


def _make_step(
    model: nn.Module, size: tuple[int, int, int], compiled: bool, settings: Settings
) -> Callable[[], object]:
    """One step: a forward pass, or with `train` forward, cross-entropy and backward (without an optimiser)."""
    image = torch.randn(settings.batch_size, *size, device=settings.device, dtype=PRECISIONS[settings.precision])
    if settings.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    run = torch.compile(model, dynamic=False) if compiled else model
    parameters = list(model.parameters())
    label = torch.zeros(settings.batch_size, dtype=torch.long, device=settings.device)

    def infer() -> Tensor:
        with _autocast(settings):
            return run(image)

    def train() -> tuple[Tensor | None, ...]:
        with _autocast(settings):
            loss = F.cross_entropy(run(image).float(), label)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return train if settings.train else infer


def _timed(candidate: _Candidate, settings: Settings) -> Timed:
    return capture_graph([candidate.step]) if settings.cuda_graph else Timed(candidate.step)


def _autocast(settings: Settings) -> AbstractContextManager[Any]:
    if settings.precision != "amp-bf16":
        return nullcontext()
    # Cached casts of weights would be freed behind a CUDA graph's back.
    return torch.autocast(settings.device.type, torch.bfloat16, cache_enabled=not settings.cuda_graph)


@contextmanager
def _grad_mode(settings: Settings) -> Iterator[None]:
    # One process compiles many models: each is a recompilation of code that they share.
    with torch._dynamo.config.patch(recompile_limit=256), torch.set_grad_enabled(settings.train):
        yield


@torch.no_grad()
def _count_flops(model: nn.Module, size: tuple[int, int, int], settings: Settings) -> int:
    """Floating-point operations of one image's forward pass, two for each multiply-add.

    PyTorch counts attention only where it has a formula for the kernel; in terms of matrix products it always does.
    """
    training = model.training
    image = torch.randn(1, *size, device=settings.device, dtype=PRECISIONS[settings.precision])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops()


def _figures(timing: Timing, base: Timing, settings: Settings) -> Row:
    median = timing.percentile(50)
    return {
        "images_per_s": settings.batch_size / median,
        "latency_p20_ms": timing.percentile(20) * 1e3,
        "latency_p50_ms": median * 1e3,
        "latency_p80_ms": timing.percentile(80) * 1e3,
        "calls": sum(map(len, timing.chunks)),
        "speed_ratio": timing.speed_against(base),
    }
