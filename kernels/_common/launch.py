"""What launches of Triton kernels share: how tensors are handed over, and that compiled code is found again quickly."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MOST_REMEMBERED = 4096
_compiled: dict[Hashable, Any] = {}


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
    that a launch costs. Here the arguments themselves are the key: numbers, strides and constants by value, tensors by
    dtype and alignment, which is all that the code may depend on.

    Args:
        kernel: A function under `triton.jit`, its compile-time parameters last.
        grid: Numbers of programs, one to three.
        arguments: Its other parameters, in their order; the first is a tensor.
        constants: The compile-time parameters, and Triton's options.
    """
    if isinstance(arguments[0], FakeTensor):  # a run without data: what the kernel would fill is there
        return
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **constants)
        return
    described = [(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x for x in arguments]
    key = (id(kernel), device.index, *described, *constants.items())
    code = _compiled.get(key)
    if code is None:
        if len(_compiled) >= _MOST_REMEMBERED:
            _compiled.clear()
        _compiled[key] = kernel[grid](*arguments, **constants)
        return
    whole_grid = (*grid, 1, 1)
    n_constants = len(kernel.params) - len(arguments)
    code[whole_grid](*arguments, *(None,) * n_constants)


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels step through a head's channels one by one; other layouts are copied."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """An optional tensor in the plain layout."""
    return None if tensor is None else tensor.contiguous()


def map_strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides over (B, H, W, heads) of each tensor."""
    return tuple(t.stride()[:4] for t in tensors)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
