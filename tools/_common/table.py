"""Results of a benchmark: a table on the screen, JSON and CSV files, a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


class Column(NamedTuple):
    """How one entry of the rows is shown."""

    title: str
    key: str
    show: Callable[[Any], str] = str
    left: bool = False


def print_table(console: Console, title: str, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Prints rows; an entry that is None is shown as a dash."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        justify = "left" if column.left else "right"
        table.add_column(column.title, justify=justify, no_wrap=not column.left, overflow="fold")
    for row in rows:
        table.add_row(*("-" if row[c.key] is None else c.show(row[c.key]) for c in columns))
    console.print(table)


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as a list of objects."""
    _write(path, (json.dumps(rows, indent=1) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows with a header line; None becomes an empty field."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


class Bar(NamedTuple):
    """One bar of a picture: a value, how far it scatters, a note behind it."""

    group: str
    label: str
    value: float
    low: float
    high: float
    note: str


def write_bars(path: Path, title: str, axis: str, bars: Sequence[Bar], limit: float | None = None) -> None:
    """Draws horizontal bars, group by group, in the order given.

    Args:
        path: Picture file; its ending chooses the format.
        title: Headline.
        axis: What the values are, with the unit.
        bars: The values.
        limit: Value at which a dashed line stands.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(bar.group for bar in bars))
    labels = list(dict.fromkeys(bar.label for bar in bars))
    figure = Figure(figsize=(9, 1.6 + 0.24 * (len(bars) + 2 * len(groups))), layout="constrained")
    axes = figure.add_subplot()
    y, ticks = 0.0, {}
    for group in groups:
        axes.annotate(group, (0, y), fontsize=8, fontweight="bold", va="center", annotation_clip=False)
        for bar in (bar for bar in bars if bar.group == group):
            y += 1
            ticks[y] = bar.label
            axes.barh(y, bar.value, height=0.8, color=f"C{labels.index(bar.label) % 10}")
            axes.plot([bar.low, bar.high], [y, y], color="black", linewidth=1)
            end = (max(bar.value, bar.high), y)
            axes.annotate(bar.note, end, (4, 0), textcoords="offset points", va="center", fontsize=8)
        y += 2
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_ylim(y - 1, -1)
    axes.set_xlim(0, 1.35 * max((max(bar.value, bar.high) for bar in bars), default=1.0))
    axes.set_xlabel(axis, fontsize=9)
    axes.set_title(title, fontsize=9, wrap=True)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:] or "png", dpi=130)
    _write(path, picture.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Writes a file in whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
