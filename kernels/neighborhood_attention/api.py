"""The public function of neighborhood attention: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from vitrail.kernels._common.checks import autocast_together, check_alike, check_floating, check_pads, check_shape
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.neighborhood_attention.op import fused_support, natten_support, run_neighborhood_attention
from vitrail.kernels.neighborhood_attention.reference import (
    neighborhood_attention_reference,
    neighborhood_attention_with_lse,
)

_NAME = "neighborhood_attention"
_Value = TypeVar("_Value", int, bool)


@shortened
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every token over the `kernel_size` tokens nearest to it on each axis.

    The axes are independent: a neighborhood is the product of one set of positions an axis. At the borders it is
    moved inwards, never cut. With a dilation it holds every `dilation`-th token; with a stride, that many queries in a
    row (of one dilation group) share the neighborhood of their middle one (Generalized Neighborhood Attention,
    arXiv 2504.16922); on a causal axis it ends at the query.

    An axis shorter than kernel x dilation counts as if it were that long: what lies behind its end is hidden, or
    takes part as `pad_k` and `pad_v`. The latter is what the released NAT and DiNAT models compute.

    Args:
        q: Queries, (B, L1, [L2, [L3,]] heads, D), any strides, any floating dtype.
        k: Keys, like `q`.
        v: Values, like `q`.
        kernel_size: Keys of a neighborhood, one number an axis or one for all.
        stride: Queries that share a neighborhood, from 1 to the kernel; likewise.
        dilation: Distance of the keys; likewise.
        is_causal: Hide keys behind the query; likewise.
        rpb: Bias on the logits for each head and distance from query to key in units of the dilation,
            (heads, 2 K1 - 1, [...]); the middle is distance 0, a key before its query has a smaller index.
        extra_k: Keys that every query sees besides its neighborhood, (B, n, heads, D).
        extra_v: Their values, like `extra_k`.
        pad_k: Key that every position behind the end of a too short axis holds, (heads, D).
        pad_v: Value of these positions; given exactly where `pad_k` is.
        scale: Factor on `q k^T`; `D ** -0.5` by default.
        return_lse: Return the logarithm of the softmax' denominator too; by the reference only.
        backend: "auto", "eager", "triton", or "natten" for the NATTEN library, which runs on request only.

    Returns:
        (B, L1, ..., heads, D), contiguous, in q's dtype (the autocast dtype under autocast); with `return_lse` also
        (B, L1, ..., heads) in float32 (float64 for float64).

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, dtypes, devices or sizes do not fit together.
        NotImplementedError: The backend asked for cannot compute this call.
    """
    kernel, steps, dilations, causal = _check(
        q, k, v, rpb, extra_k, extra_v, pad_k, pad_v, kernel_size, stride, dilation, is_causal
    )
    q, k, v = autocast_together(q, k, v)
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = autocast_together(extra_k, extra_v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, rpb, extra_k, extra_v, pad_k, pad_v, kernel, steps, dilations, causal, scale)
    if return_lse:
        if backend not in ("auto", "eager"):
            raise NotImplementedError(f"{_NAME}: backend {backend!r} cannot run here: return_lse is the reference's")
        return neighborhood_attention_with_lse(*arguments)
    if backend == "natten":
        support = natten_support(q, rpb, kernel, dilations)
        if not support.ok:
            raise NotImplementedError(f"{_NAME}: backend 'natten' cannot run here: {support.reason}")
        return _natten(q, k, v, extra_k, extra_v, kernel, steps, dilations, causal, scale)
    if choose_backend(_NAME, backend, fused_support(q), q) == "triton":
        return run_neighborhood_attention(*arguments)
    return neighborhood_attention_reference(*arguments)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Checks all arguments; returns kernel, stride, dilation and causality of each axis."""
    if not 4 <= q.dim() <= 6:
        raise ValueError(f"{_NAME}: q has shape {tuple(q.shape)}; expected (B, L1, [L2, [L3,]] heads, D)")
    check_floating(_NAME, q=q)
    check_alike(_NAME, q=q, k=k, v=v)
    axes = q.dim() - 3
    kernel = _per_axis("kernel_size", kernel_size, axes, int)
    steps = _per_axis("stride", stride, axes, int)
    dilations = _per_axis("dilation", dilation, axes, int)
    causal = _per_axis("is_causal", is_causal, axes, bool)
    if any(s > size for s, size in zip(steps, kernel, strict=True)):
        raise ValueError(f"{_NAME}: stride is {steps}; allowed: at most kernel_size {kernel}")
    _check_tensors(q, rpb, extra_k, extra_v, pad_k, pad_v, kernel)
    return kernel, steps, dilations, causal


def _per_axis(name: str, value: _Value | Sequence[_Value], axes: int, kind: type[_Value]) -> tuple[_Value, ...]:
    """One value for each axis, from one for all or a sequence."""
    values = (value,) * axes if isinstance(value, (int, bool)) else tuple(value)
    fits = all(type(x) is kind and (kind is bool or x >= 1) for x in values)
    if len(values) != axes or not fits:
        allowed = "booleans" if kind is bool else "integers of at least 1"
        raise ValueError(f"{_NAME}: {name} is {value!r}; expected one value or {axes}, {allowed}")
    return values


def _check_tensors(
    q: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel: tuple[int, ...],
) -> None:
    """Checks the optional inputs."""
    heads_and_dim = q.shape[-2:]
    if rpb is not None:
        check_floating(_NAME, rpb=rpb)
        check_shape(_NAME, "rpb", rpb, (heads_and_dim[0], *(2 * size - 1 for size in kernel)))
    check_pads(_NAME, q, pad_k=pad_k, pad_v=pad_v)
    if (extra_k is None) != (extra_v is None):
        raise ValueError(f"{_NAME}: extra_k and extra_v must be given together or not at all")
    if extra_k is not None and extra_v is not None:
        check_shape(_NAME, "extra_k", extra_k, (q.shape[0], extra_k.shape[1], *heads_and_dim))
        check_alike(_NAME, extra_k=extra_k, extra_v=extra_v)


def _natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """The same function by NATTEN's `na1d`, `na2d` and `na3d` (version 0.20 and later)."""
    import natten  # not a requirement of this package

    function = getattr(natten, f"na{len(kernel)}d")
    extra = {} if extra_k is None else {"additional_keys": extra_k, "additional_values": extra_v}
    out: Tensor = function(
        q, k, v, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=is_causal, scale=scale, **extra
    )
    return out
