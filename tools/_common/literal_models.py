"""Our models in the forms that they are compared to: operators by their definition, and steps of papers' authors."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from vitrail.kernels._common.dispatch import settings
from vitrail.layers.routing import RoutingAttention
from vitrail.tools._common.kernel_cases.routing_layer import PARAMETERS, authors_layer


def compute_by_definition(model: nn.Module, as_authors: bool = False) -> None:
    """Makes a model's forward pass compute every operator eagerly; its backward pass follows from that.

    Args:
        model: Changed in place.
        as_authors: BiFormer's routed attention in the steps of its authors, who gather keys and values.
    """
    before: list[str] = []

    def enter(*_: Any) -> None:
        before.append(settings.default_backend)
        settings.default_backend = "eager"

    def leave(*_: Any) -> None:
        settings.default_backend = before.pop()

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    for module in model.modules() if as_authors else ():
        if isinstance(module, RoutingAttention):
            module.forward = functools.partial(_authors_forward, module)


def _authors_forward(layer: RoutingAttention, x: Tensor) -> Tensor:
    steps = authors_layer(layer.num_heads, layer.head_dim, layer.n_regions[0], layer.topk)
    return steps(x, *(layer.get_parameter(name) for name in PARAMETERS))
