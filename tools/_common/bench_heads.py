"""Measures decode heads of segmenters: VWFormer's, the same function as its authors write it out, and UPerNet's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.tools._common.bench_tables import STEP_COLUMNS
from vitrail.tools._common.cli import ToolError, UsageError
from vitrail.tools._common.measure import Timed, environment, measure_in_turns, peak_memory, step_figures
from vitrail.tools._common.ready_models import PRECISIONS
from vitrail.tools._common.table import Column, Row, print_table

NAMES = ("VWFormer", "VWFormer, written out", "UPerNet")
REFERENCE = "UPerNet"
SIZES = ((512, 512), (512, 2048))  # of images; ADE20K's crops, and the size at which segmenters are counted
_COLUMNS = (
    Column("head", "head", left=True),
    Column("params M", "parameters", lambda n: f"{n / 1e6:.2f}"),
    Column("GMACs", "flops", lambda n: f"{n / 2e9:.1f}"),
    Column("with backbone", "model_flops", lambda n: f"{n / 2e9:.1f}"),
    *STEP_COLUMNS,
)
_BACKBONE, _CHANNELS, _STRIDES = "convnext_tiny", (96, 192, 384, 768), (4, 8, 16, 32)
_CLASSES, _WIDTH = 150, 512  # as published
_LARGEST_DIFFERENCE = 1e-4  # of the two forms' logits in float32, relative to the largest

Forward = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class HeadSettings:
    """What all heads of a run have in common.

    Attributes:
        timed_sizes: Those of the sizes at which heads are run; they are counted at all.
    """

    device: torch.device
    batch_size: int
    sizes: Sequence[tuple[int, int]]
    timed_sizes: Sequence[tuple[int, int]]
    precision: str
    train: bool
    min_time: float


class _Head(NamedTuple):
    module: nn.Module
    forward: Forward


def bench_heads(settings: HeadSettings, report: Callable[[str], None], done: Callable[[list[Row]], None]) -> None:
    """Counts the heads, checks that both forms of VWFormer agree, and times all in alternation; processor time on CPUs.

    The heads have ADE20K's 150 classes and random weights and take random maps of the shapes that ConvNeXt-T makes.

    Args:
        settings: What all have in common.
        report: Called with one line on what happens now.
        done: Called with the rows of a size as soon as they are there.

    Raises:
        UsageError: A batch of one image is to be trained on.
        ToolError: The forms of VWFormer do not agree, or mmsegmentation is not installed.
    """
    if settings.train and settings.batch_size < 2:
        raise UsageError("--batch-size is 1; training needs 2, for batch norms see one pixel of the image's mean")
    torch.manual_seed(0)
    heads = _make_heads(settings.device)
    report("comparing the two forms of VWFormer")
    difference = _difference(heads, settings)
    if not difference < _LARGEST_DIFFERENCE:
        raise ToolError(f"VWFormer and its written-out form differ by {difference:.1e}, nothing is timed")
    for head in heads.values():
        head.module.to(PRECISIONS[settings.precision]).train(settings.train)
    facts = {"reference": REFERENCE, "forms_differ_by": difference, **environment(settings.device)}
    for size in settings.sizes:
        report(f"{'training' if settings.train else 'inference'} at {size[0]}x{size[1]}")
        figures = _measure(heads, size, settings) if size in settings.timed_sizes else {}
        counted = _count(size)
        unmeasured = _no_figures("counted only")
        done([{**_facts(n, heads[n], settings, size), **counted[n], **figures.get(n, unmeasured), **facts}
              for n in NAMES])  # fmt: skip


def show(console: Console, rows: Sequence[Row]) -> None:
    """Prints the rows of a size."""
    first = rows[0]
    work = f"{first['mode']}, batch {first['batch_size']}, {first['height']}x{first['width']}, {first['precision']}"
    shown = [{**row, "head": row["head"] + (f" ({row['note']})" if row["note"] else "")} for row in rows]
    print_table(console, f"{work}; speed against {REFERENCE}", _COLUMNS, shown)


def _make_heads(device: torch.device | str) -> dict[str, _Head]:
    """The heads by `NAMES`; both forms of VWFormer are of one module."""
    from vitrail.models.mm.ops import install_operators

    install_operators()  # before mmseg is imported, which asks for them
    try:
        from mmseg.models.decode_heads import UPerHead

        from vitrail.models.mm.vwformer import VWHead
    except ImportError as error:
        raise ToolError(f"--heads needs mmsegmentation ({error}): pip install 'vitrail[mm]'") from error
    from vitrail.tools._common.literal_vwformer import literal_decoder

    common: dict[str, Any] = {
        "num_classes": _CLASSES,
        "channels": _WIDTH,
        "align_corners": False,
        "norm_cfg": {"type": "BN"},
        "in_index": [0, 1, 2, 3],
        "in_channels": list(_CHANNELS),
    }
    with torch.device(device):
        varying = VWHead(decoder={"dim": _WIDTH}, **common)
        upernet = UPerHead(pool_scales=(1, 2, 3, 6), **common)
    for attention in varying.decoder.attentions:
        nn.init.ones_(attention.norm.weight)  # which is zero at first, and would hide the attention from comparisons

    def written_out(maps: Sequence[Tensor]) -> Tensor:
        return varying.cls_seg(literal_decoder(varying.decoder, maps))

    pairs = ((varying, varying), (varying, written_out), (upernet, upernet))
    return {name: _Head(*pair) for name, pair in zip(NAMES, pairs, strict=True)}


def _make_maps(batch: int, size: tuple[int, int], device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(batch, channels, *(-(-side // stride) for side in size), device=device, dtype=dtype)
        for channels, stride in zip(_CHANNELS, _STRIDES, strict=True)
    ]


@torch.no_grad()
def _difference(heads: dict[str, _Head], settings: HeadSettings) -> float:
    """The largest difference of the two forms' logits for an image, relative to the largest logit, in float32."""
    maps = _make_maps(1, settings.timed_sizes[0], settings.device, torch.float32)
    ours, theirs = (heads[name] for name in NAMES[:2])
    ours.module.eval()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y, expected = ours.forward(maps), theirs.forward(maps)
    return float((y - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _count(size: tuple[int, int]) -> dict[str, Row]:
    """Floating-point operations of an image's forward pass, two a multiply-add: of each head, and with the backbone."""
    with torch.device("meta"):
        backbone = timm.create_model(_BACKBONE, features_only=True).eval()
    backbone_flops = _flops(backbone, torch.empty(1, 3, *size, device="meta"))
    maps = _make_maps(1, size, "meta", torch.float32)
    counted = {}
    for name, head in _make_heads("meta").items():
        head.module.eval()
        flops = _flops(head.forward, maps)
        counted[name] = {"flops": flops, "model_flops": flops + backbone_flops, "backbone": _BACKBONE}
    return counted


def _flops(run: Callable[[Any], object], x: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops()


def _facts(name: str, head: _Head, settings: HeadSettings, size: tuple[int, int]) -> Row:
    return {
        "head": name,
        "mode": "train" if settings.train else "infer",
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "height": size[0],
        "width": size[1],
        "parameters": sum(p.numel() for p in head.module.parameters()),
    }


def _measure(heads: dict[str, _Head], size: tuple[int, int], settings: HeadSettings) -> dict[str, Row]:
    """Memory of one head after the other, then the times of all in turns; without times where memory ran out."""
    maps = _make_maps(settings.batch_size, size, settings.device, PRECISIONS[settings.precision])
    steps = {name: _make_step(head, maps, settings) for name, head in heads.items()}
    figures: dict[str, Row] = {}
    ready: dict[str, int] = {}
    with torch.set_grad_enabled(settings.train):
        for name, step in steps.items():
            try:
                step()
                ready[name] = peak_memory(step, settings.device)
            except torch.OutOfMemoryError:
                figures[name] = _no_figures("out of memory")
                gc.collect()
                torch.cuda.empty_cache()
        on_cpu = settings.device.type == "cpu"
        runs = [Timed(steps[name]) for name in ready]
        timings = measure_in_turns(runs, settings.device, settings.min_time, cpu_time=on_cpu)
    timing_of = dict(zip(ready, timings, strict=True))
    for name, timing in timing_of.items():
        figures[name] = {
            "peak_memory_bytes": ready[name],
            "note": None,
            **step_figures(timing, timing_of.get(REFERENCE)),
        }
    return figures


def _make_step(head: _Head, maps: Sequence[Tensor], settings: HeadSettings) -> Callable[[], object]:
    """A forward pass, or with `train` also the gradients of parameters and maps."""
    if not settings.train:
        return lambda: _run(head, maps, settings)
    wanted = [*head.module.parameters(), *(x.requires_grad_() for x in maps)]

    def train() -> tuple[Tensor | None, ...]:
        y = _run(head, maps, settings)
        return torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

    return train


def _run(head: _Head, maps: Sequence[Tensor], settings: HeadSettings) -> Tensor:
    autocast: AbstractContextManager[Any] = nullcontext()
    if settings.precision == "amp-bf16":
        autocast = torch.autocast(settings.device.type, torch.bfloat16)
    with autocast:
        return head.forward(maps)


def _no_figures(note: str) -> Row:
    return {"peak_memory_bytes": None, "note": note, **step_figures(None, None)}
