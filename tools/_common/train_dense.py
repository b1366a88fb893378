"""How the training of a detector or segmenter is put together, announced and finished, for `vitrail.tools.train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitrail.models.mm import checkpoint, dense_report, report
from vitrail.models.mm.classifier import count_parameters
from vitrail.models.mm.data_findings import one_line
from vitrail.models.mm.dense_hooks import DenseProgressHook
from vitrail.models.mm.dense_runner import build_dense_runner as build_runner
from vitrail.models.mm.dense_runner import score_of
from vitrail.models.mm.progress import format_seconds
from vitrail.models.mm.runner import unwrap
from vitrail.tools._common.run_facts import describe_place, run_facts

__all__ = ["CAN_SHARD", "build_runner", "describe", "finish", "make_display", "was_validated"]

CAN_SHARD = False


def make_display(config: Any, console: Any) -> DenseProgressHook:
    """The hook that shows progress."""
    return DenseProgressHook(console, score_of(config))


def describe(runner: Any) -> str:
    """A line about model, device and data, and one for everything notable about the data."""
    notes = "".join(f"\nnote: {one_line(kind, names)}" for kind, names in runner.data_notes.items())
    train, val = runner._train_dataloader.dataset, runner._val_dataloader.dataset
    return (
        f"{_name(runner)}: {count_parameters(unwrap(runner.model)):,} parameters on {describe_place(runner)}; "
        f"{len(train):,} training and {len(val):,} held-out images of {len(train.metainfo['classes'])} classes{notes}"
    )


def was_validated(runner: Any) -> bool:
    """Whether the final weights have been validated."""
    curve = runner.message_hub.get_info("curve")
    return bool(curve) and curve[-1]["iterations"] == runner.max_iters


def finish(runner: Any, console: Any, options: argparse.Namespace) -> None:
    """Writes what a run leaves behind and tells where it is."""
    folder, score = Path(runner.work_dir), score_of(runner.cfg)
    curve = runner.message_hub.get_info("curve")
    info = runner.message_hub.runtime_info
    checkpoint.save_weights(unwrap(runner.model), folder / checkpoint.WEIGHTS)
    seconds = sum(row["seconds"] for row in curve)
    report.save_json(folder / "metrics.json", _metrics(runner, curve, seconds))
    dense_report.draw_curve(folder / "report.png", f"{_name(runner)} after {runner.iter:,} iterations", curve, score)
    last = curve[-1].get(score) if curve else None
    console.print(
        f"\n{score} [bold]{_shown(last)}[/bold] on held-out images "
        f"(best: {_shown(info.get('best_score'))}), trained in {format_seconds(seconds)}"
    )
    console.print(
        f"  weights   {folder / checkpoint.WEIGHTS}\n"
        f"  figures   {folder / 'metrics.json'}\n"
        f"  picture   {folder / 'report.png'}\n\n"
        f"go on with\n"
        f"  tensorboard --logdir {folder}",
        markup=False,
    )


def _shown(score: float | None) -> str:
    return "unknown" if score is None else f"{score:.4g}"


def _name(runner: Any) -> str:
    model = runner.cfg.model
    return f"{model.type} on {model.backbone.get('name', model.backbone.type)}"


def _metrics(runner: Any, curve: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    info = runner.message_hub.runtime_info
    return {
        "model": runner.cfg.model.type,
        "backbone": runner.cfg.model.backbone.get("name"),
        "score": score_of(runner.cfg),
        "best": info.get("best_score"),
        "held_out": curve[-1] if curve else None,
        "classes": list(runner.train_dataloader.dataset.metainfo["classes"]),
        "images": {"train": len(runner.train_dataloader.dataset), "val": len(runner.val_dataloader.dataset)},
        "iterations": runner.iter,
        "seconds": seconds,
        **run_facts(runner),
        "curve": curve,
    }
