"""Pretrained weights: `python -m vitrail.tools.weights list | fetch | convert | verify`.

| command | does |
|---|---|
| `list [PATTERN]` | which weights there are of every model, where, how they are checked; `--try` asks the servers |
| `fetch NAME[.TAG]` | downloads and verifies them; goes on where an earlier download was cut |
| `convert NAME FILE` | turns an official checkpoint into a safetensors file in this package's layout |
| `verify FILE` | checks a file: structure, SHA-256, whether it fits a model; `--golden` proves a conversion |

`vitrail.models._weights` says which environment variables name a mirror or switch the network off.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from torch import Tensor

import vitrail
from vitrail.models import _weights
from vitrail.models._fetch import fetch, file_digest, verify
from vitrail.models._registry import is_shipped
from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command, unknown_name
from vitrail.tools._common.entry_points import find_configuration
from vitrail.tools._common.golden import CASES, filled_checkpoint, golden_folder
from vitrail.tools._common.table import Column, _write, print_table
from vitrail.tools._common.weight_sources import ask_server, sources

_TOLERANCE = 1e-8  # relative, in float64
_PIPE_WIDTH = 250  # where no terminal limits the lines
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-weights", description="List, fetch, convert and verify pretrained weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="where the weights of every model lie")
    listing.add_argument("pattern", nargs="?", default="*", help="shell-style pattern of names, or of names with tags")
    listing.add_argument("--try", action="store_true", dest="ask", help="ask the servers whether the files are there")
    listing.add_argument("--json", action="store_true", help="rows as JSON")
    listing.set_defaults(command=_list)

    fetching = commands.add_parser("fetch", help="download and verify")
    fetching.add_argument("model", help="name, or name.tag")
    fetching.add_argument("--to", metavar="FOLDER", help="default: torch's cache of checkpoints")
    fetching.add_argument("--url", help="another address of the same file")
    fetching.add_argument("--sha256", help="digest that a file from --url must have")
    fetching.set_defaults(command=_fetch)

    converting = commands.add_parser("convert", help="official checkpoint to safetensors in this package's layout")
    converting.add_argument("model", help="name, or name.tag")
    converting.add_argument("file")
    converting.add_argument("--output", metavar="FILE",
                            help="default: MODEL.safetensors; VITRAIL_WEIGHTS_URL wants name and tag")  # fmt: skip
    converting.add_argument("--wrapper", choices=_weights.WRAPPERS, help="which set of weights, if there are several")
    converting.add_argument("--dtype", choices=_DTYPES, help="default: that of the checkpoint")
    converting.set_defaults(command=_convert)

    verifying = commands.add_parser("verify", help="check a file")
    verifying.add_argument("file", nargs="?")
    verifying.add_argument("--sha256", help="the digest that it must have")
    verifying.add_argument("--model", help="the model that it must fit")
    verifying.add_argument("--golden", action="store_true",
                           help="without FILE: prove the conversion of --model by its golden case")  # fmt: skip
    verifying.set_defaults(command=_verify)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def run() -> int | None:
        options = build_parser().parse_args(argv)
        return options.command(options)

    return run_command(run)


def _list(options: argparse.Namespace) -> int:
    rows = sources(options.pattern)
    if not rows:
        raise unknown_name("model", options.pattern, vitrail.list_models())
    titles = ["name", "access", "place", "checked", "license"]
    if options.ask:
        if _weights.is_offline():
            raise UsageError("--try asks servers, and the network is switched off in the environment")
        rows = [{**row, "answer": ask_server(row)} for row in rows]
        titles.insert(4, "answer")
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    columns = [Column(title, title, left=True) for title in titles]
    print_table(console, "pretrained weights", columns, rows)
    for note in dict.fromkeys(row["notes"] for row in rows if row["notes"]):
        names = ", ".join(row["name"] for row in rows if row["notes"] == note)
        console.print(f"{names}: {note}", markup=False)
    if any(row["access"] == "by hand" for row in rows):
        console.print("A file fetched by hand: vitrail-weights convert NAME FILE", markup=False)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    name, cfg = find_configuration(options.model)
    if options.sha256 and not options.url:
        raise UsageError("--sha256 is the digest of a file from --url; other files are checked by themselves")
    console = Console(highlight=False, soft_wrap=True)
    with _Bar(console) as progress:
        if options.url:
            folder = options.to or Path(torch.hub.get_dir()) / "checkpoints"
            path = fetch(options.url, folder, sha256=options.sha256, progress=progress)
        else:
            path = _weights.locate(name, cfg, options.to, progress)
            if options.to and is_shipped(cfg):
                Path(options.to).mkdir(parents=True, exist_ok=True)
                path = Path(shutil.copy(path, options.to))
    console.print(f"{path}  {path.stat().st_size:,} bytes\nSHA-256 {file_digest(path)}", markup=False)
    return 0


def _convert(options: argparse.Namespace) -> int:
    name, _ = find_configuration(options.model)
    checkpoint = _weights.read_checkpoint(options.file)
    model, weights = _weights.convert(name, checkpoint, options.wrapper)
    if options.dtype:
        weights = _cast(weights, _DTYPES[options.dtype])
    output = Path(options.output or f"{options.model}.safetensors")
    if output.suffix != ".safetensors":
        raise UsageError(f"--output is {output}; allowed: a name that ends in .safetensors")
    _write(output, safetensors.torch.save(weights, {"format": "pt", "architecture": name}))
    digest = file_digest(output)
    _write(output.with_name(f"{output.name}.sha256"), f"{digest}  {output.name}\n".encode())
    print(f"{output}  {output.stat().st_size:,} bytes, {model.num_classes} classes\nSHA-256 {digest}")
    folder = golden_folder()
    if folder is None or name not in CASES:
        print("parity not checked: there is no golden case of this model here")
        return 0
    return _prove(name, folder)


def _verify(options: argparse.Namespace) -> int:
    if options.golden:
        if options.file:
            raise UsageError("--golden proves the conversion of a model by itself; leave FILE out")
        return _verify_golden(options.model)
    if not options.file:
        raise UsageError("give FILE, or --golden with --model")
    verify(options.file, options.sha256)
    weights = _weights.read_checkpoint(options.file)
    if options.model:
        name, _ = find_configuration(options.model)
        _weights.convert(name, weights)
    print(f"{options.file} is whole" + (f" and fits {options.model}" if options.model else ""))
    print(f"SHA-256 {file_digest(options.file)}")
    return 0


def _verify_golden(name: str | None) -> int:
    folder = golden_folder()
    if folder is None:
        raise ToolError("there are no golden cases here; VITRAIL_SHARED names the folder that holds 'golden'")
    if name not in CASES:
        given = "--golden wants --model" if name is None else f"--model is {name!r}"
        raise UsageError(f"{given}; golden cases exist for {', '.join(CASES)}")
    return _prove(name, folder)


def _prove(name: str, folder: Path) -> int:
    error = conversion_error(name, folder)
    print(f"parity: an official checkpoint of {name} filled by the golden recipe, converted, gives the official logits "
          f"to {error:.1e} relative in float64")  # fmt: skip
    if not error < _TOLERANCE:
        raise ToolError(f"the conversion of {name} is wrong: {error:.1e}, allowed {_TOLERANCE:.0e}")
    return 0


def conversion_error(name: str, folder: Path, wrap: Callable[[Mapping[str, Tensor]], object] | None = None) -> float:
    """Largest error of the logits after a golden checkpoint went through files as `convert` does, relative.

    Args:
        name: A model of `CASES`.
        folder: Folder of the golden cases.
        wrap: Makes the official file's content from its weights; default: {"model": weights}.
    """
    weights, image, wanted = filled_checkpoint(folder, name)
    official = io.BytesIO()
    torch.save(wrap(weights) if wrap else {"model": weights}, official)
    official.seek(0)
    checkpoint = torch.load(official, weights_only=True)
    model, converted = _weights.convert(name, checkpoint)
    model.load_state_dict(safetensors.torch.load(safetensors.torch.save(converted)))
    with torch.inference_mode():
        return ((model(image) - wanted).abs().max() / wanted.abs().max()).item()


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
    lost = [key for key, value in cast.items() if value.is_floating_point() and not value.isfinite().all()]
    if lost:
        raise ToolError(f"{lost[0]} does not fit in {dtype}: values overflow")
    return cast


class _Bar:
    """A download's progress bar; silent where the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.bar.add_task("download", total=None)

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        self.bar.update(self.task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
