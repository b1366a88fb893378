"""What a process does that is killed while it trains."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Sequence
from typing import Any

from vitrail.tools.train import main


def train_until_killed(iteration: int, runner: str, arguments: Sequence[str]) -> int:
    """Runs `vitrail-train` with a hook that ends the process by SIGKILL.

    Args:
        iteration: After whose step, counted from 1.
        runner: Module of the runner that trains, whose own hooks are all that it takes.
        arguments: Of `vitrail-train`.
    """
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module(name="KillHook")
    class _KillHook(Hook):
        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            if runner.iter + 1 == iteration:
                os.kill(os.getpid(), signal.SIGKILL)

    module = importlib.import_module(runner)
    module._OWN_HOOKS = (*module._OWN_HOOKS, "KillHook")
    return main(list(arguments))
