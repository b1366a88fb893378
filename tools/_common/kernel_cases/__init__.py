"""What `benchmark.py --kernels` measures: for each operator its cases and the ways to compute them.

To add an operator, write a module whose `cases(suite)` returns its cases and add it to `OPERATORS`. There are three
suites: "gpu" has the sizes of published models, "cpu" tiny ones that show that all of it runs and agrees, and "host"
the smallest maps of the models (the last stage), on which the time goes into calls rather than into work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitrail.tools._common.cli import UsageError, unknown_name
from vitrail.tools._common.kernel_cases import (
    channel_attention,
    context_window_attention,
    depthwise_conv,
    layer_norm,
    linear_attention,
    mlp,
    neighborhood_attention,
    relative_position_bias,
    retention,
    routing_attention,
    routing_layer,
    scattered_linear_attention,
    sparse_conv,
    strip_gate,
    varied_window_attention,
    window_attention,
)
from vitrail.tools._common.kernel_cases.common import KernelCase

OPERATORS: dict[str, Callable[[str], list[KernelCase]]] = {
    "window_attention": window_attention.cases,
    "routing_attention": routing_attention.cases,
    "routing_layer": routing_layer.cases,
    "neighborhood_attention": neighborhood_attention.cases,
    "linear_attention": linear_attention.cases,
    "channel_attention": channel_attention.cases,
    "retention": retention.cases,
    "varied_window_attention": varied_window_attention.cases,
    "strip_gate": strip_gate.cases,
    "context_window_attention": context_window_attention.cases,
    "scattered_linear_attention": scattered_linear_attention.cases,
    "sparse_conv": sparse_conv.cases,
    "depthwise_conv": depthwise_conv.cases,
    "layer_norm": layer_norm.cases,
    "mlp": mlp.cases,
    "relative_position_bias": relative_position_bias.cases,
}


def choose_cases(
    operators: Sequence[str], suite: str, texts: Sequence[str] = (), part: str | None = None
) -> list[KernelCase]:
    """The cases of some operators that are asked for.

    Args:
        operators: Their names; none are all.
        suite: One of `SUITES`.
        texts: Names of cases, or what their operator and name contain; none are all.
        part: "I/N" takes every N-th of them from the I-th.

    Raises:
        UsageError: A name or text fits nothing, or `part` leaves nothing.
    """
    for operator in operators:
        if operator not in OPERATORS:
            raise unknown_name("operator", operator, OPERATORS)
    found = [case for operator in operators or OPERATORS for case in OPERATORS[operator](suite)]
    wanted = [_matching(text, found) for text in texts]
    chosen = [case for case in found if not texts or any(case in cases for cases in wanted)]
    first, step = _parse_part(part or "1/1")
    if first > len(chosen):
        raise UsageError(f"--part is {part}, which leaves nothing of {len(chosen)} cases")
    return chosen[first - 1 :: step]


def _matching(text: str, found: Sequence[KernelCase]) -> list[KernelCase]:
    """The case of that name, else those whose operator and name contain it."""
    names = [f"{case.operator} {case.name}" for case in found]
    cases = [case for case in found if case.name == text]
    cases = cases or [case for case, name in zip(found, names, strict=True) if text in name]
    if not cases:
        raise UsageError(f"no case contains {text!r}; there are: {'; '.join(names)}")
    return cases


def _parse_part(text: str) -> tuple[int, int]:
    first, _, parts = text.partition("/")
    if not (first.isdecimal() and parts.isdecimal() and 1 <= int(first) <= int(parts)):
        raise UsageError(f"--part is {text!r}; allowed: I/N with I from 1 to N, as in 1/2")
    return int(first), int(parts)
