"""Writes Waymo's perception data out in the plain layout: `python -m vitrail.tools.convert_waymo ROOT OUT`.

ROOT holds the parquet files of version 2.0.1 (`ROOT/training/lidar/*.parquet`, also `lidar_calibration`, `lidar_box`,
`lidar_pose`, `vehicle_pose`); only these components are read. OUT gets, for each frame of a split,

- `SPLIT/points/SEGMENT_TIME.npy`: float32 (N, 5) of x, y, z, intensity, elongation in the vehicle's frame, of all
  lasers, intensity and elongation as Waymo has them, points in zones without labels among them;
- `SPLIT/boxes/SEGMENT_TIME.json`: objects with name, box, difficulty (0: level 1, 1: level 2), number of points and id;

and `SPLIT/segments/SEGMENT.json`, with the times of its frames, when a segment is complete. Started again, the command
goes on behind the complete segments. It was written from the public description of the layout and could not be tried on
Waymo's own files.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="vitrail-convert-waymo", description="Write Waymo's parquet files (v2.0.1) out in the plain layout."
    )
    parser.add_argument("root", metavar="ROOT", help="folder of training/lidar/*.parquet and so on")
    parser.add_argument("output", metavar="OUT", help="folder for points and boxes")
    parser.add_argument("--splits", nargs="+", default=["training", "validation"], help="default: training validation")
    parser.add_argument("--returns", nargs="+", type=int, choices=[1, 2], default=[1, 2],
                        help="of a pulse, the returns that become points (default: 1 2)")  # fmt: skip
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th frame of a segment")
    parser.add_argument("--uncompensated", action="store_true",
                        help="do not undo the vehicle's motion while the top laser turns; reads no poses")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _convert(build_parser().parse_args(argv)))


def _convert(options: argparse.Namespace) -> int:
    if options.every < 1 or options.workers < 1:
        raise UsageError(f"--every is {options.every}, --workers {options.workers}; allowed: at least 1")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ToolError(f"parquet files need pyarrow ({error}): pip install 'vitrail[waymo]'") from error
    root, output = Path(options.root).expanduser(), Path(options.output).expanduser()
    settings = {
        "returns": sorted(set(options.returns)), "every": options.every, "compensated": not options.uncompensated
    }  # fmt: skip
    jobs, done = [], 0
    for split in options.splits:
        for name in _segments(root / split):
            if _is_complete(output / split / "segments" / f"{name}.json", settings):
                done += 1
            else:
                jobs.append((root / split, output / split, name, settings))
    for split in options.splits:
        _prepare(output / split)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(jobs) + done:,} segments in {root}, {done:,} of them converted before", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    frames = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("segments", total=len(jobs))
        for count in _run(jobs, options.workers):
            frames += count
            progress.advance(task)
    console.print(f"{frames:,} frames of {len(jobs):,} segments written to {output}", markup=False)
    return 0


def _segments(folder: Path) -> list[str]:
    """Names of a split's segments."""
    names = sorted(path.stem for path in (folder / "lidar").glob("*.parquet"))
    if not names:
        raise UsageError(f"{folder / 'lidar'} holds no *.parquet: expected Waymo's perception data, version 2.0.1")
    return names


def _is_complete(marker: Path, settings: dict[str, Any]) -> bool:
    """Whether a segment has been converted; with other options than now is an error."""
    if not marker.exists():
        return False
    try:
        before = json.loads(marker.read_bytes())["settings"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ToolError(f"{marker} is damaged; remove it to convert the segment again") from error
    if before != settings:
        raise UsageError(f"{marker} was converted with {before}, asked for is {settings}; choose another folder")
    return True


def _prepare(folder: Path) -> None:
    """Makes a split's folders and removes what writes that were killed have left there."""
    for name in ("points", "boxes", "segments"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in (folder / name).glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _run(jobs: list[tuple[Path, Path, str, dict[str, Any]]], workers: int) -> Iterator[int]:
    """The number of frames of each segment, as they are done."""
    if workers == 1:
        yield from (convert_segment(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = [pool.submit(convert_segment, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def convert_segment(source: Path, target: Path, name: str, settings: dict[str, Any]) -> int:
    """Converts a segment; returns the number of its frames.

    Raises:
        ToolError: A file is missing or is not in the layout.
    """
    from vitrail.models.mm.checkpoint import atomic_write
    from vitrail.models.mm.report import save_json
    from vitrail.tools._common.waymo import Segment

    segment = Segment(source, name, settings["returns"], settings["every"], settings["compensated"])
    written = []
    for frame in segment.frames():
        stem = f"{name}_{frame.timestamp}"
        buffer = io.BytesIO()
        np.save(buffer, frame.points, allow_pickle=False)
        atomic_write(target / "points" / f"{stem}.npy", buffer.getvalue())
        atomic_write(target / "boxes" / f"{stem}.json", json.dumps(frame.objects))
        written.append({"name": stem, "timestamp_micros": frame.timestamp, "points": len(frame.points)})
    if len(written) != len(segment):
        raise ToolError(f"{source / 'lidar' / name}.parquet: {len(segment)} frames begin, {len(written)} are complete")
    written.sort(key=lambda entry: entry["timestamp_micros"])
    save_json(target / "segments" / f"{name}.json", {"settings": settings, "frames": written})
    return len(written)


if __name__ == "__main__":
    sys.exit(main())
