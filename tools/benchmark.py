"""Measures models, or with --kernels operators: speed, memory, work; side by side and in alternation.

    vitrail-benchmark biformer_s davit_t --compare timm/davit_tiny --batch-size 64 --precision bf16
    vitrail-benchmark --models --precision bf16 --json models.json
    vitrail-benchmark --kernels window_attention --json kernels.json --plot kernels.png

Models have random weights. Throughput is the batch size over the median latency. `speed` is the median, over rounds
in which all models had their turn, of the reference's time over the model's, both running in the same way; the
reference is the first --compare model, else the first model. Training is forward, cross-entropy and backward, without
an optimiser's step. --compile measures each model eager and compiled. GMACs are multiply-adds of one image's forward
pass. Peak memory, on GPUs only, is what a step allocates at most, with the model's own weights. --models measures a
fixed list, or the models it names, for inference and training, on GPUs eager, compiled and as CUDA graphs, each in
alternation with timm's Swin-T. A model of ours is timed only if its logits are those of its definition in float64.

Operators are checked against a float64 reference, output and gradients, on at most four images of the batch, before
they are timed; a wrong one of ours ends the command with status 1. The floor is the time in which their inputs could
be read once and their results written once, at the speed of a large copy; `bandwidth` is the floor's share of the
time. The picture's roof is the floor, or where that is longer, the time of as many operations in a large matrix
product. `ours is` tells how many times as fast as the row's implementation ours is. On a GPU all are replayed as CUDA
graphs, on inputs that rotate where they would stay in the cache. Memory, on GPUs only, is what a call allocates at
most. --host measures instead how long a call keeps the host, on the smallest maps.

Results of --kernels and --models are shown and written as they come: a run that is cut off keeps what it has.
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
from vitrail.tools._common.bench_models import SUITE, bench_models, bench_suite
from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command, select_device
from vitrail.tools._common.kernel_cases import OPERATORS, choose_cases
from vitrail.tools._common.measure import after
from vitrail.tools._common.progress import Progress
from vitrail.tools._common.ready_models import PRECISIONS, SOURCES, Settings, Variant
from vitrail.tools._common.table import Row, write_csv, write_json
from vitrail.tools._common.turns import Turns


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
        help="a name that timm.create_model knows, with arguments as in biformer_s:n_win=16; "
        + "; ".join(f"{kind}/NAME is {meaning}" for kind, meaning in SOURCES.items()),
    )
    add("--compare", nargs="+", default=[], metavar="MODEL", help="more models; the first is the reference of `speed`")
    add(
        "--models",
        dest="suite",
        nargs="*",
        metavar="MODEL",
        help=f"measure these models in all ways; default: {', '.join(SUITE)}",
    )
    add(
        "--kernels", nargs="*", metavar="NAME", help=f"measure operators instead: {', '.join(OPERATORS)} (default: all)"
    )
    add(
        "--cases",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="with --kernels: only these cases, or those whose operator and name contain the text",
    )
    add("--part", metavar="I/N", help="with --kernels: every N-th case from the I-th, so that N GPUs share the work")
    add(
        "--turns",
        type=Turns,
        default=Turns(),
        metavar="FILE",
        help="processes on one GPU that are given the same file prepare at the same time and measure one at a time",
    )
    add(
        "--peers",
        choices=PEERS,
        default="all",
        help="with --kernels or --models: fast leaves out what torch.compile makes, none measures ours alone",
    )
    add("--host", action="store_true", help="with --kernels: time of the calls on the host, on the smallest maps")
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="after this time --kernels prepares no more peers, --models compiles no more",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add("--batch-size", type=int, help="images in a batch of models (default: 128 on a GPU, 8 on a CPU)")
    add("--img-size", type=int, nargs="+", metavar=("H", "W"), help="default: each model's own")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    add("--mode", choices=("infer", "train"), help="default: infer; both with --models")
    add("--channels-last", action="store_true", help="weights and images in channels-last layout")
    add("--compile", action="store_true", help="measure each model eager and with torch.compile")
    add("--cuda-graph", action="store_true", help="replay each step as a CUDA graph, without the host's work")
    add(
        "--min-time",
        type=float,
        help="seconds of measurement for each model (default 3; 0.5 with --models) or kernel and pass (0.5)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures, with device, versions and commit")
    add("--csv", type=Path, metavar="FILE", help="the same as a table")
    add("--plot", type=Path, metavar="FILE", help="write a picture (.png, .svg or .pdf)")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Raises `UsageError` for values that argparse lets pass."""
    _check_kinds(options)
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


