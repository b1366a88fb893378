"""Plans the training of a model on many GPUs: memory, communication, the largest batch, and which settings to use.

    vitrail-plan davit_t --gpus 64 --batch 4096 --amp bf16

Everything here is computed, nothing measured. Memory comes from running one training step (forward, loss, backward,
AdamW) without data and following every tensor, in blocks as PyTorch's allocator hands them out, for an H100; there need
not be a GPU. What cuDNN's convolutions take besides is not known without one and left out. Communication is counted in
bytes; its time is the least that links of the given speed take, with no latency. The time of the arithmetic is that of
its floating-point operations at the tensor cores' full rate. Real steps take longer, several times for small models;
`vitrail-scale` measures them.

The images are those of a classifier. Of a detector or segmenter this plans the backbone alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console

from vitrail.tools._common.cli import ArgumentParser, UsageError, run_command, unknown_name
from vitrail.tools._common.measure import environment
from vitrail.tools._common.table import Column, Row, print_table, write_json

COLUMNS = (
    Column("model", "model", left=True),
    Column("setting", "setting", left=True),
    Column("images a GPU", "batch_per_gpu"),
    Column("peak GB", "peak_bytes", lambda n: f"{n / 1e9:.2f}"),
    Column("reserved GB", "reserved_bytes", lambda n: f"{n / 1e9:.2f}"),
    Column("fits", "fits", lambda yes: "yes" if yes else "no"),
    Column("at most", "largest_batch"),
    Column("sent MB", "sent", lambda n: f"{n / 1e6:,.0f}"),
    Column("sending ms", "communication_ms", lambda x: f"{x:.2f}"),
    Column("arithmetic ms", "arithmetic_ms", lambda x: f"{x:.2f}"),
)
PARTS = (
    ("parameters", "parameters"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer state"),
    ("batch", "batch"),
    ("activations", "activations"),
    ("passing", "passing"),
    ("workspace", "workspace"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_command(lambda: _plan(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="vitrail-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name that timm.create_model knows")
    add("--gpus", type=int, default=1, help="GPUs that train together; default 1")
    add("--batch", type=int, required=True, help="images of a step on all GPUs together")
    add("--img-size", type=int, nargs="+", metavar=("H", "W"), help="default: each model's own")
    add("--amp", choices=("bf16", "fp16"), help="mixed precision (default: float32)")
    add("--sharded", action="store_true", help="only with weights and optimiser state spread (fully_shard)")
    add("--checkpointing", action="store_true", help="only with blocks computed again in the backward pass")
    add("--memory-gb", type=float, default=80.0, help="of a GPU, in 10^9 bytes; default 80")
    add("--other-gb", type=float, default=2.0, help="of that outside PyTorch's allocator: CUDA, NCCL; default 2")
    add("--gpus-per-node", type=int, default=8, help="GPUs of a host; default 8")
    add("--link-gbps", type=float, nargs=2, default=(300.0, 40.0), metavar=("INSIDE", "BETWEEN"),
        help="GB/s that a GPU sends inside its host and to others; default 300 40")  # fmt: skip
    add("--tflops", type=float, default=989.0, help="the GPU's peak in the precision; default 989 (H100, bf16)")
    add("--no-search", action="store_true", help="not the largest batches, which take most of the time")
    add("--images-per-s", type=float, help="measured training speed of one GPU: adds the efficiency to expect")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Raises `UsageError` for values that argparse lets pass."""
    for name in ("gpus", "batch", "gpus_per_node"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: at least 1")
    for name in ("memory_gb", "tflops", "images_per_s"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: more than 0")
    if min(options.link_gbps) <= 0:
        raise UsageError(f"--link-gbps is {options.link_gbps}; allowed: two numbers, each more than 0")
    if not 0 <= options.other_gb < options.memory_gb:
        raise UsageError(f"--other-gb is {options.other_gb}; allowed: 0 to less than --memory-gb {options.memory_gb}")
    if options.img_size and (len(options.img_size) > 2 or min(options.img_size) < 1):
        raise UsageError(f"--img-size is {options.img_size}; allowed: H or H W, each at least 1")
    if options.batch % options.gpus:
        raise UsageError(f"--batch is {options.batch}; allowed: multiples of --gpus {options.gpus}")
    if options.gpus > options.gpus_per_node and options.gpus % options.gpus_per_node:
        raise UsageError(f"--gpus is {options.gpus}; allowed: multiples of --gpus-per-node {options.gpus_per_node}")
    if options.sharded and options.gpus == 1:
        raise UsageError("--sharded needs --gpus of at least 2")
    for name in options.models:
        if not timm.is_model(name):
            raise unknown_name("model", name, timm.list_models())


def _plan(options: argparse.Namespace) -> int:
    from vitrail.tools._common.plan_links import Cluster
    from vitrail.tools._common.plan_settings import Limits, plan_model, recommend

    inside, between = (speed * 1e9 for speed in options.link_gbps)
    cluster = Cluster(options.gpus, min(options.gpus_per_node, options.gpus), inside, between)
    limits = Limits((options.memory_gb - options.other_gb) * 1e9, options.tflops * 1e12, options.images_per_s)
    size = options.img_size and (options.img_size[0], options.img_size[-1])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    rows: list[Row] = []
    for name in options.models:
        found = plan_model(
            name, cluster, limits, options.batch, size, options.amp, options.sharded, options.checkpointing,
            search=not options.no_search,
        )  # fmt: skip
        rows += [{**row, **_facts()} for row in found]
        _show(console, found, options)
        console.print(f"{name}: {recommend(found)}\n")
        if options.json:
            write_json(options.json, rows)
    if options.json:
        console.print(f"wrote {options.json}")
    return 0


def _facts() -> Row:
    """Software that the figures depend on, and when they were computed."""
    facts = environment(torch.device("cpu"))
    return {name: facts[name] for name in ("torch", "triton", "timm", "vitrail", "commit", "date")}


def _show(console: Console, rows: Sequence[Row], options: argparse.Namespace) -> None:
    first = rows[0]
    size = "x".join(map(str, first["img_size"]))
    hosts = f"{options.gpus} GPUs, {first['gpus_per_host']} a host"
    title = f"computed, not measured: {options.batch} images of {size}, {options.amp or 'float32'}, {hosts}"
    columns = list(COLUMNS)
    if options.images_per_s:
        columns.append(Column("efficiency", "efficiency", lambda pair: f"{pair[0]:.0%} to {pair[1]:.0%}"))
    print_table(console, title, columns, rows)
    parts = [Column("setting", "setting", left=True)]
    parts += [Column(f"{title} MB", key, lambda n: f"{n / 1e6:,.0f}") for title, key in PARTS]
    print_table(console, "what the peak consists of", parts, [{**row, **row["parts"]} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
