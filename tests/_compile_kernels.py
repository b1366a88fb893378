"""Compiles the operators' Triton kernels for an H100 without one: `python tests/_compile_kernels.py --help`.

Operators run on small maps on the CPU, with a recorder in the place where Triton launches a kernel; what it is handed
(arguments, constants, options) is compiled as Triton would. In a process of its own, since whether kernels are compiled
or interpreted, as the tests run them, is settled when Triton is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from _kernel_calls import CALLS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from vitrail.kernels._common import dispatch

H100 = GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    """A kernel, its arguments, and its compile-time parameters with the options of the launch."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def specialization(self) -> tuple[Any, ...]:
        """What Triton makes of the arguments: (its own key of the code, and what compilation takes)."""
        backend = make_backend(H100)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        constants = {**self.constants, "debug": False, "instrumentation_mode": ""}
        bound, specialization, options = bind(*self.arguments, **constants)
        key = compute_cache_key({}, specialization, options)
        return key, self.kernel._pack_args(backend, constants, bound, specialization, options)


class Resources(NamedTuple):
    """What a program takes: registers of a thread, bytes of its stack (spilled registers), bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects what Triton is asked to launch, in place of launching it."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        launches.append(Launch(kernel, arguments, constants))

    run, dispatch.TRITON_INTERPRETED = JITFunction.run, True  # so that kernels are taken for inputs on the CPU
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run, dispatch.TRITON_INTERPRETED = run, False


def compile_launch(launch: Launch) -> Resources:
    """Compiles one launch's kernel as Triton does."""
    _, (options, signature, constants, attributes) = launch.specialization()
    source = ASTSource(launch.kernel, signature, constants, attributes)
    code = triton.compile(source, target=H100, options=options.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], code.metadata.shared)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", default=list(CALLS), help="by default all")
    parser.add_argument("--all", action="store_true", help="every dtype and width, not only bfloat16 and the usual one")
    options = parser.parse_args(argv)
    for operator in options.operators:
        calls = CALLS[operator]
        for dtype, width in calls.all() if options.all else [(torch.bfloat16, calls.usual)]:
            with recording() as launches:
                calls.run(dtype, width)
            distinct = {launch.specialization()[0]: launch for launch in launches}
            for launch in distinct.values():
                row = {"operator": operator, "kernel": launch.kernel.__name__, "dtype": str(dtype), "width": width}
                try:
                    found = compile_launch(launch)._asdict()
                except Exception as error:  # of whatever kind: the table says which kernels fail
                    found = {"error": repr(error)}
                print(json.dumps(row | found), flush=True)


if __name__ == "__main__":
    main()
