"""How a classifier's training is put together, announced and finished, for `vitrail.tools.train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
from mmengine.registry import MODELS

from vitrail.models.mm import checkpoint, report
from vitrail.models.mm.classifier import count_parameters
from vitrail.models.mm.parallel import is_sharded
from vitrail.models.mm.progress import ProgressHook, format_seconds
from vitrail.models.mm.runner import build_runner, unwrap
from vitrail.tools._common.cli import UsageError, describe_device, unknown_name
from vitrail.tools._common.run_facts import describe_place, run_facts

__all__ = ["CAN_SHARD", "build_runner", "describe", "finish", "make_display", "was_validated"]

CAN_SHARD = True


def make_display(config: Any, console: Any) -> ProgressHook:
    """The hook that shows progress; the config's model must have a name.

    Raises:
        UsageError: It has none, or one that timm does not know.
    """
    _check_model_name(config)
    return ProgressHook(console)


def describe(runner: Any) -> str:
    """One line about model, device and data."""
    train, val = runner._train_dataloader.dataset, runner._val_dataloader.dataset
    parameters = count_parameters(unwrap(runner.model).backbone)
    return (
        f"{runner.cfg.model.backbone.name}: {parameters:,} parameters on {describe_place(runner)}; "
        f"{len(train):,} training and {len(val):,} held-out images of {len(train.source.classes)} classes"
    )


def was_validated(runner: Any) -> bool:
    """Whether the final weights have been validated."""
    return runner.val_evaluator.metrics[0].last is not None


def finish(runner: Any, console: Any, options: argparse.Namespace) -> None:
    """Writes what a run leaves behind and tells where it is."""
    folder = Path(runner.work_dir)
    predictions = runner.val_evaluator.metrics[0].last
    curve = runner.message_hub.get_info("curve")
    name = runner.cfg.model.backbone.name
    # last.pth holds what was evaluated: the averaged weights where the config averages them.
    whole = MODELS.build(runner.cfg.to_dict()["model"]) if is_sharded(runner.model) else unwrap(runner.model)
    model = whole.to(runner.device).backbone
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
        f"{describe_device(runner.device)})\n\n"
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
        **run_facts(runner),
        "curve": curve,
    }  # fmt: skip


def _check_model_name(config: Any) -> None:
    name = ((config.get("model") or {}).get("backbone") or {}).get("name")
    if name is None:
        raise UsageError("the config has no model.backbone.name")
    if not timm.is_model(name):
        raise unknown_name("model", name, timm.list_models())
