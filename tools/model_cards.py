"""Writes the model cards and the page of benchmarks: `python -m vitrail.tools.model_cards`.

`--check` compares them with what it would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import vitrail
from vitrail.tools._common import bench_page
from vitrail.tools._common.cards import FOLDER, measure, read_facts, read_measured, render, render_index
from vitrail.tools._common.cli import ArgumentParser, ToolError, run_command
from vitrail.tools._common.table import _write


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-model-cards", description="Write the model cards.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a card is not up to date")
    parser.add_argument("--measure", action="store_true", help="count parameters and GMACs again (about a minute)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where facts and cards lie")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> int:
    if options.measure:
        measured = {name: measure(name) for name in vitrail.list_models()}
        text = json.dumps(measured, indent=1) + "\n"
        if options.check and measured != read_measured(options.folder):
            raise ToolError("measured.json is not up to date; run with --measure")
        if not options.check:
            _write(options.folder / "measured.json", text.encode())
    pages = make_pages(options.folder)
    stale = [name for name, text in pages.items() if _differs(options.folder / name, text)]
    if options.check and stale:
        raise ToolError(f"not up to date: {', '.join(stale)}; run python -m vitrail.tools.model_cards")
    for name in stale:
        _write(options.folder / name, pages[name].encode())
    print(f"{len(pages)} pages, {len(stale)} written")
    return 0


def make_pages(folder: Path = FOLDER) -> dict[str, str]:
    """The text of every card, of the index and of the benchmarks' page, by file name.

    Raises:
        ToolError: A model has no facts, or facts have no model.
        ValueError: A file of the benchmarks is no result file.
    """
    facts, measured = read_facts(folder), read_measured(folder)
    models = set(vitrail.list_models())
    for others, title in ((set(facts), "facts.yaml"), (set(measured), "measured.json")):
        if wrong := sorted(others ^ models):
            raise ToolError(f"{title} and the registry disagree about {', '.join(wrong)}")
    cards = {f"{name}.md": render(name, facts[name], measured[name]) for name in sorted(models)}
    pages = {**cards, "README.md": render_index(facts, measured)}
    if (folder / "benchmarks").is_dir():
        pages["benchmarks/README.md"] = bench_page.render(folder / "benchmarks")
    return pages


def _differs(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_text() != text


if __name__ == "__main__":
    sys.exit(main())
