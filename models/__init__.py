"""Model families; importing this package registers every entry point with timm."""

from vitrail.models import biformer, davit, ela, gated_swinrmt, rmt, vsa, vsa_vitae

__all__ = ["biformer", "davit", "ela", "gated_swinrmt", "rmt", "vsa", "vsa_vitae"]
