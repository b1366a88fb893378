"""Trains a classifier from a config: `python -m vitrail.tools.train digits/biformer_n`.

Leaves in the work folder: `config.py` (complete), `last.pth` (to resume from), `best.pth` (highest held-out accuracy),
`model.safetensors` (final weights, for timm), `metrics.json`, `report.png`, and logs. An epoch that was interrupted
is trained again on resumption, from exactly the state and with exactly the data that it had.
"""

from __future__ import annotations

import argparse
import logging
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import vitrail
from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, run_command, select_device, unknown_name
from vitrail.tools._common.configs import find_config, read_config

_AUTO = "auto"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="vitrail-train", description="Train a classifier from a config.")
    parser.add_argument("config", help="path of a config, or the name of a packaged one, such as digits/biformer_n")
    parser.add_argument("--work-dir", help="where results go (default: a new folder runs/<config>)")
    parser.add_argument("--resume", nargs="?", const=_AUTO, metavar="CKPT",
                        help="go on from a checkpoint (default: last.pth of the work folder)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in the work folder")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--launcher", choices=["none", "pytorch"], default="none", help="pytorch: started by torchrun")
    parser.add_argument("--amp", choices=["bf16", "fp16"], help="mixed precision")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _train(build_parser().parse_args(argv)))


def _train(options: argparse.Namespace) -> int:
    logging.raiseExceptions = False  # a full disk is reported once, by the checkpoint
    warnings.filterwarnings("ignore", category=UserWarning, module=r"mmengine\.|torch\.utils\.data")
    path = find_config(options.config)
    config = read_config(path, options.cfg_options)
    device = select_device(options.device)
    if options.amp == "fp16" and device.type != "cuda":
        raise UsageError(f"--amp fp16 needs a CUDA GPU, the device is {device}; use --amp bf16")
    _check_model_name(config)

    from rich.console import Console

    from vitrail.models.mm.progress import ProgressHook
    from vitrail.models.mm.runner import build_runner, start_processes

    device = start_processes(options.launcher, device)
    work_dir, resume_from = _agree(lambda: _choose_folder(options, _run_name(options.config, path)))
    console = Console(highlight=False, soft_wrap=True)
    display = ProgressHook(console)
    try:
        runner = build_runner(
            config, str(work_dir), device, options.launcher, options.amp, resume_from, display,
            before_writing=lambda: _agree(lambda: _prepare_folder(work_dir, keep=resume_from is not None)),
        )  # fmt: skip
        _announce(console, runner, options, resume_from)
        _run(runner)
    finally:
        display.close()
        if options.launcher == "pytorch":
            torch.distributed.destroy_process_group()
    if runner.rank == 0:
        _finish(runner, console, options)
    return 0


def _agree(decide: Callable[[], Any]) -> Any:
    """What the first process decided, for all; the others wait for it."""
    from mmengine.dist import broadcast_object_list, is_main_process

    decision = [decide() if is_main_process() else None]
    broadcast_object_list(decision)
    return decision[0]


def _run(runner: Any) -> None:
    from vitrail.models.mm.classifier import NonFiniteLossError

    try:
        runner.train()
        if runner.val_evaluator.metrics[0].last is None:  # resumed after its last epoch
            runner.val_loop.run()
    except NonFiniteLossError as error:
        raise ToolError(str(error)) from error


def _check_model_name(config: Any) -> None:
    name = ((config.get("model") or {}).get("backbone") or {}).get("name")
    if name is None:
        raise UsageError("the config has no model.backbone.name")
    if not timm.is_model(name):
        raise unknown_name("model", name, timm.list_models())


def _run_name(given: str, path: Path) -> str:
    stem = Path(given).with_suffix("")
    return "/".join(stem.parts[-2:]) if not stem.is_absolute() else f"{path.parent.name}/{path.stem}"


def _choose_folder(options: argparse.Namespace, name: str) -> tuple[Path, str | None]:
    """The work folder and the checkpoint to resume from; no run is overwritten unless that is asked for."""
    from vitrail.models.mm.checkpoint import LAST

    if options.work_dir:
        folder = Path(options.work_dir).expanduser()
    else:
        taken = [path for path in _numbered(Path("runs") / name) if path.exists()]
        fresh = next(path for path in _numbered(Path("runs") / name) if not path.exists())
        folder = taken[-1] if taken and (options.resume or options.overwrite) else fresh
    if options.resume == _AUTO:
        return folder, str(folder / LAST) if (folder / LAST).exists() else None
    if options.resume is None and (folder / LAST).exists() and not options.overwrite:
        raise UsageError(f"{folder} holds a run: --resume goes on with it, --overwrite replaces it")
    return folder, options.resume


def _numbered(folder: Path) -> list[Path]:
    return [folder] + [folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000)]


def _prepare_folder(folder: Path, keep: bool) -> None:
    from vitrail.models.mm.checkpoint import remove_temporaries

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--work-dir {folder} is a file")
    if not keep and (folder / "config.py").exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)


