"""Model families; importing this package registers every entry point with timm."""

from vitrail.models import biformer, davit

__all__ = ["biformer", "davit"]
