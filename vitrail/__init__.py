"""vitrail: vision backbones whose attention is local, routed or linear, on fused GPU operators.

Importing the package registers its models with timm: `timm.create_model("biformer_s")` works afterwards.
"""

from timm import create_model

from vitrail import models
from vitrail._version import __version__
from vitrail.layers.explain import explain
from vitrail.models._registry import list_models
from vitrail.models.accelerate import accelerate

__all__ = ["__version__", "accelerate", "create_model", "explain", "list_models", "models"]
