"""Two linear layers with GELU between them, for inference: the hidden map never reaches memory."""

from vitrail.kernels.mlp.api import mlp

__all__ = ["mlp"]
