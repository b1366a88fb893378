"""Lets processes that share a GPU prepare at the same time and measure one at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_PATIENCE = 60.0  # seconds
_LOCKS = ("preparing", "waiting", "measuring")


class Turns:
    """Between `with Turns(path) as turns:` and its end this process is one of those that were given the same path.

    They go in step: who is ready waits until nobody prepares, all measure one after the other, then all prepare again.
    Who waits for one that takes very long to prepare gives up, and measures beside it. The locks are files, which the
    system unlocks when a process ends, in whatever way.

    Args:
        path: Beginning of the files' names; None for a process that has nobody to wait for.
        patience: For how many seconds to wait for those that prepare.
    """

    def __init__(self, path: str | Path | None = None, patience: float = _PATIENCE) -> None:
        self._path = path
        self._patience = patience
        self._files: dict[str, int] = {}
        self._prepares = False

    def __enter__(self) -> Turns:
        if self._path:
            self._files = {name: os.open(f"{self._path}.{name}", os.O_RDWR | os.O_CREAT) for name in _LOCKS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def prepare(self) -> None:
        """Waits until all that are ready have measured; from then on nobody measures before this process is ready."""
        if not self._files or self._prepares:
            return
        import fcntl  # not on Windows

        fcntl.flock(self._files["waiting"], fcntl.LOCK_EX)
        fcntl.flock(self._files["preparing"], fcntl.LOCK_SH)
        fcntl.flock(self._files["waiting"], fcntl.LOCK_UN)
        self._prepares = True

    @contextmanager
    def measuring(self) -> Iterator[bool]:
        """Waits until nobody else prepares or measures; yields False if somebody still prepares."""
        if not self._files:
            yield True
            return
        import fcntl

        fcntl.flock(self._files["waiting"], fcntl.LOCK_SH)
        fcntl.flock(self._files["preparing"], fcntl.LOCK_UN)
        self._prepares = False
        fcntl.flock(self._files["measuring"], fcntl.LOCK_EX)
        try:
            yield self._nobody_prepares()
        finally:
            for name in _LOCKS:
                fcntl.flock(self._files[name], fcntl.LOCK_UN)

    def _nobody_prepares(self) -> bool:
        import fcntl

        end = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(self._files["preparing"], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
                time.sleep(0.05)
            else:
                return True
