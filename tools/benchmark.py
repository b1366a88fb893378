"""Measures models, or with --kernels operators: speed, memory, work; side by side and in alternation.

    vitrail-benchmark biformer_s davit_t --compare timm/davit_tiny --batch-size 64 --precision bf16
    vitrail-benchmark --kernels window_attention --json kernels.json --plot kernels.png

Models have random weights. Throughput is the batch size over the median latency. `speed` is the median, over rounds
in which all models had their turn, of the reference's time over the model's; the reference is the first --compare
model, else the first model. Training is forward, cross-entropy and backward, without an optimiser's step. --compile
measures each model eager and compiled. GMACs are multiply-adds of one image's forward pass. Peak memory, on GPUs only,
is what a step allocates at most, with the model's own weights.

Operators are checked against a float64 reference, output and gradients, before they are timed; a wrong one of ours
ends the command with status 1. The floor is the time in which their inputs could be read once and their results
written once, at the speed of a large copy; `bandwidth` is the floor's share of the time. `ours is` tells how many times
as fast as the row's implementation ours is. On a GPU all are replayed as CUDA graphs, on inputs that rotate where they
would stay in the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from vitrail.tools._common.bench_kernels import bench_kernels
from vitrail.tools._common.bench_models import PRECISIONS, Settings, bench_models
from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command, select_device, unknown_name
from vitrail.tools._common.kernel_cases import OPERATORS
from vitrail.tools._common.table import Bar, Column, Row, print_table, write_bars, write_csv, write_json

Report = Callable[[str], None]

MODEL_COLUMNS = (
    Column("model", "label", left=True),
    Column("size", "size"),
    Column("params M", "parameters", lambda n: f"{n / 1e6:.2f}"),
    Column("GMACs", "flops", lambda n: f"{n / 2e9:.2f}"),
    Column("images/s", "images_per_s", lambda x: f"{x:,.1f}"),
    Column("p20 ms", "latency_p20_ms", lambda x: f"{x:.2f}"),
    Column("p50 ms", "latency_p50_ms", lambda x: f"{x:.2f}"),
    Column("p80 ms", "latency_p80_ms", lambda x: f"{x:.2f}"),
    Column("memory MB", "peak_memory_bytes", lambda n: f"{n / 1e6:,.0f}"),
    Column("speed", "speed_ratio", lambda x: f"{x:.2f}x"),
)
KERNEL_COLUMNS = (
    Column("implementation", "label", left=True),
    Column("error", "relative_error", lambda x: f"{x:.1e}"),
    Column("p20 ms", "p20_ms", lambda x: f"{x:.4f}"),
    Column("p50 ms", "p50_ms", lambda x: f"{x:.4f}"),
    Column("p80 ms", "p80_ms", lambda x: f"{x:.4f}"),
    Column("bandwidth", "bandwidth_share", lambda x: f"{x:.0%}"),
    Column("ours is", "ours_speedup", lambda x: f"{x:.2f}x"),
)


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
    if options.kernels is not None and options.precision == "amp-bf16":
        raise UsageError("--kernels takes inputs of one dtype; allowed precisions: float32, bf16, fp16")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; allowed: at least 1")
    if options.min_time is not None and not options.min_time > 0:
        raise UsageError(f"--min-time is {options.min_time}; allowed: more than 0 seconds")
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
    with Console(stderr=True).status("starting") as status:
        run = _run_models if options.kernels is None else _run_kernels
        rows = run(options, device, status.update)
    (_show_models if options.kernels is None else _show_kernels)(console, rows, options.plot)
    for path, write in ((options.json, write_json), (options.csv, write_csv)):
        if path:
            write(path, rows)
    for path in filter(None, (options.json, options.csv, options.plot)):
        console.print(f"wrote {path}", highlight=False)
    wrong = sorted(
        {r["case"] for r in rows if not r.get("correct", True) and r["implementation"].startswith("vitrail")}
    )
    if wrong:
        raise ToolError(f"wrong results, not timed, of our own operators: {'; '.join(wrong)}")
    return 0


def _run_models(options: argparse.Namespace, device: torch.device, report: Report) -> list[Row]:
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
    return bench_models(names, [*options.compare, *options.models][0], settings, report)


def _run_kernels(options: argparse.Namespace, device: torch.device, report: Report) -> list[Row]:
    for name in options.kernels:
        if name not in OPERATORS:
            raise unknown_name("operator", name, OPERATORS)
    cases = [case for name in options.kernels or OPERATORS for case in OPERATORS[name](device.type)]
    chosen = [case for case in cases if options.cases in case.name]
    if not chosen:
        raise UsageError(f"no case contains {options.cases!r}; there are: {'; '.join(case.name for case in cases)}")
    return bench_kernels(chosen, device, PRECISIONS[options.precision], options.min_time or 0.5, report)


def _headline(row: Row) -> str:
    software = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "timm") if row[name])
    threads = f" ({row['threads']} threads)" if row["threads"] else ""
    return f"{row['device']}{threads}; {software}; commit {row['commit'] or 'unknown'}"


def _show_models(console: Console, rows: list[Row], plot: Path | None) -> None:
    first = rows[0]
    work = f"{first['mode']}, batch {first['batch_size']}, {first['precision']}"
    work += ", channels last" * first["channels_last"] + ", CUDA graph" * first["cuda_graph"]
    shown = [
        {**r, "label": r["model"] + " (compiled)" * (r["variant"] == "compiled"), "size": f"{r['height']}x{r['width']}"}
        for r in rows
    ]
    console.print(_headline(first), highlight=False)
    print_table(console, f"{work}; speed against {first['reference']}", MODEL_COLUMNS, shown)
    if plot:
        axis = "images per second (line: 20th to 80th percentile)"
        write_bars(plot, f"{work}\n{_headline(first)}", axis, [_model_bar(row) for row in shown])


def _model_bar(row: Row) -> Bar:
    low, high = (row["batch_size"] / row[key] * 1e3 for key in ("latency_p80_ms", "latency_p20_ms"))
    speed = row["images_per_s"]
    note = f"{speed:,.0f}/s, {row['speed_ratio']:.2f}x, {row['flops'] / 2e9:.1f} GMACs"
    return Bar("", row["label"], speed, low, high, note)


def _show_kernels(console: Console, rows: list[Row], plot: Path | None) -> None:
    first = rows[0]
    headline = f"{_headline(first)}; {first['dtype']}, copy {first['copy_bytes_per_s'] / 1e9:,.0f} GB/s"
    console.print(headline, highlight=False)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row['operator']} {row['case']} {row['pass']}"
        wrong = "" if row["correct"] else " WRONG"
        groups.setdefault(title, []).append(
            {**row, "label": row["implementation"] + "*" * (not row["whole_job"]) + wrong}
        )
    for title, members in groups.items():
        print_table(console, f"{title}, floor {members[0]['floor_ms']:.4f} ms", KERNEL_COLUMNS, members)
    console.print("* a part of the job only: without the change of layout that the others are timed with")
    if plot:
        timed = {title: [row for row in members if row["correct"]] for title, members in groups.items()}
        axis = "time, in multiples of the floor: memory traffic alone (line: 20th to 80th percentile)"
        bars = [_kernel_bar(title, row) for title, members in timed.items() for row in members]
        write_bars(plot, headline, axis, bars, limit=1.0)


def _kernel_bar(title: str, row: Row) -> Bar:
    middle, low, high = (row[key] / row["floor_ms"] for key in ("p50_ms", "p20_ms", "p80_ms"))
    return Bar(title, row["label"], middle, low, high, f"{row['p50_ms']:.3f} ms, {row['bandwidth_share']:.0%}")


if __name__ == "__main__":
    sys.exit(main())