def _announce(console: Any, runner: Any, options: argparse.Namespace, resume_from: str | None) -> None:
    from vitrail.models.mm.classifier import count_parameters
    from vitrail.models.mm.runner import unwrap

    if runner.rank != 0:
        return
    train, val = runner._train_dataloader.dataset, runner._val_dataloader.dataset
    parameters = count_parameters(unwrap(runner.model).backbone)
    console.print(
        f"{runner.cfg.model.backbone.name}: {parameters:,} parameters on {_describe(runner.device)}, "
        f"{runner.world_size} process{'es' if runner.world_size > 1 else ''}; "
        f"{len(train):,} training and {len(val):,} held-out images of {len(train.source.classes)} classes"
    )
    note = f", resuming from {resume_from}" if resume_from else ""
    if options.resume and not resume_from:
        note = ", nothing to resume there: starting from the beginning"
    console.print(f"work folder {runner.work_dir}{note}")


def _finish(runner: Any, console: Any, options: argparse.Namespace) -> None:
    from vitrail.models.mm import checkpoint, report
    from vitrail.models.mm.progress import format_seconds
    from vitrail.models.mm.runner import unwrap

    folder = Path(runner.work_dir)
    predictions = runner.val_evaluator.metrics[0].last
    curve = runner.message_hub.get_info("curve")
    name = runner.cfg.model.backbone.name
    # last.pth holds what was evaluated: the averaged weights where the config averages them.
    model = unwrap(runner.model).backbone
    checkpoint.load_strictly(model, checkpoint.read_weights(folder / checkpoint.LAST), folder / checkpoint.LAST)
    checkpoint.save_weights(model, folder / checkpoint.WEIGHTS)
    shape, batch = runner.val_dataloader.dataset.image_shape, runner.cfg.val_dataloader.batch_size
    speed = report.measure_throughput(model, shape, batch)
    seconds = sum(row["seconds"] for row in curve)
    metrics = _metrics(runner, predictions, curve, seconds, speed)
    report.save_json(folder / "metrics.json", metrics)
    title = f"{name}: {predictions.top1:.2f} % of {len(predictions.labels):,} held-out images after {len(curve)} epochs"
    report.draw_report(folder / "report.png", title, curve, predictions, runner.val_dataloader.dataset)

    held_out, best = metrics["held_out"], metrics["best"]
    console.print(
        f"\nheld-out accuracy [bold]{held_out['top1']:.2f} %[/bold] top-1, {held_out['top5']:.2f} % top-5 "
        f"(best epoch {best['epoch']}: {best['top1']:.2f} %), trained in {format_seconds(seconds)}"
    )
    if metrics["unreadable_images"]["train"] or metrics["unreadable_images"]["val"]:
        console.print(f"skipped images that cannot be read: {metrics['unreadable_images']}")
    console.print(
        f"throughput {speed:,.0f} images/s (inference, batch {batch}, {shape[1]}x{shape[2]}, float32, "
        f"{_describe(runner.device)})\n\n"
        f"  weights   {folder / checkpoint.WEIGHTS}\n"
        f"  figures   {folder / 'metrics.json'}\n"
        f"  picture   {folder / 'report.png'}\n\n"
        f"go on with\n"
        f"  vitrail-validate {options.work_dir or folder}\n"
        f"  vitrail-benchmark {name} --device {runner.device.type}\n"
        f'  python -c \'import timm, vitrail; timm.create_model("{name}", num_classes={model.num_classes}, '
        f'checkpoint_path="{folder / checkpoint.WEIGHTS}")\'\n'
        f"  tensorboard --logdir {folder}",
        markup=False,
    )


def _metrics(
    runner: Any, predictions: Any, curve: list[dict[str, float]], seconds: float, speed: float
) -> dict[str, Any]:
    dataset = runner.val_dataloader.dataset
    info = runner.message_hub.runtime_info
    lost = {
        "train": [runner.train_dataloader.dataset.source.name(index) for index in info.get("unreadable", [])],
        "val": [dataset.source.name(int(index)) for index in predictions.unreadable],
    }
    return {
        "model": runner.cfg.model.backbone.name,
        "held_out": {"top1": predictions.top1, "top5": predictions.top5, "loss": predictions.loss,
                     "images": len(predictions.labels)},
        "best": {"top1": info["best_score"], "epoch": info["best_epoch"]},
        "per_class": predictions.per_class(dataset.source.classes),
        "unreadable_images": lost,
        "epochs": len(curve),
        "seconds": seconds,
        "inference_images_per_second": speed,
        "seed": runner.seed,
        "device": _describe(runner.device),
        "processes": runner.world_size,
        "versions": {"vitrail": vitrail.__version__, "torch": torch.__version__, "timm": timm.__version__,
                     "python": platform.python_version()},
        "curve": curve,
    }  # fmt: skip


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


if __name__ == "__main__":
    sys.exit(main())
