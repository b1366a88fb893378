"""What code must know that a recorder runs in place of a caller: a graph for any size holds one branch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def records_graph() -> bool:
    """Whether `torch.jit.trace` (and with it the ONNX exporter) or `torch.export` records the calls."""
    return torch.jit.is_tracing() or _is_exporting()


# Called for its answer also where `torch.compile` traces: PyTorch 2.11 takes every compilation for an export there.
@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def is_size(value: object) -> bool:
    """Whether a value is an integer, or what stands for one while a graph is recorded."""
    if isinstance(value, (int, torch.SymInt)):
        return True
    return torch.jit.is_tracing() and isinstance(value, torch.Tensor) and value.dim() == 0


def at_least(size: int, minimum: int) -> int:
    """The larger of a size and a constant, also for what stands for a size while a graph is recorded."""
    if isinstance(size, torch.Tensor):
        return size.clamp(min=minimum)
    if torch.compiler.is_dynamo_compiling():  # up to PyTorch 2.11 it refuses a `sym_max` that comes to a number
        return max(size, minimum)
    larger: int = torch.sym_max(size, minimum)  # type: ignore[assignment]
    return larger


def at_most(size: int, maximum: int) -> int:
    """The smaller of a size and a constant; see `at_least`."""
    if isinstance(size, torch.Tensor):
        return size.clamp(max=maximum)
    if torch.compiler.is_dynamo_compiling():
        return min(size, maximum)
    smaller: int = torch.sym_min(size, maximum)  # type: ignore[assignment]
    return smaller


def padding_to(size: int, multiple: int) -> int:
    """Rows or columns that are missing to a multiple; written so that symbolic sizes are seen to become multiples."""
    # No negative number is divided: ONNX rounds such a quotient towards zero.
    return (size + multiple - 1) // multiple * multiple - size


def surely(condition: bool) -> bool:
    """Whether a condition on sizes holds, and for all sizes that a graph is recorded or compiled for; scripted, too.

    False where that is not known: unlike a branch on the condition it leaves the graph good for any size.
    """
    if torch.jit.is_scripting():
        return condition
    return _surely(condition)


@torch.jit.unused
def _surely(condition: bool) -> bool:
    if torch.jit.is_tracing():
        return False
    if torch.compiler.is_dynamo_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def is_padded(pads: Sequence[int]) -> bool:
    """Whether anything is to be padded.

    Also true where a graph is recorded for sizes that do not tell: padding by nothing is right as well.
    """
    return torch.jit.is_tracing() or not all(_is_zero(pad) for pad in pads)


def _is_zero(pad: int) -> bool:
    return surely(pad == 0) if isinstance(pad, torch.SymInt) and _is_exporting() else bool(pad == 0)
