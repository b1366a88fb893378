"""Compilation of the Triton kernels in another process, see `_compile_kernels.py`, and what is asked of its result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_MOST_SHARED = 227 * 1024  # bytes that a program can have on an H100

_HERE = Path(__file__).resolve().parent


def written_kernels() -> set[tuple[str, str]]:
    """(operator, kernel) of all Triton kernels."""
    root = _HERE.parent / "kernels"
    return {
        (file.relative_to(root).parts[0], name)
        for file in root.rglob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }


def compiled_rows(*arguments: str) -> list[dict[str, Any]]:
    """What `_compile_kernels.py` prints."""
    command = [sys.executable, str(_HERE / "_compile_kernels.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(_HERE.parent)}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def faults(rows: list[dict[str, Any]], most_spilled: int) -> list[dict[str, Any]]:
    """Kernels that do not compile, do not fit or spill registers of more than so many bytes a thread."""
    return [
        row
        for row in rows
        if "error" in row or row.get("shared", 0) > _MOST_SHARED or row.get("spilled", 0) > most_spilled
    ]
