"""What `benchmark.py --kernels` measures: for each operator its cases and the ways to compute them.

To add an operator, write a module whose `cases(suite)` returns its cases and add it to `OPERATORS`. There are three
suites: "gpu" has the sizes of published models, "cpu" tiny ones that show that all of it runs and agrees, and "host"
the smallest maps of the models (the last stage), on which the time goes into calls rather than into work.
"""

from __future__ import annotations

from collections.abc import Callable

from vitrail.tools._common.kernel_cases import (
    channel_attention,
    context_window_attention,
    depthwise_conv,
    linear_attention,
    neighborhood_attention,
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
}
