"""Accuracy against cost: `python -m vitrail.tools.model_table [PATTERN] [--throughput FILE] [--plot FILE]`.

Accuracies are the papers' on ImageNet-1k; parameters and GMACs are counted; images a second come from files of
`vitrail.tools.benchmark` (its `--output` folder holds them).
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vitrail.tools._common.cards import read_facts, read_measured
from vitrail.tools._common.cli import (
    ArgumentParser,
    ToolError,
    UsageError,
    check_output_file,
    run_command,
    unknown_name,
)
from vitrail.tools._common.table import Column, Row, _write, print_table, write_csv, write_json

_COLUMNS = [
    Column("model", "model", left=True),
    Column("parameters", "parameters", lambda value: f"{value / 1e6:.1f}M"),
    Column("GMACs", "gmacs", lambda value: f"{value:.4g}"),
    Column("at", "size"),
    Column("top-1 %, paper", "top1", lambda value: f"{value:g}"),
    Column("images/s", "images_per_second", lambda value: f"{value:,.0f}"),
]
_MARKERS = "osD^v<>PX*"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-model-table", description="Print and plot accuracy against cost.")
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern of model names")
    parser.add_argument("--throughput", metavar="FILE", action="append", default=[], type=Path,
                        help="JSON of vitrail-benchmark; may be given several times")  # fmt: skip
    parser.add_argument("--sort", choices=[column.key for column in _COLUMNS], default="model")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="picture: accuracy against GMACs and images/s")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--csv", metavar="FILE", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> int:
    for option, path in (("--json", options.json), ("--csv", options.csv), ("--plot", options.plot)):
        if path:
            check_output_file(path, option)
    rows = make_rows(options.pattern, read_throughput(options.throughput))
    if not rows:
        raise unknown_name("model", options.pattern, read_facts())
    rows.sort(key=lambda row: (row[options.sort] is None, row[options.sort]))
    console = Console(highlight=False, soft_wrap=True)
    print_table(console, "accuracies are the papers', not measured here", _COLUMNS, rows)
    for path, write in ((options.json, write_json), (options.csv, write_csv), (options.plot, write_plot)):
        if path:
            write(path, rows)
            console.print(f"wrote {path}", markup=False)
    return 0


def make_rows(pattern: str = "*", throughput: dict[str, float] | None = None) -> list[Row]:
    """One row a model: what was counted, what its paper says, and how fast it was."""
    facts, measured = read_facts(), read_measured()
    return [
        {
            "model": name,
            "parameters": measured[name]["parameters"],
            "gmacs": measured[name]["gmacs"],
            "size": (measured[name]["input_size"] or [None])[-1],
            "top1": facts[name].get("published", {}).get("top1"),
            "images_per_second": (throughput or {}).get(name),
        }
        for name in sorted(fnmatch.filter(facts, pattern))
    ]


def read_throughput(paths: Sequence[Path]) -> dict[str, float]:
    """Images a second of inference by model, the best of all rows of benchmark files.

    Raises:
        UsageError: A file is not one of `vitrail.tools.benchmark`.
    """
    best: dict[str, float] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
            rows = [row for row in content if row.get("images_per_s") and row.get("mode", "infer") != "train"]
            found = [(row["model"], float(row["images_per_s"])) for row in rows if row.get("source") != "timm"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a result file of vitrail-benchmark") from error
        if not found:
            raise UsageError(f"{path} holds no speed of a model's inference")
        for name, value in found:
            best[name] = max(value, best.get(name, 0.0))
    return best


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draws accuracy against GMACs and, where it is known, against throughput; a colour a family.

    A line joins the models of a family that are better than all cheaper ones of it.

    Args:
        path: Picture file; its ending chooses the format.
        rows: Of `make_rows`.

    Raises:
        ToolError: No row has an accuracy.
    """
    from matplotlib.figure import Figure

    axes_of = [("gmacs", "GMACs of one image"), ("images_per_second", "images per second, inference")]
    shown = [(key, title) for key, title in axes_of if any(row[key] and row["top1"] for row in rows)]
    if not shown:
        raise ToolError("--plot has nothing to draw: no model of the table has a published accuracy")
    figure = Figure(figsize=(1 + 6.5 * len(shown), 5.5), layout="constrained")
    for place, (key, title) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        _draw(axes, key, [row for row in rows if row[key] and row["top1"]])
        axes.set_xlabel(title)
        axes.set_ylabel("ImageNet-1k top-1, the papers' (%)")
    figure.axes[0].legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:] or "png", dpi=130)
    _write(path, picture.getvalue())


def _draw(axes: Any, key: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    families = list(dict.fromkeys(_family(row["model"]) for row in rows))
    for index, family in enumerate(families):
        members = [row for row in rows if _family(row["model"]) == family]
        members.sort(key=lambda row: row[key], reverse=key == "images_per_second")  # what costs least comes first
        better = [row for i, row in enumerate(members) if row["top1"] >= max(r["top1"] for r in members[: i + 1])]
        style = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5, "color": f"C{index % 10}"}
        axes.plot([row[key] for row in better], [row["top1"] for row in better], linewidth=1, label=family, **style)
        for row in members:
            axes.plot(row[key], row["top1"], **style)
            size = row["model"].removeprefix(f"{family}_")
            place = ((4, -8), (4, 4), (-4, 4), (-4, -8))[index % 4]  # so that near ones of two families can be read
            side = "left" if place[0] > 0 else "right"
            look = {"textcoords": "offset points", "fontsize": 7, "ha": side, "color": style["color"]}
            axes.annotate(size, (row[key], row["top1"]), place, **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.08)
    axes.grid(alpha=0.3)


def _family(name: str) -> str:
    return "_".join(name.split("_")[:2]) if name.startswith("vsa_") else name.partition("_")[0]


if __name__ == "__main__":
    sys.exit(main())
