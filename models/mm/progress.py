"""Shows how a training run goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SMOOTHING = 0.05  # share of the newest iteration in the shown speed
_LINE_SECONDS = 30.0  # longest silence between two plain lines


class ProgressHook(Hook):
    """Loss, accuracy, images a second and time left; only the first process shows anything.

    Args:
        console: Where to show it. A console that is no terminal gets a line an epoch, and one every half minute.
    """

    priority = "VERY_LOW"

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._means: dict[str, float] = {}  # of the epoch so far
        self._held_out: float | None = None
        self._seconds_per_iteration: float | None = None
        self._seconds_per_validation = 0.0
        self._images_per_iteration = 0
        self._validation_started = self._last_time = self._last_line = 0.0

    def before_train(self, runner: Any) -> None:
        """Opens the display."""
        self._last_line = time.perf_counter()
        if not self._is_shown() or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"),
            console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=runner.max_iters, completed=runner.iter, state="starting")
        self._bar.start()

    def before_train_epoch(self, runner: Any) -> None:
        """Leaves validation out of the iteration's time; means start anew."""
        self._last_time = time.perf_counter()
        self._means = {}

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Updates the display."""
        now = time.perf_counter()
        self._seconds_per_iteration = _smooth(self._seconds_per_iteration, now - self._last_time)
        self._last_time = now
        self._images_per_iteration = len(data_batch["indices"]) * get_dist_info()[1]
        for name in ("loss", "accuracy"):
            if name in outputs:
                mean = self._means.get(name, 0.0)
                self._means[name] = mean + (float(outputs[name]) - mean) / (batch_idx + 1)
        self._show(runner, runner.iter + 1, line=now - self._last_line > _LINE_SECONDS)

    def after_train_epoch(self, runner: Any) -> None:
        """Writes a line unless a validation follows, which will."""
        self._show(runner, runner.iter, line=not runner.validation_follows())

    def before_val_epoch(self, runner: Any) -> None:
        """Starts the validation's clock."""
        self._validation_started = time.perf_counter()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Shows the held-out accuracy."""
        self._seconds_per_validation = time.perf_counter() - self._validation_started
        self._held_out = metrics["accuracy/top1"]
        if runner.is_training:
            self._show(runner, runner.iter, line=True, epoch=runner.epoch)

    def after_train(self, runner: Any) -> None:
        """Closes the display."""
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, runner: Any, done: int, line: bool, epoch: int | None = None) -> None:
        if not self._is_shown():
            return
        epoch = runner.epoch + 1 if epoch is None else epoch
        title = f"epoch {epoch}/{runner.max_epochs}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=title, state=self._state(runner, done))
        elif line:
            self._last_line = time.perf_counter()
            self.console.print(f"{title}  {self._state(runner, done)}", highlight=False, soft_wrap=True)

    def _state(self, runner: Any, done: int) -> str:
        parts = [f"loss {self._means['loss']:.3f}"] if "loss" in self._means else []
        if "accuracy" in self._means:
            parts.append(f"train {100 * self._means['accuracy']:.1f} %")
        if self._held_out is not None:
            parts.append(f"held-out {self._held_out:.2f} %")
        if self._seconds_per_iteration:
            parts.append(f"{self._images_per_iteration / self._seconds_per_iteration:,.0f} images/s")
            seconds = self._seconds_per_iteration * (runner.max_iters - done)
            seconds += self._seconds_per_validation * runner.validations_left(done)
            parts.append(f"{format_seconds(seconds)} left")
        return "  ".join(parts)

    @staticmethod
    def _is_shown() -> bool:
        return get_dist_info()[0] == 0


def format_seconds(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