def _check_kinds(options: argparse.Namespace) -> None:
    """Raises `UsageError` where options belong to different kinds of measurement."""
    kinds = [bool(options.models), options.suite is not None, options.kernels is not None]
    if not any(kinds):
        raise UsageError("name at least one model, or give --models or --kernels")
    if sum(kinds) > 1 or (options.kernels is not None and options.compare):
        raise UsageError("names of models, --models and --kernels exclude each other")
    if options.kernels is None and (options.host or options.cases or options.part):
        raise UsageError("--host, --cases and --part belong to --kernels")
    if options.models and (options.peers != "all" or options.time_limit is not None):
        raise UsageError("--peers and --time-limit belong to --models or --kernels")
    if options.suite is not None and (options.compile or options.cuda_graph):
        raise UsageError(
            "--models measures compiled models and CUDA graphs anyway; --peers fast leaves out compiled ones"
        )


def _benchmark(options: argparse.Namespace) -> int:
    device = select_device(options.device)
    if options.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a GPU, the device is {device}")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # files and pipes have no width that a table must keep to
    with Progress() as progress, options.turns:
        run = _run_models if options.models else _run_kernels if options.suite is None else _run_suite
        rows = run(options, device, console, progress)
    for path in filter(None, (options.json, options.csv, options.plot)):
        console.print(f"wrote {path}", highlight=False)
    bad = sorted({f"{row.get('case') or row['model']} ({row['note']})" for row in rows if _is_bad(row)})
    if bad:
        raise ToolError(f"our own, not timed: {'; '.join(bad)}")
    return 0


def _is_bad(row: Row) -> bool:
    """Whether a model or one of our operators is wrong, or one of ours failed."""
    if row.get("correct") is False and "model" in row:
        return True
    ours = row.get("implementation", "").startswith("vitrail")
    return ours and row["p50_ms"] is None and not row["note"].startswith(("skipped", "not compiled"))


def _write_tables(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    for path, write in ((options.json, write_json), (options.csv, write_csv)):
        if path:
            write(path, rows)


def _run_models(options: argparse.Namespace, device: torch.device, console: Console, progress: Progress) -> list[Row]:
    graph = options.cuda_graph
    variants = (Variant(graph=graph), Variant(True, graph)) if options.compile else (Variant(graph=graph),)
    settings = _settings(options, device, variants, options.mode == "train", 3.0)
    names = [*options.models, *options.compare]
    rows = bench_models(names, [*options.compare, *options.models][0], settings, progress.say)
    with progress.aside():
        console.print(bench_tables.headline(rows[0]), highlight=False)
        bench_tables.show_models(console, rows)
    _write_tables(options, rows)
    if options.plot:
        bench_tables.draw_models(options.plot, rows)
    return rows


def _run_suite(options: argparse.Namespace, device: torch.device, console: Console, progress: Progress) -> list[Row]:
    names = [*(options.suite or SUITE), *options.compare]
    if options.peers == "none":
        names = [name for name in names if "/" not in name]
    if not names:
        raise UsageError("--peers none leaves no model to measure")
    reference = next((n for n in (*options.compare, *names) if n in options.compare or n.startswith("timm/")), names[0])
    variants = tuple(
        Variant(compiled, graph)
        for compiled in (False, True)
        for graph in (False, True)
        if not (compiled or graph) or (device.type == "cuda" and not (compiled and options.peers == "fast"))
    )
    rows: list[Row] = []

    def done(new: list[Row]) -> None:
        with progress.aside():
            if not rows:
                console.print(bench_tables.headline(new[0]), highlight=False)
            bench_tables.show_models(console, new)
        rows.extend(new)
        _write_tables(options, rows)

    late = after(options.time_limit)
    for train in (False, True):
        if options.mode in (None, "train" if train else "infer"):
            settings = _settings(options, device, variants, train, 0.5)
            bench_suite(names, reference, settings, progress.say, done, late)
    console.print("together:")
    bench_tables.show_models(console, rows)
    if options.plot:
        bench_tables.draw_models(options.plot, rows)
    return rows


def _settings(
    options: argparse.Namespace, device: torch.device, variants: tuple[Variant, ...], train: bool, min_time: float
) -> Settings:
    return Settings(
        device=device,
        batch_size=options.batch_size or (128 if device.type == "cuda" else 8),
        img_size=options.img_size and (options.img_size[0], options.img_size[-1]),
        precision=options.precision,
        channels_last=options.channels_last,
        train=train,
        min_time=options.min_time or min_time,
        variants=variants,
        turns=options.turns,
    )


def _run_kernels(options: argparse.Namespace, device: torch.device, console: Console, progress: Progress) -> list[Row]:
    suite = "cpu" if device.type == "cpu" else "host" if options.host else "gpu"
    chosen = choose_cases(options.kernels, suite, options.cases, options.part)
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
        late=after(options.time_limit),
        host=options.host,
        turns=options.turns,
    )
    bench_kernels(chosen, settings, progress.say, done)
    if options.plot:
        bench_tables.draw_kernels(options.plot, rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
