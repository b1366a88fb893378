"""Which way a call of an operator takes: through PyTorch's dispatcher, or past it.

The dispatcher (`torch.ops.vitrail.NAME`) is what makes an operator known to the rest of PyTorch, and it takes longer
than all else that happens on the host: an operator that is written in Python is entered three times, and its arguments
are translated each time. Small maps then wait for the host. So a call goes

- **through the dispatcher** if anything may want to see it (`direct_kind`): a compiler, exporter or tracer, a transform
  of `torch.func`, forward-mode differentiation, a mode (`FakeTensorMode`, `FlopCounterMode`, `torch.device(...)`), the
  profiler, or a tensor that is more than a plain one, such as a `DTensor`;
- **directly** otherwise: to the implementation where no gradient is needed, else to it by way of a
  `torch.autograd.Function` that saves what the operator's registration saves and runs the same backward. Hooks on saved
  tensors, checkpointing, changes in place of what was saved, CUDA graphs and autocast are as they are for any function.

A backward that is itself to be differentiated goes through the dispatcher too, which knows what to say about that.
Public functions come here by way of a `shortcut` if their kind of call is known, and what graphs call instead
(`torch.ops.vitrail.NAME.default`) goes directly if it can be replayed; see `overload`. Where PyTorch lacks one
of the functions that tell who watches, all calls go through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitrail.kernels._common.kinds import kind_of

try:
    from torch._C import (
        _are_functorch_transforms_active,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled

    _KNOWS_WATCHERS = hasattr(forward_ad, "_current_level")
except ImportError:
    _KNOWS_WATCHERS = False


def someone_watches() -> bool:
    """Whether anything may want to see a call, whatever its tensors are."""
    return torch.compiler.is_compiling() or someone_watches_graphs()


def someone_watches_graphs() -> bool:
    """The same for a call in a graph, which is not what is compiled."""
    return not _KNOWS_WATCHERS or bool(
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


def direct_kind(arguments: Iterable[Any], tensors: list[Tensor]) -> tuple[Hashable, ...] | None:
    """The kind of a call that may go directly, or None where it must go through the dispatcher; see `kind_of`."""
    return None if someone_watches() else kind_of(arguments, tensors)


def need_gradients(tensors: Iterable[Tensor]) -> bool:
    """Whether a call on `tensors` is one that autograd must know of."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False
