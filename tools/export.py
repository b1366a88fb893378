"""Writes a model for other runtimes and compares the file with the model: `vitrail.tools.export davit_t --dynamic`.

    python -m vitrail.tools.export biformer_s --format onnx --dynamic --checkpoint runs/mine/model.safetensors

The file holds standard operators only. `--dynamic` lets batch, height and width vary: of ONNX and TorchScript files to
any size from the one that the command prints, of exported programs to multiples of what it prints. After writing, the
file is run on the CPU on made-up images; the command fails where its output differs from the model's by more than 1e-4
of what the images change in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console
from torch import nn

from vitrail.tools._common import export, export_table
from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command
from vitrail.tools._common.entry_points import check_takes_images
from vitrail.tools._common.table import Column, print_table

_COLUMNS = (
    Column("batch x channels x height x width", "shape", lambda shape: " x ".join(map(str, shape)), left=True),
    Column("largest difference", "error", lambda x: f"{x:.1e}"),
    Column("relative", "relative", lambda x: f"{x:.1e}"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _export(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="vitrail-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="a model name of vitrail")
    add("--format", choices=tuple(export.FORMATS), default="onnx", help="default: onnx")
    add("--dynamic", action="store_true", help="let batch size, height and width vary")
    add("-o", "--output", type=Path, metavar="FILE", help="default: MODEL with the format's ending")
    add("--checkpoint", type=Path, metavar="FILE", help="weights (default: random ones, none of them idle)")
    add("--pretrained", action="store_true", help="use the weights that timm fetches")
    add("--num-classes", type=int, help="width of the classifier, 0 for none (default: the model's own)")
    add("--img-size", type=int, nargs="+", metavar=("H", "W"), help="default: the model's own")
    add("--batch-size", type=int, help="images in a batch of a file that is not dynamic (default: 1)")
    add("--json", type=Path, metavar="FILE", help="add the figures of the comparison to the list in this file")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Raises `UsageError` for values that argparse lets pass."""
    check_takes_images(options.model)
    if options.img_size and (len(options.img_size) > 2 or min(options.img_size) < 1):
        raise UsageError(f"--img-size is {options.img_size}; allowed: H or H W, each at least 1")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; allowed: at least 1")
    if options.batch_size is not None and options.dynamic:
        raise UsageError("--batch-size fixes the batch, --dynamic lets it vary; give one of them")
    if options.num_classes is not None and options.num_classes < 0:
        raise UsageError(f"--num-classes is {options.num_classes}; allowed: 0 (no classifier) or more")
    if options.checkpoint and options.pretrained:
        raise UsageError("--checkpoint and --pretrained both name weights; give one of them")
    if options.json and options.json.exists():
        export_table.read_rows(options.json)  # raises before the work where the file holds something else


def _export(options: argparse.Namespace) -> int:
    export.require_packages(options.format)
    model = _build(options)
    size = _choose_size(options, model)
    path = options.output or Path(options.model + export.FORMATS[options.format])
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output is {path}, whose folder does not exist")
    batch_size = options.batch_size or (2 if options.dynamic else 1)
    start = time.perf_counter()
    export.write_model(model, path, options.format, size, options.dynamic, batch_size)
    seconds = time.perf_counter() - start
    shapes = export.shapes_to_try(model, options.format, size, options.dynamic, batch_size)
    checks = export.verify_file(model, path, options.format, shapes)
    console = Console(highlight=False, soft_wrap=True)
    print_table(console, f"{path} against {options.model}, on the CPU", _COLUMNS, [c._asdict() for c in checks])
    for check in checks:
        if check.note:
            console.print(f"batch {' x '.join(map(str, check.shape))}: {check.note}")
    worst = max(check.relative for check in checks)
    if not worst <= export.TOLERANCE:
        raise ToolError(
            f"{path} differs from the model by {worst:.1e} of what images change in its output; "
            f"allowed: {export.TOLERANCE:.0e}"
        )
    if options.json:
        facts = {"bytes": path.stat().st_size, "seconds": seconds, "weights": _describe_weights(options)}
        row = export_table.make_row(options.model, options.format, options.dynamic, checks, **facts)
        export_table.add_row(options.json, row)
    console.print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB; {_describe_sizes(options, model, size)}")
    return 0


def _build(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    arguments = {} if options.num_classes is None else {"num_classes": options.num_classes}
    try:
        model = timm.create_model(options.model, pretrained=options.pretrained, **arguments)
    except RuntimeError as error:  # timm's, for a tag without weights
        raise UsageError(str(error)) from error
    if options.checkpoint:
        from vitrail.models.mm.checkpoint import convert_for, load_strictly, read_weights, refuse_untrained_parts

        with refuse_untrained_parts(f"checkpoint {options.checkpoint}"):
            weights = convert_for(model, read_weights(options.checkpoint))
        load_strictly(model, weights, options.checkpoint)
    elif not options.pretrained:
        export.wake_idle_parts(model, model.default_cfg["input_size"][0])
    return model.eval()


def _describe_weights(options: argparse.Namespace) -> str:
    if options.checkpoint:
        return options.checkpoint.name
    return "pretrained" if options.pretrained else "random"


def _choose_size(options: argparse.Namespace, model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width to record at: as asked, else the model's own, enlarged where windows would shrink."""
    channels, height, width = model.default_cfg["input_size"]
    least = export.least_size(model, options.format) if options.dynamic else 1
    if options.img_size:
        height, width = options.img_size[0], options.img_size[-1]
        if min(height, width) < least and options.format != "exported-program":
            raise UsageError(f"--img-size is {options.img_size}; allowed for {options.model} --dynamic: from {least}")
    elif options.dynamic:
        height, width = max(height, least, 64), max(width, least, 64)
    return channels, height, width


def _describe_sizes(options: argparse.Namespace, model: nn.Module, size: tuple[int, int, int]) -> str:
    if not options.dynamic:
        return f"takes {options.batch_size or 1} x {' x '.join(map(str, size))}"
    least = export.least_size(model, options.format)
    if options.format == "exported-program":
        unit = export.dynamic_unit(model)
        return f"takes any batch size, and heights and widths that are multiples of {unit} from {least} on"
    return f"takes any batch size, and any height and width from {max(least, 32)} on"


if __name__ == "__main__":
    sys.exit(main())
