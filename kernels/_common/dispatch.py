"""How an operator chooses the implementation that runs, and how that choice can be observed.

A choice is made per call, in the operator's `api.py`, from the caller's `backend` argument:

- ``"auto"``: the fused kernel where it is supported and worth it, else the eager reference;
- ``"eager"``: the reference;
- ``"triton"``: the fused kernel, or an error that says why it cannot run.

The environment variable ``VITRAIL_BACKEND`` replaces ``"auto"`` for a whole process (read once, at import).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

BACKENDS = ("auto", "eager", "triton")
FUSED_HEAD_DIMS = (16, 32, 64, 128)
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Support(NamedTuple):
    """Whether a fused kernel can compute a call, and if not, why."""

    ok: bool
    reason: str


_SUPPORTED = Support(True, "supported")
_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Choice(NamedTuple):
    """One operator call as `record_choices` saw it."""

    op: str
    backend: str
    reason: str
    shape: tuple[int, ...]


@dataclass
class Settings:
    """Process-wide settings of the operators; the only mutable state in `vitrail.kernels`."""

    default_backend: str = field(default_factory=lambda: os.environ.get("VITRAIL_BACKEND", "auto"))
    recorder: list[Choice] | None = None

    def __post_init__(self) -> None:
        if self.default_backend not in BACKENDS:
            raise ValueError(f"VITRAIL_BACKEND is {self.default_backend!r}; allowed: {', '.join(BACKENDS)}")


settings = Settings()


@contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects the backend choice of every operator call made inside the `with` block."""
    outer = settings.recorder
    choices: list[Choice] = []
    settings.recorder = choices
    try:
        yield choices
    finally:
        settings.recorder = outer


def triton_support(tensor: torch.Tensor, head_dim: int, head_dims: tuple[int, ...] = FUSED_HEAD_DIMS) -> Support:
    """The conditions that all our Triton kernels share: device, dtype and head width."""
    if tensor.is_cuda and head_dim in head_dims and tensor.dtype in _FUSED_DTYPES and HAS_TRITON:
        return _SUPPORTED
    if not HAS_TRITON:
        return Support(False, "Triton is not installed")
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and TRITON_INTERPRETED):
        return Support(False, f"Triton kernels run on CUDA devices, the input is on {tensor.device.type}")
    if tensor.dtype not in _FUSED_DTYPES:
        return Support(False, f"Triton kernels take float16, bfloat16 and float32, the input is {tensor.dtype}")
    if head_dim not in head_dims:
        return Support(False, f"Triton kernels take head widths {head_dims}, the input has {head_dim}")
    return _SUPPORTED


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether what prepares an operator (tables, orders) runs as Triton kernels: on CUDA devices, unless "eager" rules.

    Such kernels hold whole numbers only, so that it makes no difference but in time.
    """
    return tensor.device.type == "cuda" and HAS_TRITON and settings.default_backend != "eager"


def choose_backend(op: str, backend: str, fused: Support, tensor: torch.Tensor, packed_at: int | None = None) -> str:
    """Turns a requested backend into `"eager"` or `"triton"` and records the choice.

    Args:
        op: Name of the operator, for messages and the record.
        backend: What the caller asked for, one of `BACKENDS`.
        fused: Whether the fused kernel can compute this call.
        tensor: The operator's first input; its device and shape enter the choice and the record.
        packed_at: Axis of `tensor` along which q, k and v lie; the record has the shape of one of them.

    Raises:
        ValueError: `backend` is unknown.
        NotImplementedError: `backend` is `"triton"` and the kernel cannot compute this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    requested = settings.default_backend if backend == "auto" else backend
    if requested == "triton" and not fused.ok:
        raise NotImplementedError(f"{op}: backend 'triton' cannot run here: {fused.reason}")
    # The interpreter is a debugging aid, thousands of times slower than the reference: only on request.
    automatic = requested == "auto" and tensor.is_cuda
    runs_fused = fused.ok and (requested == "triton" or automatic)
    chosen = "triton" if runs_fused else "eager"
    if settings.recorder is not None:
        reason = fused.reason if requested == "auto" and not fused.ok else f"backend {requested!r}"
        shape = tensor.shape if packed_at is None else tensor.select(packed_at, 0).shape
        settings.recorder.append(Choice(op, chosen, reason, tuple(shape)))
    return chosen
