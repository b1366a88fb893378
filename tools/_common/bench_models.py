"""Measures models: throughput, latency, memory, parameters, multiplications."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.tools._common.cli import ToolError, UsageError, unknown_name
from vitrail.tools._common.measure import Timed, Timing, capture_graph, environment, measure_in_turns, never
from vitrail.tools._common.table import Row

Report = Callable[[str], None]

PRECISIONS = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "amp-bf16": torch.float32,
}


# What `--models` compares: one model of every family, BiFormer's three, and what timm has of the same size.
SUITE = (
    "timm/swin_tiny_patch4_window7_224",
    "davit_t",
    "timm/davit_tiny",
    "biformer_s",
    "biformer_t",
    "biformer_b",
    "accelerated/swin_tiny_patch4_window7_224",
    "accelerated/davit_tiny",
    "nat_mini",
    "l2vit_t",
    "rmt_t",
    "vsa_swin_t",
    "dinat_mini",
    "gated_swinrmt_retention",
    "resnet50_ela_t",
)


class Variant(NamedTuple):
    """How a model runs: under `torch.compile`, as a CUDA graph, both or neither."""

    compiled: bool = False
    graph: bool = False

    def __str__(self) -> str:
        return ", ".join(["compiled"] * self.compiled + ["CUDA graph"] * self.graph) or "eager"


@dataclass(frozen=True)
class Settings:
    """What all models of a run have in common."""

    device: torch.device
    batch_size: int
    img_size: tuple[int, int] | None
    precision: str
    channels_last: bool
    train: bool
    min_time: float
    variants: tuple[Variant, ...] = (Variant(),)


@dataclass(eq=False)
class _Candidate:
    """A model in one variant: its facts and, if it could be prepared, one step of work on it, else the error."""

    facts: Row
    timed: Timed | None = None
    error: Exception | None = None

    @property
    def variant(self) -> Variant:
        return Variant(self.facts["variant"] == "compiled", self.facts["cuda_graph"])


class _Base(NamedTuple):
    """What the others are compared to: its name and candidates."""

    name: str
    candidates: list[_Candidate]


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


def bench_models(names: Sequence[str], reference: str, settings: Settings, report: Report) -> list[Row]:
    """Measures models, all in alternation.

    Args:
        names: As `resolve` takes them; each is measured once.
        reference: The one of `names` to which the others' speed is compared, in the same variant.
        settings: What all have in common.
        report: Called with one line on what happens now.

    Raises:
        UsageError: A name is unknown.
        ToolError: A model cannot run at the chosen size or precision.
    """
    for name in names:
        resolve(name)
    pool = _graph_pool(settings)
    candidates = []
    for name in dict.fromkeys(names):
        for found in _prepare(name, settings, pool, report):
            if found.error:
                raise found.error
            candidates.append(found)
    report(f"measuring {len(candidates)} models in turns")
    base = _Base(reference, [c for c in candidates if c.facts["model"] == reference])
    return _measure(candidates, base, settings)


def bench_suite(
    names: Sequence[str],
    reference: str,
    settings: Settings,
    report: Report,
    done: Callable[[list[Row]], None],
    late: Callable[[], bool] = never,
) -> None:
    """Measures models one by one, each in alternation with the reference, so that results come as they are ready.

    All models at once would not fit into a GPU's memory. What fails has a row without times that says so.

    Args:
        names: As `resolve` takes them; each is measured once.
        reference: To which the others' speed is compared, in the same variant.
        settings: What all have in common.
        report: Called with one line on what happens now.
        done: Called with the rows of a model as soon as they are there.
        late: Tells whether it is so late that nothing shall be compiled any more.

    Raises:
        UsageError: A name is unknown.
    """
    for name in (reference, *names):
        resolve(name)
    pool = _graph_pool(settings)
    base = _Base(reference, _prepare(reference, settings, pool, report, late))
    for name in dict.fromkeys(names):
        found = base.candidates if name == reference else _prepare(name, settings, pool, report, late)
        report(f"measuring {name}")
        done(_measure(found, base, settings))


def _graph_pool(settings: Settings) -> Any:
    """Memory that all CUDA graphs of a run share: they never run at the same time."""
    return torch.cuda.graph_pool_handle() if settings.device.type == "cuda" else None


def _prepare(
    name: str, settings: Settings, pool: Any, report: Report, late: Callable[[], bool] = never
) -> list[_Candidate]:
    """A model in all variants, the uncompiled first, each ready or with a note why it is not."""
    candidates: list[_Candidate] = []
    for compiled in dict.fromkeys(variant.compiled for variant in settings.variants):
        variants = [variant for variant in settings.variants if variant.compiled == compiled]
        report(f"{'compiling' if compiled else 'preparing'} {name}, {_mode(settings)}")
        gc.collect()
        if compiled and late():
            facts = {**candidates[0].facts, "peak_memory_bytes": None, "note": "skipped: time limit"}
            candidates += [_Candidate({**facts, **_variant_facts(variant)}) for variant in variants]
        else:
            candidates += _prepare_step(name, variants, settings, pool)
    return candidates


def _prepare_step(name: str, variants: Sequence[Variant], settings: Settings, pool: Any) -> list[_Candidate]:
    """Builds a model, counts it, runs one step of it, measures its memory, and makes of the step what is asked for."""
    on_gpu = settings.device.type == "cuda"
    before = torch.cuda.memory_allocated(settings.device) if on_gpu else 0
    source, entry_point = resolve(name)
    model, size = _build(source, entry_point, settings)
    facts = _facts_of(name, source, model, size, settings)
    candidates = [_Candidate({**facts, **_variant_facts(variant)}) for variant in variants]
    try:
        flops = _count_flops(model, size, settings)
        step = _make_step(model, size, variants[0].compiled, settings)
        with _grad_mode(settings):
            memory = _peak_memory(step, settings.device, before)
            for candidate, variant in zip(candidates, variants, strict=True):
                candidate.facts |= {"flops": flops, "peak_memory_bytes": memory}
                candidate.timed = capture_graph([step], pool) if variant.graph else Timed(step)
    except Exception as error:
        shape = f"{settings.batch_size}x{'x'.join(map(str, size))}"
        for candidate in candidates:
            if candidate.timed is None:
                _blame(candidate, error, f"{name} cannot run on a {shape} {settings.precision} input")
    return candidates


def _blame(candidate: _Candidate, error: Exception, text: str) -> None:
    """Notes why a candidate has no figures; what a wrong size or precision may bring about is an expected error."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    candidate.facts["note"] = "out of memory" if out_of_memory else f"failed: {type(error).__name__}: {first_line}"
    candidate.error = error
    if isinstance(error, (RuntimeError, AssertionError, ValueError)) and not out_of_memory:
        candidate.error = ToolError(f"{text}: {error}")
        candidate.error.__cause__ = error


