"""Lets processes that share a GPU prepare at the same time and measure one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO


class Turns:
    """Between `with Turns(path) as turns:` and its end this process is one of those that were given the same file.

    Each holds a shared lock on the file while it prepares, and an exclusive one while it measures: nobody measures
    before all have prepared. The system takes the lock from a process that ends, in whatever way.

    Args:
        path: The file, made if it does not exist; None for a process that has nobody to wait for.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = path and Path(path)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Turns:
        if self._path:
            self._file = self._path.open("ab")
            self._lock(exclusive=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Waits until nobody else prepares or measures, and keeps the others waiting until its end."""
        self._lock(exclusive=True)
        try:
            yield
        finally:
            self._lock(exclusive=False)

    def _lock(self, exclusive: bool) -> None:
        if self._file:
            import fcntl  # not on Windows

            fcntl.flock(self._file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
