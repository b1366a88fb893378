"""Under which conditions a training ran: for its first line on the screen and for its `metrics.json`."""

from __future__ import annotations

import platform
from typing import Any

import timm
import torch

import vitrail
from vitrail.tools._common.cli import describe_device


def describe_place(runner: Any) -> str:
    """The device and the number of processes."""
    return f"{describe_device(runner.device)}, {runner.world_size} process{'es' if runner.world_size > 1 else ''}"


def run_facts(runner: Any) -> dict[str, Any]:
    """Seed, device, processes and versions."""
    return {
        "seed": runner.seed,
        "device": describe_device(runner.device),
        "processes": runner.world_size,
        "versions": {
            "vitrail": vitrail.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }
