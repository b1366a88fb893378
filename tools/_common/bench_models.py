"""Measures models: throughput, latency, memory, parameters, multiplications."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vitrail.tools._common.cli import ToolError
from vitrail.tools._common.measure import (
    Timed,
    Timing,
    capture_graph,
    environment,
    measure_in_turns,
    never,
    peak_memory,
    step_figures,
)
from vitrail.tools._common.model_check import ModelVerdict, check_model
from vitrail.tools._common.ready_models import Settings, Variant, build, count_flops, grad_mode, make_step, resolve
from vitrail.tools._common.table import Row

Report = Callable[[str], None]


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
    settings.turns.prepare()
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

    All models at once would not fit into a GPU's memory. What is compiled, which takes longest, comes last. What fails
    has a row without times that says so.

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
    for compiled in dict.fromkeys(variant.compiled for variant in settings.variants):
        variants = tuple(variant for variant in settings.variants if variant.compiled == compiled)
        _bench_in_turn(names, reference, dataclasses.replace(settings, variants=variants), report, done, late)


def _bench_in_turn(
    names: Sequence[str],
    reference: str,
    settings: Settings,
    report: Report,
    done: Callable[[list[Row]], None],
    late: Callable[[], bool],
) -> None:
    """Measures models one by one; nothing of them is kept, once it returns."""
    settings.turns.prepare()
    base = _Base(reference, _prepare(reference, settings, _graph_pool(settings), report, late))
    found: list[_Candidate] = []
    for name in dict.fromkeys(names):
        settings.turns.prepare()
        found.clear()  # gives the last model's memory back
        if name == reference:
            found = base.candidates[:]
        else:
            found = _prepare(name, settings, _graph_pool(settings), report, late)
        report(f"measuring {name}")
        try:
            rows = _measure(found, base, settings)
        except torch.OutOfMemoryError:
            # A graph keeps the memory of all its intermediate results.
            _drop_graphs(found, "out of memory beside the eager model")
            rows = _measure(found, base, settings)
        done(rows)


def _drop_graphs(candidates: Sequence[_Candidate], note: str) -> None:
    for candidate in candidates:
        if candidate.variant.graph and candidate.timed is not None:
            candidate.timed, candidate.facts["note"] = None, note
    gc.collect()
    torch.cuda.empty_cache()


def _graph_pool(settings: Settings) -> Any:
    """Memory that CUDA graphs share, which never run at the same time."""
    return torch.cuda.graph_pool_handle() if settings.device.type == "cuda" else None


def _prepare(
    name: str, settings: Settings, pool: Any, report: Report, late: Callable[[], bool] = never
) -> list[_Candidate]:
    """A model in all variants, the uncompiled first, each ready or with a note why it is not."""
    candidates: list[_Candidate] = []
    for compiled in dict.fromkeys(variant.compiled for variant in settings.variants):
        variants = [variant for variant in settings.variants if variant.compiled == compiled]
        report(f"{'compiling' if compiled else 'preparing'} {name}, {_mode(settings)}")
        if settings.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        candidates += _prepare_step(name, variants, settings, pool, late)
    return candidates


def _prepare_step(
    name: str, variants: Sequence[Variant], settings: Settings, pool: Any, late: Callable[[], bool]
) -> list[_Candidate]:
    """Builds a model, checks and counts it, runs one step, measures its memory, makes of the step what is asked for."""
    on_gpu = settings.device.type == "cuda"
    before = torch.cuda.memory_allocated(settings.device) if on_gpu else 0
    source = resolve(name)
    model, size = build(source, settings)
    facts = _facts_of(name, source.kind, model, size, settings)
    candidates = [_Candidate({**facts, **_variant_facts(variant)}) for variant in variants]
    try:
        if variants[0].compiled and late():
            return [_Candidate({**c.facts, "note": "skipped: time limit"}) for c in candidates]
        verdict = check_model(source, model, size, settings)
        if verdict is not None:
            _note_verdict(candidates, verdict)
            if not verdict.correct:
                return candidates
        flops = count_flops(model, size, settings)
        step = make_step(model, size, variants[0].compiled, settings)
        with grad_mode(settings):
            step()
            memory = peak_memory(step, settings.device, before) if on_gpu else None
            for candidate, variant in zip(candidates, variants, strict=True):
                candidate.facts |= {"flops": flops, "peak_memory_bytes": memory}
                candidate.timed = capture_graph([step], pool) if variant.graph else Timed(step)
    except Exception as error:
        shape = f"{settings.batch_size}x{'x'.join(map(str, size))}"
        for candidate in candidates:
            if candidate.timed is None:
                _blame(candidate, error, f"{name} cannot run on a {shape} {settings.precision} input")
    return candidates


def _note_verdict(candidates: Sequence[_Candidate], verdict: ModelVerdict) -> None:
    for candidate in candidates:
        candidate.facts |= {"relative_error": verdict.error, "correct": verdict.correct}
        if not verdict.correct:
            candidate.facts["note"] = "wrong"
            name = candidate.facts["model"]
            candidate.error = ToolError(f"{name} is wrong: its logits are off by {verdict.error:.1e}")


def _blame(candidate: _Candidate, error: Exception, text: str) -> None:
    """Notes why a candidate has no figures; what a wrong size or precision may bring about is an expected error."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    candidate.facts["note"] = "out of memory" if out_of_memory else f"failed: {type(error).__name__}: {first_line}"
    candidate.error = error.with_traceback(None) if out_of_memory else error  # its frames would keep the memory
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
        "correct": None,
        "relative_error": None,
        "flops": None,
        "peak_memory_bytes": None,
        "note": None,
    }


def _variant_facts(variant: Variant) -> Row:
    return {"variant": "compiled" if variant.compiled else "eager", "cuda_graph": variant.graph}


def _mode(settings: Settings) -> str:
    return "train" if settings.train else "infer"


def _measure(candidates: Sequence[_Candidate], base: _Base, settings: Settings) -> list[Row]:
    """Times candidates and the base in turns; the rows of the candidates."""
    ready = {id(c): c.timed for c in (*candidates, *base.candidates) if c.timed is not None}
    with grad_mode(settings), settings.turns.measuring() as alone:
        timings = measure_in_turns(list(ready.values()), settings.device, settings.min_time)
    timing_of = dict(zip(ready, timings, strict=True))
    of_base = {c.variant: timing_of.get(id(c)) for c in base.candidates}
    facts = {"reference": base.name, "alone": alone, **environment(settings.device)}
    return [
        {**c.facts, **_figures(timing_of.get(id(c)), of_base.get(c.variant), settings), **facts} for c in candidates
    ]


def _figures(timing: Timing | None, base: Timing | None, settings: Settings) -> Row:
    speed = settings.batch_size / timing.percentile(50) if timing else None
    return {"images_per_s": speed, **step_figures(timing, base)}
