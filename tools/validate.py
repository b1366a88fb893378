"""Measures a classifier: `python -m vitrail.tools.validate runs/digits/biformer_n`.

Accuracy (top-1, top-5), a report by class, and both in files: `results.json` and `results.csv`.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vitrail.tools._common.cli import (
    ArgumentParser,
    ToolError,
    UsageError,
    message_of,
    run_command,
    select_device,
    unknown_name,
)
from vitrail.tools._common.configs import find_config, packaged_configs, read_config

_SHOWN_CLASSES = 20


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-validate", description="Measure a classifier's accuracy.")
    parser.add_argument("model", help="a training run's work folder, a config, or a model name of timm or vitrail")
    parser.add_argument("--data", help="image folder (with val/, or of class folders), 'digits', or 'cifar10:FOLDER'; "
                                       "default: the config's validation data")  # fmt: skip
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (default: those of the work folder)")
    parser.add_argument("--pretrained", action="store_true", help="use the weights that timm fetches for a model name")
    parser.add_argument("--batch-size", type=int, help="default: the config's, or 64")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--output", metavar="FOLDER",
                        help="where the results go (default: the work folder, or runs/validate/MODEL)")  # fmt: skip
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out and count images that are damaged")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _validate(build_parser().parse_args(argv)))


def _validate(options: argparse.Namespace) -> int:
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; allowed: at least 1")
    if options.workers < 0:
        raise UsageError(f"--workers is {options.workers}; allowed: at least 0")
    device = select_device(options.device)
    output = _output_folder(options)
    model, dataset, weights, batch_size = _prepare(options)

    from vitrail.models.mm.datasets import collate_classification
    from vitrail.models.mm.images import UnreadableImageError
    from vitrail.models.mm.metrics import evaluate

    loader = torch.utils.data.DataLoader(
        dataset,
        options.batch_size or batch_size,
        num_workers=options.workers,
        collate_fn=partial(collate_classification, replace_unreadable=False),
        pin_memory=device.type == "cuda",
    )
    console = Console(highlight=False, soft_wrap=True)
    shown = track(loader, "validating", console=console, disable=not console.is_terminal, transient=True)
    try:
        predictions = evaluate(model.to(device), shown, device)
    except UnreadableImageError as error:
        raise ToolError(f"{message_of(error)}; --skip-unreadable leaves out and counts such images") from error
    _report(console, options, output, predictions, dataset, weights)
    return 0


def _output_folder(options: argparse.Namespace) -> Path:
    """Where the results will go; it is made only when there are results, but checked now."""
    model = Path(options.model).expanduser()
    default = model if (model / "config.py").is_file() else Path("runs/validate") / model.stem
    output = Path(options.output).expanduser() if options.output else default
    existing = next(path for path in [output, *output.absolute().parents] if path.exists())
    if not existing.is_dir():
        raise UsageError(f"the results cannot go to {output} (--output): {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"the results cannot go to {output} (--output): no permission to write in {existing}")
    return output


def _prepare(options: argparse.Namespace) -> tuple[torch.nn.Module, Any, str, int]:
    """The model with its weights, the data, where the weights came from, and the default batch size."""
    folder = Path(options.model).expanduser()
    if (folder / "config.py").is_file():
        return _from_config(options, folder / "config.py", folder / "model.safetensors")
    if folder.is_dir():
        raise UsageError(f"{folder} is not the work folder of a training run: it has no config.py")
    if timm.is_model(options.model):
        return _from_name(options)
    if "/" in options.model or options.model.endswith(".py"):
        return _from_config(options, find_config(options.model), None)
    raise unknown_name("model", options.model, [*timm.list_models(), *packaged_configs()])


def _from_config(
    options: argparse.Namespace, path: Path, weights: Path | None
) -> tuple[torch.nn.Module, Any, str, int]:
    from vitrail.models.mm.checkpoint import load_trained
    from vitrail.models.mm.runner import build_classifier, build_dataset, complete_config

    weights = Path(options.checkpoint) if options.checkpoint else weights
    if weights is None:
        raise UsageError("a config alone has no weights: give --checkpoint, or a run's work folder")
    config = complete_config(read_config(path))
    data = config.val_dataloader.dataset.to_dict()
    if options.data:
        data["source"] = _source(options.data)
    dataset = _dataset(options, data, build_dataset)
    model = build_classifier(config.model, dataset.image_shape, len(dataset.source.classes)).backbone
    load_trained(model, weights)
    return model, dataset, str(weights), config.val_dataloader.batch_size


def _from_name(options: argparse.Namespace) -> tuple[torch.nn.Module, Any, str, int]:
    from vitrail.models.mm.checkpoint import load_trained, refuse_untrained_parts
    from vitrail.models.mm.classifier import check_fits
    from vitrail.models.mm.runner import build_dataset

    if not options.data:
        raise UsageError("--data is needed with a model name")
    if bool(options.checkpoint) == options.pretrained:
        raise UsageError("give the weights of a model name: --checkpoint FILE, or --pretrained")
    _check_tag(options)
    settings = timm.data.resolve_data_config({}, model=timm.create_model(options.model))
    transform = {
        name: settings[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    }
    dataset = _dataset(options, {"source": _source(options.data), "transform": transform}, build_dataset)
    classes = len(dataset.source.classes)
    if options.pretrained:
        with refuse_untrained_parts(f"what timm fetches for {options.model}"):
            model = timm.create_model(options.model, pretrained=True)
    else:
        model = timm.create_model(options.model, num_classes=classes)
        load_trained(model, options.checkpoint)
    check_fits(model, dataset.image_shape, classes)
    return model, dataset, options.checkpoint or "pretrained", 64


def _check_tag(options: argparse.Namespace) -> None:
    """Raises `UsageError` for a tag that the model does not have, and for one without weights where these are asked."""
    try:
        config = timm.get_pretrained_cfg(options.model)
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    if options.pretrained and (config is None or not config.has_weights):
        raise UsageError(f"timm has no weights for {options.model}: give --checkpoint FILE in place of --pretrained")


def _dataset(options: argparse.Namespace, config: dict[str, Any], build_dataset: Any) -> Any:
    if options.skip_unreadable:
        config["unreadable"] = "skip"
    try:
        return build_dataset(config)
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "" if options.data else "; --data names another"
        raise type(error)(f"{error}{hint}") from error


def _source(data: str) -> dict[str, Any]:
    if data == "digits":
        return {"type": "digits", "split": "val"}
    if data.startswith("cifar10:"):
        return {"type": "cifar10", "root": data.removeprefix("cifar10:"), "split": "val"}
    return {"type": "image_folder", "root": data, "split": "val"}


def _report(
    console: Console, options: argparse.Namespace, output: Path, predictions: Any, dataset: Any, weights: str
) -> None:
    from vitrail.models.mm.checkpoint import atomic_write
    from vitrail.models.mm.report import save_json

    rows = predictions.per_class(dataset.source.classes)
    output.mkdir(parents=True, exist_ok=True)
    lost = [dataset.source.name(int(index)) for index in predictions.unreadable]
    results = {
        "model": options.model,
        "weights": weights,
        "data": options.data or "the config's",
        "images": len(predictions.labels),
        "top1": predictions.top1,
        "top5": predictions.top5,
        "loss": predictions.loss,
        "unreadable_images": lost,
        "per_class": rows,
    }
    save_json(output / "results.json", results)
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(output / "results.csv", table.getvalue())

    _print_classes(console, rows)
    console.print(f"[bold]{predictions.top1:.2f} %[/bold] top-1, {predictions.top5:.2f} % top-5, loss "
                  f"{predictions.loss:.4f} on {len(predictions.labels):,} images")  # fmt: skip
    if lost:
        console.print(f"skipped {len(lost)} images that cannot be read: {', '.join(lost[:5])}", markup=False)
    console.print(f"results in {output / 'results.json'} and {output / 'results.csv'}", markup=False)


def _print_classes(console: Console, rows: list[dict[str, Any]]) -> None:
    from vitrail.models.mm.metrics import lowest_classes

    shown, title = rows, "by class"
    if len(rows) > _SHOWN_CLASSES:
        shown, heading = lowest_classes(rows, _SHOWN_CLASSES)
        title = f"{heading} (all are in results.csv)"
    if not shown:
        console.print(title)
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in shown:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
