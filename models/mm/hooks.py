"""What happens around the iterations besides checkpoints and display."""

from __future__ import annotations

import time
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce_dict, all_reduce_params, get_dist_info, is_distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS

from vitrail.models.mm.seeding import derive_seed, seed_everything


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds each training iteration by (seed, iteration, rank): a resumed run draws what the unbroken one drew."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds drop path, dropout and mixing of this iteration."""
        rank, _ = get_dist_info()
        seed_everything(derive_seed("iteration", runner.seed, runner.iter, rank))


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Averages buffers (running statistics of batch norms) over the processes at the end of an epoch.

    Those of the averaged (EMA) model are included, so that what is evaluated is what is saved.
    """

    priority = "ABOVE_NORMAL"

    def after_train_epoch(self, runner: Any) -> None:
        """Averages over the processes, if there are several."""
        if not is_distributed():
            return
        all_reduce_params(runner.model.buffers(), op="mean")
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                all_reduce_params(hook.ema_model.module.buffers(), op="mean")


@HOOKS.register_module()
class CurveHook(Hook):
    """Keeps one row an epoch (the learning curve) in the message hub, under `curve`; a resumed run goes on with it."""

    def before_train(self, runner: Any) -> None:
        """Starts an empty curve unless a checkpoint brought one."""
        if "curve" not in runner.message_hub.runtime_info:
            runner.message_hub.update_info("curve", [])

    def before_train_epoch(self, runner: Any) -> None:
        """Starts the sums of an epoch."""
        self._sums: dict[str, torch.Tensor] = {}
        self._iterations = self._images = 0
        self._started = time.perf_counter()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Adds an iteration."""
        for name in ("loss", "accuracy"):
            if name in outputs:
                self._sums[name] = self._sums.get(name, 0.0) + outputs[name].detach()
        self._iterations += 1
        self._images += len(data_batch["indices"])

    def after_train_epoch(self, runner: Any) -> None:
        """Writes the training half of a row."""
        seconds = time.perf_counter() - self._started
        all_reduce_dict(self._sums, op="mean")
        row = {
            "epoch": runner.epoch + 1,
            "iterations": runner.iter,
            "lr": float(runner.optim_wrapper.get_lr()["lr"][0]),
        }
        for name, total in self._sums.items():
            row[f"train_{name}"] = float(total) / self._iterations * (100.0 if name == "accuracy" else 1.0)
        row["seconds"] = seconds
        row["images_per_second"] = self._images * get_dist_info()[1] / seconds
        runner.message_hub.update_info("curve", [*runner.message_hub.get_info("curve"), row])

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Adds the validation half."""
        if runner.is_training:
            *rows, row = runner.message_hub.get_info("curve")
            held_out = {f"val_{name.removeprefix('accuracy/')}": value for name, value in metrics.items()}
            runner.message_hub.update_info("curve", [*rows, {**row, **held_out}])


@HOOKS.register_module()
class UnreadableImagesHook(Hook):
    """Counts training images that were skipped because they could not be decoded."""

    def __init__(self) -> None:
        self._lost: set[int] = set()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Remembers the images of this batch."""
        self._lost.update(data_batch["unreadable"].tolist())

    def after_train_epoch(self, runner: Any) -> None:
        """Joins the processes' finds and keeps them across a resumption, under `unreadable` in the message hub."""
        known = runner.message_hub.runtime_info.get("unreadable", [])
        found = set(known).union(*all_gather_object(sorted(self._lost)))
        runner.message_hub.update_info("unreadable", sorted(found))
