"""Model families; importing this package registers every entry point with timm."""

from vitrail.models import biformer, davit, ela, gated_swinrmt, l2vit, nat, rmt, scatterformer, vsa, vsa_vitae

__all__ = ["biformer", "davit", "ela", "gated_swinrmt", "l2vit", "nat", "rmt", "scatterformer", "vsa", "vsa_vitae"]
