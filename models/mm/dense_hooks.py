"""What happens around the iterations of a detector or segmenter: checkpoints, the learning curve, the display."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from mmengine.dist import all_reduce_dict, all_reduce_params, get_dist_info, is_distributed
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from rich.console import Console

from vitrail.models.mm.checkpoint import LAST, AtomicCheckpointHook
from vitrail.models.mm.classifier import NonFiniteLossError
from vitrail.models.mm.progress import ProgressHook

_SMOOTHING = 0.02  # share of the newest iteration in the shown loss


@HOOKS.register_module()
class DenseCheckpointHook(AtomicCheckpointHook):
    """Writes `last.pth` at intervals and after every validation, and `best.pth` when the score improved.

    Args:
        interval: Epochs or iterations between two checkpoints; the last one always has one.
        by_epoch: Whether `interval` counts epochs.
        score: Validation metric that `best.pth` maximises.
    """

    def __init__(self, interval: int, by_epoch: bool, score: str) -> None:
        super().__init__(interval, score)
        self.by_epoch = by_epoch

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Saves at the interval unless a validation follows, which will save."""
        done = runner.iter + 1
        due = done % self.interval == 0 or done == runner.max_iters
        if runner.is_iterative and not self.by_epoch and due and not runner.validation_follows():
            runner.save_checkpoint(runner.work_dir, LAST, meta={"epoch": runner.epoch, "iter": done})

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Saves, best first.

        Raises:
            ValueError: There is no such score, so that no checkpoint would ever be the best.
        """
        super().after_val_epoch(runner, metrics)
        if runner.is_training and metrics and self.score not in metrics:
            raise ValueError(
                f"default_hooks.checkpoint.save_best is {self.score!r}; the validation measures {', '.join(metrics)}"
            )

    def after_train_epoch(self, runner: Any) -> None:
        """Saves unless a validation follows; runs of iterations have one epoch, which does not count."""
        if not runner.is_iterative:
            super().after_train_epoch(runner)

    def _save_last(self, runner: Any, epoch: int) -> None:
        if runner.is_iterative:
            runner.save_checkpoint(runner.work_dir, LAST, meta={"epoch": runner.epoch, "iter": runner.iter})
        else:
            super()._save_last(runner, epoch)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a run whose loss is not finite, before the next checkpoint."""

    priority = "HIGH"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Raises `NonFiniteLossError` with the iteration, the losses, and what to try."""
        if math.isfinite(float(outputs["loss"].detach())):
            return
        parts = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in outputs.items() if "loss" in name)
        raise NonFiniteLossError(
            f"the loss is not finite in iteration {runner.iter + 1} ({parts}); the last checkpoint is from before. Try "
            "a lower learning rate (optim_wrapper.optimizer.lr), gradient clipping "
            "(optim_wrapper.clip_grad.max_norm=1.0) or bf16 in place of fp16"
        )


@HOOKS.register_module()
class AverageStatisticsHook(Hook):
    """Averages buffers (running statistics of batch norms) over the processes before they are used."""

    def before_val_epoch(self, runner: Any) -> None:
        """Averages over the processes, if there are several."""
        if is_distributed():
            all_reduce_params(runner.model.buffers(), op="mean")


@HOOKS.register_module()
class DenseCurveHook(Hook):
    """Keeps one row a validation in the message hub, under `curve`; a resumed run goes on with it."""

    def before_train(self, runner: Any) -> None:
        """Starts an empty curve unless a checkpoint brought one."""
        if "curve" not in runner.message_hub.runtime_info:
            runner.message_hub.update_info("curve", [])
        self._start()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Adds an iteration."""
        self._loss = self._loss + outputs["loss"].detach()
        self._iterations += 1
        self._images += len(data_batch["inputs"])

    def before_val_epoch(self, runner: Any) -> None:
        """Stops the clock."""
        self._seconds = time.perf_counter() - self._started

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Writes a row."""
        if not runner.is_training or not self._iterations:
            return
        sums = {"loss": self._loss}
        all_reduce_dict(sums, op="mean")
        row = {
            "iterations": runner.iter,
            "epoch": None if runner.is_iterative else runner.epoch,
            "lr": float(runner.optim_wrapper.get_lr()["lr"][0]),
            "train_loss": float(sums["loss"]) / self._iterations,
            "seconds": self._seconds,
            "images_per_second": self._images * get_dist_info()[1] / self._seconds,
            **{name: _number(value) for name, value in (metrics or {}).items()},
        }
        runner.message_hub.update_info("curve", [*runner.message_hub.get_info("curve"), row])
        self._start()

    def _start(self) -> None:
        self._loss = torch.zeros(())
        self._iterations = self._images = 0
        self._started = time.perf_counter()


class DenseProgressHook(ProgressHook):
    """As for classifiers; the loss is a moving average, the score that of the task.

    Args:
        console: Where to show it.
        score: Validation metric to show.
    """

    def __init__(self, console: Console, score: str) -> None:
        super().__init__(console)
        self.score = score

    def after_train_epoch(self, runner: Any) -> None:
        """Writes a line unless a validation follows or was just shown."""
        if not runner.is_iterative:
            super().after_train_epoch(runner)

    def _title(self, runner: Any, epoch: int, done: int) -> str:
        return f"iteration {done}/{runner.max_iters}" if runner.is_iterative else super()._title(runner, epoch, done)

    def _count_images(self, data_batch: Any) -> int:
        return len(data_batch["inputs"])

    def _average(self, mean: float | None, value: float, batch_idx: int) -> float:
        return value if mean is None else mean + max(_SMOOTHING, 1 / (batch_idx + 1)) * (value - mean)

    def _describe_score(self, metrics: dict[str, float]) -> str | None:
        return f"{self.score} {float(metrics[self.score]):.4g}" if self.score in metrics else None


def _number(value: Any) -> float | None:
    """A float that JSON can hold."""
    return float(value) if math.isfinite(float(value)) else None
