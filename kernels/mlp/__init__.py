"""Two linear layers with GELU between them: the forward leaves the hidden map in registers, the backward renews it."""

from vitrail.kernels.mlp.api import mlp

__all__ = ["mlp"]
