"""What launches of Triton kernels share: how tensors are handed over, and that compiled code is found again quickly."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vitrail.kernels._common.dispatch import TRITON_INTERPRETED
from vitrail.kernels._common.kinds import Memory

_MOST_REMEMBERED = 4096
_INT32 = 2**31  # integers from here on, and below its negative, take 64 bits
_compiled = Memory(_MOST_REMEMBERED)
_thread = threading.local()


class _Classes(Memory):
    """What Triton makes of an integer or a tuple of them: that one is 1, a multiple of 16 or long is compiled in."""

    def __missing__(self, given: Any) -> Hashable:
        if isinstance(given, tuple):
            found: Hashable = tuple(self[number] for number in given)
        else:
            found = given == 1, given % 16 == 0, -_INT32 <= given < _INT32
        self[given] = found
        return found


_classes = _Classes(_MOST_REMEMBERED)


class Config(NamedTuple):
    """How a kernel is launched: warps a program, pipeline stages, and programs a multiprocessor where they walk."""

    num_warps: int
    num_stages: int
    programs: int = 0

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of the Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs `kernel[grid](*arguments, **constants)` on the device of the first argument.

    Triton finds a kernel's compiled code by classifying every argument of every call, which takes longer than all else
    that a launch costs. Here what it may depend on is found more quickly; see `_key`.

    Args:
        kernel: A function under `triton.jit`, its compile-time parameters last.
        grid: Numbers of programs, one to three.
        arguments: Its other parameters, in their order; the first is a tensor. Tuples hold integers alone, or floats.
        constants: The compile-time parameters, and Triton's options.
    """
    if isinstance(arguments[0], FakeTensor):  # a run without data: what the kernel would fill is there
        return
    device = arguments[0].device
    if TRITON_INTERPRETED or device.type != "cuda":
        kernel[grid](*arguments, **constants)
    elif device.index == torch.cuda.current_device():
        _launch_remembered(device.index, kernel, grid, arguments, constants)
    else:
        with torch.cuda.device(device):
            _launch_remembered(device.index, kernel, grid, arguments, constants)


def _launch_remembered(
    device: int, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Launches on the current device with the code that an earlier call of the same kind has compiled, if any has."""
    key = (device, *_key(kernel, arguments, constants))
    n_constants = len(kernel.params) - len(arguments)
    code = _compiled.get(key)
    if code is None:
        code = _compiled[key] = kernel[grid](*arguments, **constants)
    else:
        # Compiled code takes every parameter of the kernel in its order, and looks at no compile-time one.
        whole_grid = (*grid, 1, 1)
        code[whole_grid](*arguments, *(None,) * n_constants)
    listener = getattr(_thread, "listener", None)
    if listener is not None:
        listener(code, grid, (*arguments, *(None,) * n_constants))


@contextmanager
def tells_of_launches(listener: Callable[[Any, tuple[int, ...], tuple[Any, ...]], None]) -> Iterator[None]:
    """A block in which `listener` gets the compiled code, the grid and all parameters of this thread's launches."""
    _thread.listener = listener
    try:
        yield
    finally:
        _thread.listener = None


class Starter(NamedTuple):
    """How compiled code is launched.

    Attributes:
        start: Takes the grid's three numbers, the stream, what `before` holds, and all of a kernel's parameters; in
            place of tensors their addresses, of which Triton does not ask the driver whether they are the device's.
        before: Other arguments.
        packs_parameters: Whether the parameters are given as one tuple.
    """

    start: Callable[..., Any]
    before: tuple[Any, ...]
    packs_parameters: bool


def starter(code: Any) -> Starter:
    """How to do what `code[grid](*parameters)` does where there are no launch hooks.

    Triton's launcher is Python code around a function in C, which it calls with nothing else where the kernel needs no
    memory of Triton's own. In the versions of which the arguments are known here that function is called at once.
    """
    launcher, metadata = code.run, code.packed_metadata
    version = _triton_version()
    before: tuple[Any, ...]
    if version in ("3.6", "3.8") and _calls_only_c(launcher):
        flags = launcher.launch_cooperative_grid, launcher.launch_pdl
        if version == "3.6":
            before = code.function, *flags, None, None, metadata, None, None, None
            return Starter(launcher.launch, before, packs_parameters=False)
        described = launcher.arg_annotations, launcher.kernel_signature
        before = code.function, *flags, metadata, None, None, None, None, None, *described
        return Starter(launcher.launch, before, packs_parameters=True)
    return Starter(launcher, (code.function, metadata, None, None, None), packs_parameters=False)


def _calls_only_c(launcher: Any) -> bool:
    """Whether it is Triton's launcher for CUDA, without workspace, instrumentation or tensor descriptors."""
    if type(launcher).__name__ != "CudaLauncher" or isinstance(launcher.launch, FunctionType):
        return False
    workspace = launcher.global_scratch_size, launcher.profile_scratch_size
    return not any(workspace) and not getattr(launcher, "gsan_enabled", False)


def _triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def stream_getter() -> Callable[[int], int]:
    """A function that finds the current stream of a device."""
    from triton.runtime import driver

    found: Callable[[int], int] = driver.active.get_current_stream
    return found


def has_launch_hooks() -> bool:
    """Whether Triton calls something before or after launches: a function, or a chain that holds some."""
    runtime = _triton_runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def _triton_runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def _key(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Hashable, ...]:
    """What the code of a call may depend on, equal for two calls if and only if it is the same for Triton.

    Of tensors that is the dtype and whether they start at a multiple of 16 bytes, of integers that the kernel does not
    specialise, such as an image's size, the type alone: sizes that differ from batch to batch find the same code.
    """
    found: list[Any] = [id(kernel)]
    for argument, parameter in zip(arguments, kernel.params, strict=False):
        kind = type(argument)
        if kind is tuple:
            floats = argument and type(argument[0]) is float  # whose values are not compiled in
            found.append((float, len(argument)) if floats else _classes[argument])
        elif kind is int:
            is_size = parameter.do_not_specialize
            found.append(-_INT32 <= argument < _INT32 if is_size else _classes[argument])
        elif isinstance(argument, Tensor):
            found.append((argument.dtype, argument.data_ptr() % 16 == 0))
        else:  # a float, a truth value or None
            found.append(kind)
    return (*found, *constants, *constants.values())


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels step through a head's channels one by one; other layouts are copied."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """An optional tensor in the plain layout."""
    return None if tensor is None else tensor.contiguous()


def map_strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides over (B, H, W, heads) of each tensor."""
    return tuple(t.stride()[:4] for t in tensors)


def as_rows(x: Tensor) -> Tensor:
    """(..., C) -> (rows, C), a view where rows lie at one distance of each other; other layouts are copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_stride(rows: Tensor) -> int:
    """Distance of rows, a constant of the kernels since it belongs to the model; that of one row means nothing."""
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have on a CUDA device; those of an H100 where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
