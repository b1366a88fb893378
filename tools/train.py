"""Trains a classifier, detector or segmenter from a config: `python -m vitrail.tools.train digits/biformer_n`.

Leaves in the work folder: `config.py` (complete), `last.pth` (to resume from), `best.pth` (highest held-out score),
`model.safetensors` (final weights; a classifier's are for timm), `metrics.json`, `report.png`, and logs. A classifier's
epoch that was interrupted is trained again on resumption, from exactly the state and with exactly the data that it had;
detectors and segmenters, whose configs are those of mmdetection and mmsegmentation, go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vitrail.tools._common.cli import ArgumentParser, ToolError, UsageError, message_of, run_command, select_device
from vitrail.tools._common.configs import find_config, read_config

_AUTO = "auto"
# What gloo and NCCL say when another process is gone.
_SIGNS_OF_LOSS = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process exited",
                  "NCCL error", "Connection refused", "gloo")  # fmt: skip
_SKIPPING = (
    "to leave out and count such images: --cfg-options train_dataloader.dataset.unreadable=skip "
    "val_dataloader.dataset.unreadable=skip"
)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="vitrail-train", description="Train a classifier, detector or segmenter from a config."
    )
    parser.add_argument("config", help="path of a config, or the name of a packaged one, such as digits/biformer_n")
    parser.add_argument("--work-dir", help="where results go (default: a new folder runs/<config>)")
    parser.add_argument("--resume", nargs="?", const=_AUTO, metavar="CKPT",
                        help="go on from a checkpoint (default: last.pth of the work folder)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in the work folder")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--launcher", choices=["none", "pytorch"], default="none", help="pytorch: started by torchrun")
    parser.add_argument("--sharded", action="store_true",
                        help="spread weights and optimiser state over torchrun's processes")  # fmt: skip
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

    if options.sharded and (options.launcher == "none" or options.amp == "fp16"):
        raise UsageError("--sharded needs --launcher pytorch, and --amp bf16 or none")

    from rich.console import Console

    from vitrail.models.mm.runner import start_processes

    console = Console(highlight=False, soft_wrap=True)
    task = _choose_task(config)
    if options.sharded and not task.CAN_SHARD:
        raise UsageError("--sharded trains classifiers; train this config without it")
    display = task.make_display(config, console)
    device = start_processes(options.launcher, device)
    work_dir, resume_from = _agree(lambda: _choose_folder(options, _run_name(options.config, path)))
    try:
        runner = task.build_runner(
            config, str(work_dir), device, options.launcher, options.amp, resume_from, display,
            before_writing=lambda: _agree(lambda: _prepare_folder(work_dir, keep=resume_from is not None)),
            **({"sharded": True} if options.sharded else {}),
        )  # fmt: skip
        _announce(console, runner, task, options, resume_from)
        _run(runner, task)
    finally:
        display.close()
        if options.launcher == "pytorch":
            torch.distributed.destroy_process_group()
    if runner.rank == 0:
        task.finish(runner, console, options)
    return 0


def _choose_task(config: Any) -> Any:
    """The module that knows how the config's task is built, announced and finished."""
    from vitrail.models.mm.dense_runner import POINT_SCOPE, is_dense

    if config.get("default_scope") == POINT_SCOPE:
        from vitrail.tools._common import train_points

        return train_points
    if is_dense(config):
        from vitrail.tools._common import train_dense

        return train_dense
    from vitrail.tools._common import train_classifier

    return train_classifier


def _agree(decide: Callable[[], Any]) -> Any:
    """What the first process decided, for all; the others wait for it."""
    from mmengine.dist import broadcast_object_list, is_main_process

    decision = [decide() if is_main_process() else None]
    broadcast_object_list(decision)
    return decision[0]


def _run(runner: Any, task: Any) -> None:
    from vitrail.models.mm.classifier import NonFiniteLossError
    from vitrail.models.mm.images import UnreadableImageError

    try:
        runner.train()
        if not task.was_validated(runner):  # resumed after its end
            runner.val_loop.run()
    except NonFiniteLossError as error:
        raise ToolError(str(error)) from error
    except torch.OutOfMemoryError:
        raise
    except UnreadableImageError as error:
        raise ToolError(f"{message_of(error)}; {_SKIPPING}") from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ToolError(
            f"{error}: a batch norm over one number; a process needs 2 images in a batch (train_dataloader.batch_size)"
        ) from error
    except RuntimeError as error:
        if "DTensor" in str(error):
            raise ToolError(
                f"--sharded: {type(runner.optim_wrapper.optimizer).__name__} cannot work on parts of weights; allowed: "
                "optimisers such as adamw, sgd, lamb"
            ) from error
        if not any(sign in str(error) for sign in _SIGNS_OF_LOSS):
            raise
        raise ToolError(
            f"process {runner.rank} lost its connection to another process of the job, which has ended; the last "
            f"checkpoint is whole, --resume --work-dir {runner.work_dir} goes on with it, on any number of processes"
        ) from error


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


def _announce(console: Any, runner: Any, task: Any, options: argparse.Namespace, resume_from: str | None) -> None:
    if runner.rank != 0:
        return
    console.print(task.describe(runner))
    note = f", resuming from {resume_from}" if resume_from else ""
    if options.resume and not resume_from:
        note = ", nothing to resume there: starting from the beginning"
    console.print(f"work folder {runner.work_dir}{note}")


if __name__ == "__main__":
    sys.exit(main())
