"""How the training of a detector of objects in scans is announced and finished, for `vitrail.tools.train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitrail.models.mm.classifier import count_parameters
from vitrail.models.mm.runner import unwrap
from vitrail.tools._common import train_dense
from vitrail.tools._common.run_facts import describe_place
from vitrail.tools._common.train_dense import CAN_SHARD, build_runner, make_display, was_validated

__all__ = ["CAN_SHARD", "build_runner", "describe", "finish", "make_display", "was_validated"]


def describe(runner: Any) -> str:
    """One line about model, device and data."""
    train, val = runner._train_dataloader.dataset, runner._val_dataloader.dataset
    return (
        f"{runner.cfg.model.type} on {runner.cfg.model.backbone.get('name', runner.cfg.model.backbone.type)}: "
        f"{count_parameters(unwrap(runner.model)):,} parameters on {describe_place(runner)}; {len(train.reader):,} "
        f"training and {len(val.reader):,} held-out scans, classes {', '.join(train.metainfo['classes'])}"
    )


def finish(runner: Any, console: Any, options: argparse.Namespace) -> None:
    """Writes what a run leaves behind, and the last validation's scans from above with their boxes."""
    train_dense.finish(runner, console, options)
    folder = Path(runner.work_dir) / "scans"
    if runner.val_evaluator.metrics[0].draw(folder):
        console.print(f"  scans     {folder}", markup=False)
