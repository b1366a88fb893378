"""A map gated by one sigmoid strip along its height and one along its width."""

from vitrail.kernels.strip_gate.api import strip_gate

__all__ = ["strip_gate"]
