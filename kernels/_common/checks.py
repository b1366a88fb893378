"""Argument checks shared by the operators' `api.py` files; every message names the argument and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vitrail.kernels._common.recording import is_size


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raises `TypeError` unless every given tensor holds floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {tensor.dtype}; allowed: floating-point dtypes")


def check_alike(op: str, attributes: Sequence[str] = ("shape", "dtype", "device"), /, **tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all given tensors agree in these attributes with the first; None is passed over."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        for what in attributes if tensor is not None else ():
            given, wanted = getattr(tensor, what), getattr(first, what)
            if given != wanted:
                raise ValueError(
                    f"{op}: {name} has {what} {_plain(given)}, {first_name} has {_plain(wanted)}; they must agree"
                )


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises `ValueError` unless `tensor` has exactly the given shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {_plain(tensor.shape)}; expected {_plain(shape)}")


def check_dims(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Raises `ValueError` unless `tensor` has as many dimensions as `layout`, written like `"(B, H, W, C)"`."""
    expected = layout.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(f"{op}: {name} has shape {_plain(tensor.shape)}; expected {expected} dimensions, {layout}")


def check_projections(op: str, layout: str, **tensors: Tensor) -> None:
    """Checks queries, keys and, if given, values: dimensions as in `layout`, all alike, floating point."""
    name, first = next(iter(tensors.items()))
    check_dims(op, name, first, layout)
    check_alike(op, **tensors)
    check_floating(op, **{name: first})


def check_packed(op: str, layout: str, qkv: Tensor) -> None:
    """Checks queries, keys and values that one tensor holds along the axis that is 3 in `layout`."""
    check_dims(op, "qkv", qkv, layout)
    axis = layout.strip("()").split(", ").index("3")
    check_shape(op, "qkv", qkv, (*qkv.shape[:axis], 3, *qkv.shape[axis + 1 :]))
    check_floating(op, qkv=qkv)


def check_pads(op: str, q: Tensor, **pads: Tensor | None) -> None:
    """Checks what padded positions of q-like maps hold: all or none given, floating point, (heads, D) each."""
    given = {name: pad for name, pad in pads.items() if pad is not None}
    if given and len(given) < len(pads):
        raise ValueError(f"{op}: {' and '.join(pads)} must be given together or not at all")
    check_floating(op, **given)
    for name, pad in given.items():
        check_shape(op, name, pad, q.shape[-2:])


def to_pair(op: str, name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """Normalises an `int` or an (int, int) for (height, width).

    Raises:
        ValueError: `value` is not one or two integers of at least `minimum`.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(is_size(n) and n >= minimum for n in pair):
        raise ValueError(f"{op}: {name} is {value!r}; expected an int or (height, width), each at least {minimum}")
    return pair[0], pair[1]


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of `tensor`."""
    device_type = tensor.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors to the autocast dtype of their device where autocast is on, as PyTorch does for its own attention.

    float64 tensors are left alone, like under PyTorch's own autocast rules.
    """
    if not autocast_is_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A block in which products keep their inputs' dtype: for sums that half precision cannot hold."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_is_on(tensor) else nullcontext()


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, (torch.Size, list)) else value
