"""Looks for faults in the data of a training: `python -m vitrail.tools.check_data CONFIG`.

Folders and files that are missing, classes that differ between data and model, images that are missing or cannot be
read, boxes outside their image, masks whose labels are no class. Everything is named and counted; with faults the exit
status is 1. `vitrail.tools.train` looks for the same, opening a sample of the files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, check_output_file, run_command
from vitrail.tools._common.configs import find_config_or_run, read_config


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-check-data", description="Look for faults in the data of a training.")
    parser.add_argument("config", help="a config (path or name of a packaged one), or a training run's work folder")
    parser.add_argument("--sample", type=int, metavar="N", help="open only N images and masks of every data set")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the names of all faults")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _check(build_parser().parse_args(argv)))


def _check(options: argparse.Namespace) -> int:
    if options.sample is not None and options.sample < 1:
        raise UsageError(f"--sample is {options.sample}; allowed: at least 1")
    output = Path(options.output).expanduser() if options.output else None
    if output:
        check_output_file(output, "--output")
    path, _ = find_config_or_run(options.config)
    config = read_config(path, options.cfg_options)

    from vitrail.models.mm.data_findings import one_line
    from vitrail.models.mm.dense_runner import check_data, is_dense
    from vitrail.models.mm.report import save_json

    console = Console(highlight=False, soft_wrap=True)
    findings = check_data(config, options.sample) if is_dense(config) else _check_images(config, options, console)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_json(output, findings.to_json())
    console.print(f"looked at {', '.join(f'{number:,} {kind}' for kind, number in findings.checked.items())}")
    for word, kinds in (("note", findings.notes), ("fault", findings.faults)):
        for kind, names in kinds.items():
            console.print(f"{word}: {one_line(kind, names)}", markup=False)
    if findings.faults:
        raise ToolError(f"{sum(map(len, findings.faults.values())):,} faults in the data of {path}")
    console.print("no faults")
    return 0


def _check_images(config: Any, options: argparse.Namespace, console: Console) -> Any:
    """Opens a classifier's images, after all that a training checks."""
    from vitrail.models.mm.data_findings import Findings, evenly
    from vitrail.models.mm.images import UnreadableImageError
    from vitrail.models.mm.runner import check_data

    findings = Findings()
    for dataset in check_data(config):
        source = dataset.source
        places = evenly(range(len(dataset)), options.sample)
        findings.count("images listed", len(dataset))
        for index in track(places, "reading", console=console, disable=not console.is_terminal, transient=True):
            try:
                source.load(index)
            except UnreadableImageError as error:
                findings.fault("images that cannot be read", str(error).removeprefix("cannot read image "))
            findings.count("images opened")
    return findings


if __name__ == "__main__":
    sys.exit(main())
