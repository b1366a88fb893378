"""Shows what a trained model sees: `python -m vitrail.tools.predict CONFIG CHECKPOINT IMAGE|FOLDER -o OUT`.

For every image OUT gets a picture (`.png`) and the figures (`.json`) under the image's name: the five most probable
classes; boxes and masks (run-length encoded as in COCO); or the share of each class, with the class of every pixel in
`_labels.png`. `results.json` counts images and names those that could not be read; there being any is an error, after
all others have been predicted. Files in a folder that are not named like images are counted and named, too; what is
hidden (its name begins with a dot) is left out.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from vitrail.tools._common.cli import (
    ArgumentParser,
    ToolError,
    UsageError,
    check_output_folder,
    describe_device,
    run_command,
    select_device,
)
from vitrail.tools._common.configs import find_config_or_run, read_config

_RESULTS = "results.json"
_WAITING = 4  # batches of images of different shapes that wait in memory for others of their shape


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-predict", description="Draw and write down what a trained model predicts.")
    parser.add_argument("config", help="a training run's work folder, or a config (path or name of a packaged one)")
    parser.add_argument("checkpoint", help="weights, such as the work folder's model.safetensors")
    parser.add_argument("images", metavar="IMAGE|FOLDER", help="an image, or a folder that is searched with all below")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for pictures and results")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line (default: those of the training)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score of a detected object")
    parser.add_argument("--batch-size", type=int, default=1, help="images in a batch; only images that the model gets "
                                                                  "in one shape share a batch")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _predict(build_parser().parse_args(argv)))


@dataclass(frozen=True)
class _Item:
    """An image file that has been read."""

    path: Path
    image: Image.Image
    prepared: Any


@dataclass
class _Outcome:
    """What has become of the files."""

    done: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


def _predict(options: argparse.Namespace) -> int:
    if options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; allowed: at least 1")
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score-threshold is {options.score_threshold}; allowed: 0 to 1")
    device = select_device(options.device)
    output = Path(options.output).expanduser()
    targets, others = _plan(Path(options.images).expanduser(), output)
    path, _ = find_config_or_run(options.config)
    config = read_config(path, options.cfg_options)
    classes = _read_classes(options.classes)

    from vitrail.models.mm.inference import build_predictor

    weights = Path(options.checkpoint).expanduser()
    predictor = build_predictor(config, weights, device, classes, options.score_threshold)
    console = Console(highlight=False, soft_wrap=True)
    if not predictor.named:
        console.print("the names of the classes are not known here: --classes FILE gives them")
    output.mkdir(parents=True, exist_ok=True)
    (output / _RESULTS).unlink(missing_ok=True)  # of an earlier run: it must not speak for this one if that is killed
    outcome = _run(predictor, targets, options.batch_size, console)
    facts = {"config": str(path), "weights": str(weights), "device": describe_device(device)}
    _finish(console, output, facts, outcome, others)
    return 0


def _run(predictor: Any, targets: dict[Path, Path], batch_size: int, console: Console) -> _Outcome:
    outcome = _Outcome()
    shown = track(targets, "predicting", console=console, disable=not console.is_terminal, transient=True)
    for batch in _batches(_read(shown, predictor, outcome), predictor, batch_size):
        try:
            results = predictor.predict([item.prepared for item in batch])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            names = ", ".join(str(item.path) for item in batch)
            raise ToolError(f"the model cannot take {names}: {error}") from error
        for item, result in zip(batch, results, strict=True):
            _write(targets[item.path], item, result, predictor.classes)
            outcome.done += 1
    return outcome


def _plan(source: Path, output: Path) -> tuple[dict[Path, Path], list[str]]:
    """For every image the place of its results, without suffix; and the names of the files that are no images.

    Raises:
        UsageError: There is nothing to predict, or results would be taken for images or overwrite one.
    """
    from vitrail.models.mm.datasets import is_visible_image

    if not source.exists():
        raise UsageError(f"{source} does not exist: expected an image or a folder of images")
    check_output_folder(output, "--output")
    if source.is_file():
        found, others, root = [source], [], source.parent
    else:
        root = source
        if output.resolve() == root.resolve() or root.resolve() in output.resolve().parents:
            raise UsageError(f"the results cannot go to {output} (--output): it is in the folder of the images")
        files = sorted(path for path in root.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(root)))
        found = [path for path in files if is_visible_image(path.relative_to(root))]
        others = [str(path.relative_to(root)) for path in files if path not in set(found)]
    if not found:
        named = f"; it has other files, such as {', '.join(others[:3])}" if others else ""
        raise UsageError(f"{source} holds no images{named}")
    targets = _places(found, root, output)
    written = {place.with_name(f"{place.name}.png").resolve() for place in targets.values()}
    overwritten = sorted(str(path) for path in found if path.resolve() in written)
    if overwritten:
        raise UsageError(f"the results in {output} (--output) would overwrite the image {overwritten[0]}")
    return targets, others


def _places(found: Sequence[Path], root: Path, output: Path) -> dict[Path, Path]:
    """The image's name without its suffix where that is one image's alone, or else with it."""
    stems: dict[Path, int] = {}
    for path in found:
        stem = path.relative_to(root).with_suffix("")
        stems[stem] = stems.get(stem, 0) + 1
    names = {path: path.relative_to(root) for path in found}
    return {path: output / (name if stems[name.with_suffix("")] > 1 else name.with_suffix(""))
            for path, name in names.items()}  # fmt: skip


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(paths: Any, predictor: Any, outcome: _Outcome) -> Iterator[_Item]:
    """The images that can be read, prepared for the model; notes the others."""
    from vitrail.models.mm.images import UnreadableImageError, load_image

    for path in paths:
        try:
            image = load_image(path)
        except UnreadableImageError as error:
            outcome.unreadable[str(path)] = str(error).removeprefix(f"cannot read image {path}: ")
            continue
        yield _Item(path, image, predictor.prepare(image))


def _batches(items: Iterator[_Item], predictor: Any, size: int) -> Iterator[list[_Item]]:
    """Batches of one shape. The fullest goes early when too many images wait."""
    waiting: dict[tuple[int, ...], list[_Item]] = {}
    for item in items:
        shape = predictor.shape_of(item.prepared)
        waiting.setdefault(shape, []).append(item)
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= _WAITING * size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _write(place: Path, item: _Item, result: Any, classes: Sequence[str]) -> None:
    from vitrail.models.mm.checkpoint import atomic_write
    from vitrail.models.mm.report import save_json
    from vitrail.tools._common.drawing import draw
    from vitrail.tools._common.predictions import label_image, to_json

    place.parent.mkdir(parents=True, exist_ok=True)
    facts = {"image": str(item.path), "width": item.image.width, "height": item.image.height}
    atomic_write(place.with_name(f"{place.name}.png"), _png(draw(item.image, result, classes)))
    labels = label_image(result, len(classes))
    if labels is not None:
        atomic_write(place.with_name(f"{place.name}_labels.png"), _png(labels))
        facts["labels"] = f"{place.name}_labels.png"
    save_json(place.with_name(f"{place.name}.json"), facts | to_json(result, classes))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def _read_classes(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        names = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {path} is not a text file in UTF-8") from error
    return [name for name in names if name]


def _finish(console: Console, output: Path, facts: dict[str, Any], outcome: _Outcome, others: list[str]) -> None:
    from vitrail.models.mm.report import save_json

    lost = outcome.unreadable
    save_json(
        output / _RESULTS,
        {**facts, "images": outcome.done, "unreadable": lost, "not_images": others},
    )
    console.print(f"{outcome.done:,} images predicted, in {output}", markup=False)
    if others:
        console.print(f"left out {len(others):,} files that are not named like images: {_some(others)}", markup=False)
    if lost:
        first = "; ".join(f"{name} ({reason})" for name, reason in list(lost.items())[:5])
        more = f"; and {len(lost) - 5:,} more, all in {output / _RESULTS}" if len(lost) > 5 else ""
        raise ToolError(f"{len(lost):,} of {outcome.done + len(lost):,} images cannot be read: {first}{more}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


if __name__ == "__main__":
    sys.exit(main())
