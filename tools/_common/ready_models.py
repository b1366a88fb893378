"""Models that stand ready for a measurement: built, with one step of work on them, and counted."""

from __future__ import annotations

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


def build(source: str, entry_point: str, settings: Settings) -> tuple[nn.Module, tuple[int, int, int]]:
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


def make_step(model: nn.Module, size: tuple[int, int, int], compiled: bool, settings: Settings) -> Callable[[], object]:
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
