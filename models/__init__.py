"""Model families; importing this package registers every entry point with timm."""

from vitrail.models import biformer, davit, ela, gated_swinrmt, rmt

__all__ = ["biformer", "davit", "ela", "gated_swinrmt", "rmt"]
