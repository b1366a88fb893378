"""Jobs of several processes, forked from one server that has imported what they need: they start at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["vitrail.tools.train", "vitrail.tools._common.train_classifier"])


class Finished(NamedTuple):
    """A job after its end: an exit status other than 0 if there is one, and what all processes wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_job(count: int, function: Callable[..., Any], *arguments: Any, folder: Path, seconds: float = 240) -> Finished:
    """Runs a function in several processes, in the environment that torchrun gives, with one thread each.

    Args:
        count: Of the processes.
        function: Of a module that the processes can import; what it returns, if a number, is the exit status.
        *arguments: Of the function.
        folder: Where the processes run and leave what they wrote.
        seconds: After which the processes are killed, with status -9.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _SERVER.Process(target=_run, args=(rank, count, port, folder, function, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.is_alive() for process in processes):
        wait([process.sentinel for process in processes if process.is_alive()], timeout=1)
        if any(process.exitcode for process in processes):  # the others may wait for it for ever
            end = min(end, time.monotonic() + 10)
    for process in processes:
        process.kill()
        process.join()
    texts = ["".join((folder / f"{name}{rank}").read_text() for rank in range(count)) for name in ("stdout", "stderr")]
    return Finished(next((p.exitcode for p in processes if p.exitcode), 0), *texts)


def _run(rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )  # fmt: skip
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))
