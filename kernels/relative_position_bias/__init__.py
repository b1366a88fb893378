"""The table of relative positions spread over all pairs of tokens of a window."""

from vitrail.kernels.relative_position_bias.api import relative_position_bias

__all__ = ["relative_position_bias"]
