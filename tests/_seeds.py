"""How many random cases a test of an operator draws."""

from __future__ import annotations

import os


def seeds(few: int) -> range:
    """Seeds of a test's random cases: `few`, or `VITRAIL_TEST_SEEDS` where it is larger, for a long search on a GPU."""
    return range(max(few, int(os.environ.get("VITRAIL_TEST_SEEDS", "0"))))
