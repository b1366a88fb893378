"""Routing attention and its position term, a depth-wise convolution of the values (LePE), from one projection."""

from vitrail.kernels.routing_attention_lepe.api import routing_attention_lepe

__all__ = ["routing_attention_lepe"]
