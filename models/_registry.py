"""The names that this package registered with timm."""

from __future__ import annotations

import fnmatch

import timm


def list_models(pattern: str = "*") -> list[str]:
    """Sorted entry points of vitrail whose name matches a shell-style pattern, for `timm.create_model`."""
    ours = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vitrail.")]
    return sorted(fnmatch.filter(ours, pattern))
