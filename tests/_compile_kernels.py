"""Compiles the operators' Triton kernels for an H100, without a GPU: `python tests/_compile_kernels.py --help`.

Prints lines of JSON: one a kernel, and one an operator whose codes for many sizes were counted. Operators run on small
maps on the CPU, with a recorder in the place where Triton launches a kernel; what it is handed (arguments, constants,
options) is compiled as Triton would. In a process of its own, since whether kernels are compiled, or interpreted as in
the other tests, is settled when Triton is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from _kernel_calls import CALLS, SIZED, Calls
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from vitrail.kernels._common import dispatch
from vitrail.kernels._common import launch as launch_module

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

    def source(self) -> ASTSource:
        """What Triton compiles."""
        _, (_, signature, constants, attributes) = self.specialization()
        return ASTSource(self.kernel, signature, constants, attributes)


class Resources(NamedTuple):
    """What a program takes: registers of a thread, bytes of its stack (spilled registers), bytes of shared memory.

    `packed` counts the instructions that pack truth values into numbers of 16 bits.
    """

    registers: int
    spilled: int
    shared: int
    packed: int


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


def first_of_each(calls: Calls) -> list[Launch]:
    """The first launch of each kernel in the usual calls."""
    with recording() as launches:
        calls.run(torch.bfloat16, calls.usual)
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(launch.kernel.__name__, launch)
    return list(first.values())


def distinct(calls: Calls, dtype: torch.dtype) -> list[Launch]:
    """Launches of all widths that differ in what is compiled."""
    with recording() as launches:
        for width in calls.widths:
            calls.run(dtype, width)
    return list({(launch.kernel.__name__, launch.specialization()[0]): launch for launch in launches}.values())


def translate(launch: Launch) -> None:
    """The first step of compilation, to Triton's intermediate language: finds what the interpreter lets pass."""
    backend, context = make_backend(H100), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = launch.specialization()[1][0]
    functions = backend.get_codegen_implementation(options)
    launch.source().make_ir(H100, options, functions, backend.get_module_map(), context)


def compile_to_the_end(launch: Launch) -> Resources:
    """Compiles as Triton does, and reads what the code takes."""
    options = launch.specialization()[1][0]
    code = triton.compile(launch.source(), target=H100, options=options.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    packed = code.asm["ptx"].count("or.b16")
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], code.metadata.shared, packed)


def codes_of_sizes(operator: str, run: Callable[[int], None], sizes: Sequence[int]) -> dict[str, Any]:
    """How many codes Triton makes, and how many are told apart where they are remembered, for inputs of some sizes."""
    with recording() as recorded:
        for size in sizes:
            run(size)
    codes = {(x.kernel.__name__, x.specialization()[0]) for x in recorded}
    keys = {launch_module._key(x.kernel, x.arguments, x.constants) for x in recorded}
    return {
        "operator": operator,
        "sizes": len(sizes),
        "launches": len(recorded),
        "codes": len(codes),
        "keys": len(keys),
    }


def row(operator: str, launch: Launch, to_the_end: bool) -> dict[str, Any]:
    """What is printed of a launch."""
    found: dict[str, Any] = {"operator": operator, "kernel": launch.kernel.__name__}
    found["dtype"] = str(launch.arguments[0].dtype)
    found |= {name: str(value) for name, value in launch.constants.items()}
    try:
        if to_the_end:
            return found | compile_to_the_end(launch)._asdict()
        translate(launch)
    except Exception:  # of whatever kind: the rows say which kernels fail
        found["error"] = traceback.format_exc(limit=0)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("operators", nargs="*", default=list(CALLS), help="by default all")
    parser.add_argument("--dtype", help="of the inputs for which all is compiled, in place of a selection")
    options = parser.parse_args(argv)
    for operator in options.operators:
        calls = CALLS[operator]
        launches = distinct(calls, getattr(torch, options.dtype)) if options.dtype else first_of_each(calls)
        for number, launch in enumerate(launches):
            to_the_end = number == 0 or options.dtype is not None
            print(json.dumps(row(operator, launch, to_the_end)), flush=True)
        if options.dtype is None and operator in SIZED:
            print(json.dumps(codes_of_sizes(operator, SIZED[operator], range(601, 617))), flush=True)


if __name__ == "__main__":
    main()
