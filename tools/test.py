"""Measures a detector or segmenter: `python -m vitrail.tools.test runs/camvid/upernet_biformer_n`.

What the config's metrics say on its test data is shown and written to `results.json`. Classifiers have
`vitrail.tools.validate`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vitrail.tools._common.cli import (
    ArgumentParser,
    UsageError,
    check_output_file,
    describe_device,
    run_command,
    select_device,
)
from vitrail.tools._common.configs import find_config_or_run, read_config


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-test", description="Measure a detector or segmenter.")
    parser.add_argument("config", help="a training run's work folder, or a config (path or name of a packaged one)")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (default: the work folder's model.safetensors)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument(
        "--output", metavar="FILE", help="where the results go (default: results.json beside the weights)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _test(build_parser().parse_args(argv)))


def _test(options: argparse.Namespace) -> int:
    device = select_device(options.device)
    path, weights = _find(options)
    output = Path(options.output).expanduser() if options.output else weights.parent / "results.json"
    check_output_file(output, "--output")
    config = read_config(path, options.cfg_options)

    from vitrail.models.mm.dense_runner import evaluate_dense, is_dense
    from vitrail.models.mm.report import save_json

    if not is_dense(config):
        raise UsageError(f"{path} is the config of a classifier: use vitrail-validate")
    console = Console(highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("testing", total=None)
        metrics = evaluate_dense(
            config, weights, device, lambda done, total: progress.update(task, completed=done, total=total)
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    save_json(output, {"config": str(path), "weights": str(weights), "device": describe_device(device), **metrics})
    console.print(_table(metrics))
    console.print(f"results in {output}", markup=False)
    return 0


def _find(options: argparse.Namespace) -> tuple[Path, Path]:
    """The config and the weights."""
    path, weights = find_config_or_run(options.config)
    if options.checkpoint:
        weights = Path(options.checkpoint).expanduser()
    elif weights is not None and not weights.exists():
        raise UsageError(
            f"{weights} does not exist: the training has not ended; "
            f"--checkpoint {weights.parent / 'last.pth'} measures what there is"
        )
    if weights is None:
        raise UsageError("a config alone has no weights: give --checkpoint, or a run's work folder")
    return path, weights


def _table(metrics: dict[str, Any]) -> Table:
    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    return table


if __name__ == "__main__":
    sys.exit(main())
