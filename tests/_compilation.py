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
_KERNEL = r"^def (\w+_kernel)\("

_HERE = Path(__file__).resolve().parent


def written_kernels() -> set[tuple[str, str]]:
    """(operator, kernel) of all Triton kernels; shared ones count for every operator whose files come to them."""
    root = _HERE.parent / "kernels"
    texts = [(file.relative_to(root).parts[0], file.read_text()) for file in sorted(root.rglob("*.py"))]
    written = {(owner, name) for owner, text in texts for name in re.findall(_KERNEL, text, re.MULTILINE)}
    common = "\n".join(text for owner, text in texts if owner == "_common")
    shared = {name: _names_of(name, common) for owner, name in written if owner == "_common"}
    users = {(owner, name) for owner, text in texts for name, names in shared.items() if re.search(names, text)}
    used = {name for owner, name in users if owner != "_common"}
    return {(owner, name) for owner, name in written | users if owner != "_common" or name not in used}


def _names_of(kernel: str, common: str) -> str:
    """A pattern of a shared kernel's name and of those of the functions that come to it."""
    functions = re.split(r"^(?=def |@|class )", common, flags=re.MULTILINE)
    names, known = {kernel}, 0
    while len(names) > known:
        known, pattern = len(names), rf"\b({'|'.join(sorted(names))})\b"
        users = (re.match(r"def (\w+)", one) for one in functions if re.search(pattern, one))
        names |= {user[1] for user in users if user}
    return pattern


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
