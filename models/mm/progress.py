"""Shows how a training run goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_WINDOW_SECONDS, _WINDOW_ITERATIONS = 20.0, 200  # the shown speed is that of the latest iterations, up to these
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
        self._held_out: str | None = None
        self._recent: deque[float] = deque(maxlen=_WINDOW_ITERATIONS)  # seconds of the latest iterations
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
        self._remember(now - self._last_time)
        self._last_time = now
        self._images_per_iteration = self._count_images(data_batch) * get_dist_info()[1]
        for name in ("loss", "accuracy"):
            if name in outputs:
                self._means[name] = self._average(self._means.get(name), float(outputs[name].detach()), batch_idx)
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
        self._held_out = self._describe_score(metrics or {})
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
        title = self._title(runner, runner.epoch + 1 if epoch is None else epoch, done)
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
            parts.append(self._held_out)
        if self._recent:
            iterations_per_second = len(self._recent) / sum(self._recent)
            parts.append(f"{self._images_per_iteration * iterations_per_second:,.0f} images/s")
            seconds = (runner.max_iters - done) / iterations_per_second
            seconds += self._seconds_per_validation * runner.validations_left(done)
            parts.append(f"{format_seconds(seconds)} left")
        return "  ".join(parts)

    def _remember(self, seconds: float) -> None:
        """Adds an iteration, and forgets those that the window has passed: slow first ones among them."""
        self._recent.append(seconds)
        while len(self._recent) > 1 and sum(self._recent) - self._recent[0] >= _WINDOW_SECONDS:
            self._recent.popleft()

    def _title(self, runner: Any, epoch: int, done: int) -> str:
        return f"epoch {epoch}/{runner.max_epochs}"

    def _count_images(self, data_batch: Any) -> int:
        return len(data_batch["indices"])

    def _average(self, mean: float | None, value: float, batch_idx: int) -> float:
        """The mean over the epoch so far."""
        return value if mean is None else mean + (value - mean) / (batch_idx + 1)

    def _describe_score(self, metrics: dict[str, float]) -> str | None:
        return f"held-out {metrics['accuracy/top1']:.2f} %"

    @staticmethod
    def _is_shown() -> bool:
        return get_dist_info()[0] == 0


def format_seconds(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
