"""Says what a command is doing: in one line that changes on a terminal, in lines with the time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console


class Progress:
    """Reports on stderr between `with Progress() as progress:` and its end."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._status = console.status("starting") if console.is_terminal else None
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def say(self, text: str) -> None:
        """Shows what happens now."""
        elapsed = f"[{time.monotonic() - self._start:5.0f} s] "
        if self._status:
            self._status.update(text)
        else:
            print(elapsed + text, file=sys.stderr, flush=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps the changing line out of the way of what is printed meanwhile."""
        if self._status:
            self._status.stop()
        yield
        if self._status:
            self._status.start()
