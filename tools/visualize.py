"""Draws what models look at in photos: `vitrail.tools.visualize biformer_s photo.jpg --compare rmt_s`.

    python -m vitrail.tools.visualize biformer_n=runs/digits/biformer_n/model.safetensors photo.jpg --query 0.4 0.6

Routed regions, learned windows, neighborhoods, decay fields, ELA's strips, attention of one query, Grad-CAM and the
effective receptive fields of all stages, as far as a model has them; in one PNG, and in a page without outside
resources that shows several models side by side. A model is NAME or NAME=CHECKPOINT; without, its weights are random.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command
from vitrail.tools._common.draw import all_panels
from vitrail.tools._common.draw_page import Drawn, paint, write_html, write_png
from vitrail.tools._common.entry_points import check_takes_images


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _visualize(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="vitrail-visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="NAME or NAME=CHECKPOINT")
    add("images", nargs="+", type=Path, metavar="IMAGE", help="photos")
    add("--compare", nargs="+", default=[], metavar="MODEL", help="more models, beside the first")
    add("--query", nargs=2, type=float, default=(0.5, 0.5), metavar=("X", "Y"),
        help="the place that queries come from, in fractions of the image (default: the centre)")  # fmt: skip
    add("--img-size", type=int, nargs="+", metavar=("H", "W"), help="default: each model's own")
    add("--pretrained", action="store_true", help="use the weights that timm fetches")
    add("-o", "--output", type=Path, default=Path("visualized"), metavar="FILE",
        help="without ending: .png and .html are written (default: visualized)")  # fmt: skip
    options = parser.parse_args(argv)
    if not all(0 <= value <= 1 for value in options.query):
        raise UsageError(f"--query is {options.query}; allowed: fractions of the image, from 0 to 1")
    if options.img_size and (len(options.img_size) > 2 or min(options.img_size) < 1):
        raise UsageError(f"--img-size is {options.img_size}; allowed: H or H W, each at least 1")
    if not options.output.absolute().parent.is_dir():
        raise UsageError(f"--output is {options.output}, whose folder does not exist")
    return options


def _visualize(options: argparse.Namespace) -> int:
    specs = [options.model, *options.compare]
    for spec in specs:
        check_takes_images(spec.partition("=")[0])
    drawn = []
    for spec in specs:
        model = _build(spec, options.pretrained)
        name, _, checkpoint = spec.partition("=")
        name += "" if checkpoint or options.pretrained else ", random weights"
        drawn += [_draw(name, model, path, options) for path in options.images]
    png, page = (options.output.with_name(f"{options.output.name}{ending}") for ending in (".png", ".html"))
    write_png(png, drawn)
    write_html(page, drawn, " and ".join(dict.fromkeys(one.model for one in drawn)))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"wrote {png} and {page}", markup=False)
    return 0


def _build(spec: str, pretrained: bool) -> nn.Module:
    name, _, checkpoint = spec.partition("=")
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, pretrained=pretrained and not checkpoint).eval()
    except RuntimeError as error:  # timm's, for a tag without weights
        raise UsageError(str(error)) from error
    if checkpoint or not pretrained:
        model.pretrained_cfg.pop("label_names", None)  # those of other weights
    if checkpoint:
        _load(model, Path(checkpoint))
    return model


def _load(model: nn.Module, checkpoint: Path) -> None:
    """Gives a model weights and as many classes as they have."""
    from vitrail.models.mm.checkpoint import convert_for, load_strictly, read_weights, refuse_untrained_parts

    weights = read_weights(checkpoint)
    with refuse_untrained_parts(f"checkpoint {checkpoint}"):
        weights = convert_for(model, weights)
    classifier = model.default_cfg["classifier"]
    if f"{classifier}.weight" in weights:
        model.reset_classifier(len(weights[f"{classifier}.weight"]))
    load_strictly(model, weights, checkpoint)


def _draw(name: str, model: nn.Module, path: Path, options: argparse.Namespace) -> Drawn:
    batch, pixels = _read_image(path, model, options.img_size)
    query = (float(options.query[0]), float(options.query[1]))
    try:
        panels = all_panels(model, batch, query)
    except (RuntimeError, ValueError) as error:
        raise ToolError(f"{name} cannot run on {batch.shape[2]} x {batch.shape[3]} pixels: {error}") from error
    return paint(name, path.name, pixels, panels)


def _read_image(path: Path, model: nn.Module, size: Sequence[int] | None) -> tuple[Tensor, np.ndarray]:
    """The photo as the model wants it, (1, 3, H, W), and what it then shows, (H, W, 3) from 0 to 1."""
    from PIL import Image, UnidentifiedImageError

    settings = timm.data.resolve_data_config({}, model=model)
    if size:
        settings["input_size"] = (settings["input_size"][0], size[0], size[-1])
    if settings["input_size"][0] != 3:
        raise UsageError(f"the model takes images of {settings['input_size'][0]} channels; allowed: 3")
    try:
        photo = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ToolError(f"{path} is no image that can be read: {error}") from error
    image = timm.data.create_transform(**{**settings, "crop_pct": 1.0}, is_training=False)(photo)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return image[None], pixels


if __name__ == "__main__":
    sys.exit(main())
