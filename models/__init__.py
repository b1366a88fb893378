"""Model families; importing this package registers every entry point with timm."""

from vitrail.models import davit

__all__ = ["davit"]
