"""Layer normalisation of the last axis, for training: forward and backward read each map once."""

from vitrail.kernels.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
