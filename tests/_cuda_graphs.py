"""Calls that are recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitrail.tools._common.measure import capture_graph


def assert_a_cuda_graph_repeats(step: Callable[[], Sequence[Tensor]]) -> None:
    """What a graph of `step` leaves is what `step` gives when it is called, to the last bit."""
    results: list[Sequence[Tensor]] = []
    graph = capture_graph([lambda: results.append(step())])
    *_, want, got = results  # the last ones are empty until the graph runs
    graph.run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
