"""Measures how the training of models scales over the GPUs of a machine, or of several.

    torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m vitrail.tools.scale biformer_s --amp bf16

(Without --local-addr, torchrun hands its processes the machine's name, and where nothing resolves that name they wait
for each other until the rendezvous times out.)

The step is that of `vitrail-train` (forward, loss, backward, AdamW) on made-up images that lie on the device. Weak
scaling keeps the images a process, strong scaling those of all processes together; efficiency is the speed over that of
one process times their number. All settings have their turns in alternation, within one run, so that a machine whose
clock drifts does no harm; while fewer processes work, the others sleep. Peak memory is that of one process.

A step launched operation by operation is often limited by the host, which several processes share: then efficiency says
more about the host than about the GPUs and their links. With --cuda-graph the same step is measured as a CUDA graph,
too, which needs no host. --json FILE is written anew after every round, so that a run that is cut keeps what it has.

Loss curves with the same global batches show that several processes do the training of one. Their batch norms see all
processes' images on GPUs; on CPUs, for which PyTorch has none of these, models with batch norms differ.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console

from vitrail.tools._common.cli import ArgumentParser, UsageError, run_command, select_device, unknown_name
from vitrail.tools._common.table import Column, Row, print_table, write_json

SPEED_COLUMNS = (
    Column("model", "model", left=True),
    Column("mode", "mode", left=True),
    Column("scaling", "scaling"),
    Column("launch", "launch"),
    Column("processes", "processes"),
    Column("images each", "batch_per_process"),
    Column("images/s", "images_per_s", lambda x: f"{x:,.1f}"),
    Column("ms a step", "step_ms", lambda x: f"{x:.2f}"),
    Column("efficiency", "efficiency", lambda x: f"{x:.1%}"),
    Column("memory MB", "peak_memory_bytes", lambda n: f"{n / 1e6:,.0f}"),
)
LOSS_COLUMNS = (
    Column("model", "model", left=True),
    Column("mode", "mode", left=True),
    Column("precision", "precision"),
    Column("processes", "processes"),
    Column("images each", "batch_per_process"),
    Column("first loss", "first", lambda x: f"{x:.6f}"),
    Column("last loss", "last", lambda x: f"{x:.6f}"),
    Column("largest deviation", "deviation", lambda x: f"{x:.1e}"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_command(lambda: _scale(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="vitrail-scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name that timm.create_model knows")
    add("--batch-size", type=int, default=128, help="images a process (weak) or in all (strong); default 128")
    add("--img-size", type=int, nargs="+", metavar=("H", "W"), help="default: each model's own")
    add("--amp", choices=("bf16", "fp16"), help="mixed precision (default: float32)")
    add("--processes", type=int, nargs="+", help="numbers to compare with one (default: 2, 4, ... and all)")
    add("--sharded", action="store_true", help="also spread parameters and optimiser state (fully_shard)")
    add("--sync-bn", action="store_true", help="batch norms see the images of all processes in what is timed, too")
    add("--compile", action="store_true", help="compile the models")
    add("--cuda-graph", action="store_true", help="measure the step of replicas as a CUDA graph, too")
    add("--bucket-mb", type=float, default=25.0, help="pieces in which the gradients of replicas travel; default 25")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--steps", type=int, default=8, help="training steps a round (default 8)")
    add("--rounds", type=int, default=5, help="rounds of all settings (default 5)")
    add("--check-steps", type=int, default=20, help="length of the loss curves (default 20; 0 for none)")
    add("--check-float32", action="store_true", help="loss curves in float32, too; its kernels take long to compile")
    add("--check-batch", type=int, default=64, help="images in all processes together in the curves (default 64)")
    add("--time-limit", type=float, metavar="S", help="begin no further round and no further curve after S seconds")
    add("--json", type=Path, metavar="FILE", help="write all figures, with device, versions and commit, as they come")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Raises `UsageError` for values that argparse lets pass."""
    for name in ("batch_size", "steps", "rounds", "check_batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: at least 1")
    for name in ("bucket_mb", "time_limit"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: more than 0")
    if options.check_steps < 0:
        raise UsageError(f"--check-steps is {options.check_steps}; allowed: at least 0")
    if options.img_size and (len(options.img_size) > 2 or min(options.img_size) < 1):
        raise UsageError(f"--img-size is {options.img_size}; allowed: H or H W, each at least 1")
    if options.cuda_graph and (options.compile or options.amp == "fp16"):
        raise UsageError(
            "--cuda-graph goes with neither --compile nor --amp fp16, which asks the host about every step"
        )
    if options.sharded and options.amp == "fp16":
        raise UsageError("--sharded does not scale losses, which --amp fp16 needs; use --amp bf16")
    for name in options.models:
        if not timm.is_model(name):
            raise unknown_name("model", name, timm.list_models())


def _scale(options: argparse.Namespace) -> int:
    if "WORLD_SIZE" not in os.environ:
        launcher = "torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node N"
        raise UsageError(f"start it by torchrun: {launcher} -m vitrail.tools.scale ...")
    world = int(os.environ["WORLD_SIZE"])
    processes = sorted({2**i for i in range(1, world.bit_length()) if 2**i <= world} | {world})
    processes = sorted(set(options.processes or processes))
    if processes[0] < 1 or processes[-1] > world:
        raise UsageError(f"--processes is {processes}; allowed: 1 to {world}, which torchrun started")
    device = select_device(options.device)
    if options.amp == "fp16" and device.type != "cuda":
        raise UsageError(f"--amp fp16 needs a CUDA GPU, the device is {device}; use --amp bf16")
    if options.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a CUDA GPU, the device is {device}")

    from vitrail.models.mm.runner import start_processes
    from vitrail.tools._common.bench_scaling import Results, Settings, bench_scaling

    console = Console(quiet=os.environ.get("RANK") != "0")
    if not console.is_terminal:
        console.width = max(console.width, 130)
    device = start_processes("pytorch", device)
    size = options.img_size and (options.img_size[0], options.img_size[-1])
    settings = Settings(
        device, options.batch_size, size, options.amp, tuple(processes), options.sharded, options.sync_bn,
        options.compile, options.cuda_graph, options.bucket_mb, options.steps, options.rounds, options.check_steps,
        options.check_batch, options.check_float32, options.time_limit,
    )  # fmt: skip
    results = Results(lambda speeds, curves: _save(options, speeds, curves))
    try:
        bench_scaling(options.models, settings, lambda text: console.print(text, highlight=False), results)
    finally:
        torch.distributed.destroy_process_group()
    _show(console, results.speeds, results.curves, options)
    return 0


def _save(options: argparse.Namespace, speeds: list[Row], curves: list[Row]) -> None:
    if options.json and os.environ["RANK"] == "0":
        write_json(options.json, [*speeds, *curves])


def _show(console: Console, speeds: list[Row], curves: list[Row], options: argparse.Namespace) -> None:
    first = speeds[0]
    software = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "timm") if first[name])
    console.print(f"{first['device']}; {software}; commit {first['commit'] or 'unknown'}", highlight=False)
    size = "x".join(map(str, options.img_size)) if options.img_size else "each model's own size"
    print_table(console, f"training, {options.amp or 'float32'}, {size}", SPEED_COLUMNS, speeds)
    if curves:
        print_table(console, f"losses of {options.check_steps} steps against one process", LOSS_COLUMNS, curves)
    if options.json:
        console.print(f"wrote {options.json}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
