"""What makes the tools' many small runs shorter, and changes nothing that they leave but how exact a speed is."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

_HAS_MMENGINE = importlib.util.find_spec("mmengine") is not None


@pytest.fixture(autouse=True, scope="session")
def _runs_are_short() -> Iterator[None]:
    """Speeds are measured in a moment; a run's config, which MMEngine formats for each checkpoint anew, is so once."""
    if not _HAS_MMENGINE:
        yield
        return
    from yapf.yapflib import yapf_api

    from vitrail.models.mm import report

    format_code, kept = yapf_api.FormatCode, {}

    def format_once(text: str, **options: Any) -> Any:
        key = (text, repr(options))
        if key not in kept:
            kept[key] = format_code(text, **options)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "measure_throughput", functools.partial(report.measure_throughput, seconds=0.02))
        patch.setattr(yapf_api, "FormatCode", format_once)
        yield
