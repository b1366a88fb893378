"""What exported files were found to compute: the figures kept in `model_cards/exports.json`, and their table.

`vitrail.tools.export --json` adds the figures of a file; `docs/hooks.py` shows the table on the page on export.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from vitrail.tools._common.cards import FOLDER
from vitrail.tools._common.entry_points import image_models
from vitrail.tools._common.export import OPSET, Check
from vitrail.tools._common.measure import environment, version_of
from vitrail.tools._common.table import Row, write_json

FILE = FOLDER / "exports.json"


def make_row(model: str, export_format: str, dynamic: bool, checks: Sequence[Check], **facts: Any) -> Row:
    """The figures of one file.

    Args:
        model: Name of the entry point.
        export_format: One of `export.FORMATS`.
        dynamic: Whether the file takes any size.
        checks: Comparisons with the model.
        facts: More figures: the file's `bytes`, the `seconds` that writing took, the origin of the `weights`.
    """
    runtimes: Row = {}
    if export_format == "onnx":
        runtimes = {"opset": OPSET, **{name: version_of(name) for name in ("onnx", "onnxruntime")}}
    compared = [{**check._asdict(), "shape": list(check.shape)} for check in checks]
    for check in compared:
        if not check["note"]:
            del check["note"]
    kind = {"model": model, "format": export_format, "dynamic": dynamic}
    return {**kind, **facts, "checks": compared, **runtimes, **environment(torch.device("cpu"))}


def add_row(path: Path, row: Row) -> None:
    """Adds a row to a file of rows, in place of the one of the same model and kind of file; processes take turns.

    Their lock lies in the folder for temporary files: beside the rows, in the package, it would stay behind.

    Raises:
        ValueError: The file holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"vitrail-{name}.lock"):
        others = [other for other in (read_rows(path) if path.exists() else []) if _key(other) != _key(row)]
        write_json(path, sorted([*others, row], key=_key))


def read_rows(path: Path = FILE) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        rows: list[Row] = json.loads(path.read_text())
        if not all(isinstance(row["checks"], list) and _key(row) for row in rows):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of vitrail.tools.export --json") from error
    return rows


def _key(row: Row) -> tuple[str, str, bool]:
    return row["model"], row["format"], row["dynamic"]


def render(rows: Sequence[Row]) -> str:
    """A Markdown table of dynamic ONNX files: the relative differences at the sizes and batches that were compared.

    Above it stands how many of the models of images it has, below it what was noted of the images.
    """
    rows = [row for row in rows if row["format"] == "onnx" and row["dynamic"]]
    titles = ["model", "MB", *["at", "batch 1", "batch 3"] * 2]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *map(_cells, rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "".join(
        f"\n{row['model']}, {' x '.join(map(str, check['shape']))}: {check['note']}.\n"
        for row in rows
        for check in row["checks"]
        if check.get("note")
    )
    return f"{len(rows)} of {len(image_models())} models:\n\n{table}\n{notes}"


def _cells(row: Row) -> list[str]:
    by_size: dict[str, list[str]] = {}
    for check in row["checks"]:
        by_size.setdefault("{2} x {3}".format(*check["shape"]), []).append(f"{check['relative']:.0e}")
    sizes = [cell for size, errors in by_size.items() for cell in (size, *errors)]
    return [row["model"], f"{row['bytes'] / 1e6:.1f}", *sizes]
