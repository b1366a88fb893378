"""Neighborhood attention: every token attends to the tokens nearest to it, on one to three axes."""

from vitrail.kernels.neighborhood_attention.api import neighborhood_attention

__all__ = ["neighborhood_attention"]