def _facts_of(name: str, source: str, model: nn.Module, size: tuple[int, int, int], settings: Settings) -> Row:
    return {
        "model": name,
        "source": source,
        "mode": _mode(settings),
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "height": size[1],
        "width": size[2],
        "channels_last": settings.channels_last,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": None,
        "peak_memory_bytes": None,
        "note": None,
    }


def _variant_facts(variant: Variant) -> Row:
    return {"variant": "compiled" if variant.compiled else "eager", "cuda_graph": variant.graph}


def _mode(settings: Settings) -> str:
    return "train" if settings.train else "infer"


def _peak_memory(step: Callable[[], object], device: torch.device, before: int) -> int | None:
    """Runs a step twice; the bytes that the second allocates at most, over `before`. PyTorch counts those of GPUs."""
    step()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _measure(candidates: Sequence[_Candidate], base: _Base, settings: Settings) -> list[Row]:
    """Times candidates and the base in turns; the rows of the candidates."""
    ready = {id(c): c.timed for c in (*candidates, *base.candidates) if c.timed is not None}
    with _grad_mode(settings):
        timings = measure_in_turns(list(ready.values()), settings.device, settings.min_time)
    timing_of = dict(zip(ready, timings, strict=True))
    of_base = {c.variant: timing_of.get(id(c)) for c in base.candidates}
    facts = {"reference": base.name, **environment(settings.device)}
    return [
        {**c.facts, **_figures(timing_of.get(id(c)), of_base.get(c.variant), settings), **facts} for c in candidates
    ]


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


def _autocast(settings: Settings) -> AbstractContextManager[Any]:
    if settings.precision != "amp-bf16":
        return nullcontext()
    # Cached casts of weights would be freed behind a CUDA graph's back.
    any_graph = any(variant.graph for variant in settings.variants)
    return torch.autocast(settings.device.type, torch.bfloat16, cache_enabled=not any_graph)


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


def _figures(timing: Timing | None, base: Timing | None, settings: Settings) -> Row:
    if timing is None:
        names = ("images_per_s", "latency_p20_ms", "latency_p50_ms", "latency_p80_ms", "calls", "speed_ratio")
        return dict.fromkeys(names)
    median = timing.percentile(50)
    return {
        "images_per_s": settings.batch_size / median,
        "latency_p20_ms": timing.percentile(20) * 1e3,
        "latency_p50_ms": median * 1e3,
        "latency_p80_ms": timing.percentile(80) * 1e3,
        "calls": sum(map(len, timing.chunks)),
        "speed_ratio": timing.speed_against(base) if base else None,
    }
