"""Bi-level routing: each region of a map attends to the tokens of the few regions it is routed to."""

from vitrail.kernels.routing_attention.api import region_routes, routing_attention

__all__ = ["region_routes", "routing_attention"]
