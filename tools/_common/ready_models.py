"""Models that stand ready for a measurement: built, with one step of work on them, and counted."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.tools._common.cli import UsageError, unknown_name
from vitrail.tools._common.literal_models import compute_by_definition
from vitrail.tools._common.turns import Turns

PRECISIONS = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "amp-bf16": torch.float32,
}


class Variant(NamedTuple):
    """How a model runs: under `torch.compile`, as a CUDA graph, both or neither."""

    compiled: bool = False
    graph: bool = False


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
    turns: Turns = field(default_factory=Turns)


class Source(NamedTuple):
    """What a name stands for: a kind of `SOURCES`, an entry point and its arguments."""

    kind: str
    entry_point: str
    arguments: dict[str, Any]


SOURCES = {
    "timm": "timm's own",
    "accelerated": "timm's after `vitrail.accelerate`",
    "eager": "ours, every operator computed by its definition",
    "authors": "the same, with the routed attention of BiFormer in the steps of its authors",
}


def resolve(name: str) -> Source:
    """Takes "NAME", "NAME:KEY=VALUE,..." or one of these behind a source and a slash apart.

    Without a source, ours or timm's.

    Raises:
        UsageError: There is no such model; the message names the nearest ones.
    """
    ours, all_names = _names()
    before, _, arguments = name.partition(":")
    kind, _, plain = before.rpartition("/")
    if kind and kind not in SOURCES:
        raise UsageError(f"model is {name!r}; allowed: NAME, and {'/NAME, '.join(SOURCES)}/NAME")
    known = ours if kind in ("eager", "authors") else all_names - (ours if kind else set())
    if kind == "authors":
        known = frozenset(model for model in known if model.startswith("biformer"))
    if plain.split(".")[0] not in known:
        raise unknown_name("model", before, [f"{kind}/{n}" for n in known] if kind else known)
    return Source(kind or ("vitrail" if plain in ours else "timm"), plain, _parse_arguments(arguments))


@functools.cache
def _names() -> tuple[frozenset[str], frozenset[str]]:
    """Ours, and all that timm knows, ours among them."""
    return frozenset(vitrail.list_models()), frozenset(timm.list_models())


def _parse_arguments(text: str) -> dict[str, Any]:
    """From "n_win=16,qkv_bias=False"; what is no Python literal is a string."""
    arguments = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not (key.isidentifier() and equals):
            raise UsageError(f"argument {part!r} of a model; allowed: KEY=VALUE")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments


def create(source: Source, settings: Settings) -> tuple[nn.Module, tuple[int, int, int]]:
    """What a model is made of, and its (channels, height, width).

    A model that has to be told the size of its images is told, unless the name came with arguments.
    """
    try:
        model = timm.create_model(source.entry_point, **source.arguments)
    except TypeError as error:
        raise UsageError(f"{source.entry_point}: {error}") from None
    channels, *default = model.default_cfg["input_size"]
    size = settings.img_size or (default[0], default[1])
    if list(size) != default and hasattr(model, "set_input_size") and not source.arguments:
        model.set_input_size(img_size=size)
    return model, (channels, *size)


def build(source: Source, settings: Settings) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model with random weights in the dtype, layout and mode asked for, and its (channels, height, width)."""
    model, size = create(source, settings)
    model = model.to(settings.device, PRECISIONS[settings.precision]).train(settings.train)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if source.kind == "accelerated" and not vitrail.accelerate(model).replaced:
        raise UsageError(f"accelerated/{source.entry_point}: vitrail.accelerate replaces nothing in this model")
    if source.kind in ("eager", "authors"):
        compute_by_definition(model, as_authors=source.kind == "authors")
    return model, size


def make_step(model: nn.Module, size: tuple[int, int, int], compiled: bool, settings: Settings) -> Callable[[], object]:
    """One step: a forward pass, or with `train` forward, cross-entropy and backward (without an optimiser)."""
    image = torch.randn(settings.batch_size, *size, device=settings.device, dtype=PRECISIONS[settings.precision])
    if settings.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    run = torch.compile(model, dynamic=False) if compiled else model
    parameters = list(model.parameters())
    label = torch.zeros(settings.batch_size, dtype=torch.long, device=settings.device)

    def infer() -> Tensor:
        with autocast(settings):
            return run(image)

    def train() -> tuple[Tensor | None, ...]:
        with autocast(settings):
            loss = F.cross_entropy(run(image).float(), label)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return train if settings.train else infer


def autocast(settings: Settings) -> AbstractContextManager[Any]:
    """Under which a model runs, if its precision is a mixed one."""
    if settings.precision != "amp-bf16":
        return nullcontext()
    # Cached casts of weights would be freed behind a CUDA graph's back.
    any_graph = any(variant.graph for variant in settings.variants)
    return torch.autocast(settings.device.type, torch.bfloat16, cache_enabled=not any_graph)


@contextmanager
def grad_mode(settings: Settings) -> Iterator[None]:
    """Records gradients for training alone."""
    # One process compiles many models: each is a recompilation of code that they share.
    with torch._dynamo.config.patch(recompile_limit=256), torch.set_grad_enabled(settings.train):
        yield


@torch.no_grad()
def count_flops(model: nn.Module, size: tuple[int, int, int], settings: Settings) -> int:
    """Floating-point operations of one image's forward pass, two for each multiply-add.

    PyTorch counts attention only where it has a formula for the kernel; in terms of matrix products it always does.
    """
    training = model.training
    image = torch.randn(1, *size, device=settings.device, dtype=PRECISIONS[settings.precision])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops()
