"""Measures models, or with --kernels operators: speed, memory, work; side by side and in alternation.

    vitrail-benchmark biformer_s davit_t --compare timm/davit_tiny --batch-size 64 --precision bf16
    vitrail-benchmark --kernels window_attention --json kernels.json --plot kernels.png

Models have random weights. Throughput is the batch size over the median latency. `speed` is the median, over rounds
in which all models had their turn, of the reference's time over the model's; the reference is the first --compare
model, else the first model. Training is forward, cross-entropy and backward, without an optimiser's step. --compile
measures each model eager and compiled. GMACs are multiply-adds of one image's forward pass. Peak memory, on GPUs only,
is what a step allocates at most, with the model's own weights.

Operators are checked against a float64 reference, output and gradients, on at most four images of the batch, before
they are timed; a wrong one of ours ends the command with status 1. The floor is the time in which their inputs could
be read once and their results written once, at the speed of a large copy; `bandwidth` is the floor's share of the
time. `ours is` tells how many times as fast as the row's implementation ours is. On a GPU all are replayed as CUDA
graphs, on inputs that rotate where they would stay in the cache. Memory, on GPUs only, is what a call allocates at
most. --host measures instead how long a call keeps the host, on the smallest maps. Results are shown and written case
by case; what is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from vitrail.tools._common import bench_tables
from vitrail.tools._common.bench_kernels import PEERS, KernelSettings, bench_kernels
from vitrail.tools._common.bench_models import PRECISIONS, Settings, bench_models
from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command, select_device, unknown_name
from vitrail.tools._common.kernel_cases import OPERATORS
from vitrail.tools._common.progress import Progress
from vitrail.tools._common.table import Row, write_csv, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_command(lambda: _benchmark(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="vitrail-benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a name that timm.create_model knows; timm/NAME must be "
        "timm's own, accelerated/NAME is timm's after vitrail.accelerate",
    )
    add("--compare", nargs="+", default=[], metavar="MODEL", help="more models; the first is the reference of `speed`")
    add(
        "--kernels", nargs="*", metavar="NAME", help=f"measure operators instead: {', '.join(OPERATORS)} (default: all)"
    )
    add("--cases", metavar="TEXT", default="", help="with --kernels: only cases whose name contains this text")
    add(
        "--peers",
        choices=PEERS,
        default="all",
        help="with --kernels: what to compare to; fast leaves out what torch.compile makes, none measures ours alone",
    )
    add("--host", action="store_true", help="with --kernels: time of the calls on the host, on the smallest maps")
    add("--time-limit", type=float, metavar="SECONDS", help="prepare no more peers after this time")
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--batch-size", type=int, help="images in a batch (default: 128 on a GPU, 8 on a CPU)")
    add("--img-size", type=int, nargs="+", metavar=("H", "W"), help="default: each model's own")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    add("--mode", choices=("infer", "train"), default="infer")
    add("--channels-last", action="store_true", help="weights and images in channels-last layout")
    add("--compile", action="store_true", help="measure each model eager and with torch.compile")
    add("--cuda-graph", action="store_true", help="replay each step as a CUDA graph, without the host's work")
    add("--min-time", type=float, help="seconds of measurement for each model (default 3) or kernel and pass (0.5)")
    add("--json", type=Path, metavar="FILE", help="write all figures, with device, versions and commit")
    add("--csv", type=Path, metavar="FILE", help="the same as a table")
    add("--plot", type=Path, metavar="FILE", help="write a picture (.png, .svg or .pdf)")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Raises `UsageError` for values that argparse lets pass."""
    if options.kernels is None and not options.models:
        raise UsageError("name at least one model, or give --kernels")
    if options.kernels is not None and (options.models or options.compare):
        raise UsageError("--kernels measures operators; give no models with it")
    if options.kernels is None and (options.host or options.cases or options.peers != "all"):
        raise UsageError("--host, --cases and --peers belong to --kernels")
    if options.kernels is not None and options.precision == "amp-bf16":
        raise UsageError("--kernels takes inputs of one dtype; allowed precisions: float32, bf16, fp16")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; allowed: at least 1")
    for name in ("min_time", "time_limit"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; allowed: more than 0 seconds")
    if options.img_size and (len(options.img_size) > 2 or min(options.img_size) < 1):
        raise UsageError(f"--img-size is {options.img_size}; allowed: H or H W, each at least 1")
    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot is {options.plot}; allowed endings: .png, .svg, .pdf")


def _benchmark(options: argparse.Namespace) -> int:
    device = select_device(options.device)
    if options.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a GPU, the device is {device}")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # files and pipes have no width that a table must keep to
    with Progress() as progress:
        run = _run_models if options.kernels is None else _run_kernels
        rows = run(options, device, console, progress)
    for path in filter(None, (options.json, options.csv, options.plot)):
        console.print(f"wrote {path}", highlight=False)
    bad = sorted({f"{row['case']} ({row['note']})" for row in rows if _is_bad(row)})
    if bad:
        raise ToolError(f"our own operators, not timed: {'; '.join(bad)}")
    return 0


def _is_bad(row: Row) -> bool:
    """Whether one of our operators is wrong or failed."""
    ours = row.get("implementation", "").startswith("vitrail")
    return ours and row["p50_ms"] is None and not row["note"].startswith(("skipped", "not compiled"))


def _write_tables(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    for path, write in ((options.json, write_json), (options.csv, write_csv)):
        if path:
            write(path, rows)


def _run_models(options: argparse.Namespace, device: torch.device, console: Console, progress: Progress) -> list[Row]:
    size = options.img_size and (options.img_size[0], options.img_size[-1])
    settings = Settings(
        device=device,
        batch_size=options.batch_size or (128 if device.type == "cuda" else 8),
        img_size=size,
        precision=options.precision,
        channels_last=options.channels_last,
        train=options.mode == "train",
        compile=options.compile,
        cuda_graph=options.cuda_graph,
        min_time=options.min_time or 3.0,
    )
    names = [*options.models, *options.compare]
    rows = bench_models(names, [*options.compare, *options.models][0], settings, progress.say)
    with progress.aside():
        console.print(bench_tables.headline(rows[0]), highlight=False)
        bench_tables.show_models(console, rows)
    _write_tables(options, rows)
    if options.plot:
        bench_tables.draw_models(options.plot, rows)
    return rows


def _run_kernels(options: argparse.Namespace, device: torch.device, console: Console, progress: Progress) -> list[Row]:
    for name in options.kernels:
        if name not in OPERATORS:
            raise unknown_name("operator", name, OPERATORS)
    suite = "host" if options.host else "gpu" if device.type == "cuda" else "cpu"
    cases = [case for name in options.kernels or OPERATORS for case in OPERATORS[name](suite)]
    chosen = [case for case in cases if options.cases in case.name]
    if not chosen:
        raise UsageError(f"no case contains {options.cases!r}; there are: {'; '.join(case.name for case in cases)}")
    rows: list[Row] = []

    def done(new: list[Row]) -> None:
        with progress.aside():
            if not rows:
                console.print(bench_tables.kernel_headline(new[0]), highlight=False)
                console.print("* a part of the job only: without the change of layout that the others are timed with")
            bench_tables.show_kernels(console, new)
        rows.extend(new)
        _write_tables(options, rows)

    settings = KernelSettings(
        device=device,
        dtype=PRECISIONS[options.precision],
        min_time=options.min_time or 0.5,
        peers=options.peers,
        time_limit=options.time_limit,
        host=options.host,
    )
    bench_kernels(chosen, settings, progress.say, done)
    if options.plot:
        bench_tables.draw_kernels(options.plot, rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
