"""What training on many GPUs asks of every family: gradients for all parameters, and exact recomputation."""

from __future__ import annotations

import pytest
import timm
import torch
from _families import SMALLEST, build
from torch import Tensor

from vitrail.models.mm.parallel import find_blocks


def _gradients(name: str, checkpointing: bool) -> dict[str, Tensor | None]:
    model = build(name, checkpointing)
    torch.manual_seed(1)
    logits = model(torch.randn(2, 3, 64, 64))
    (logits * torch.randn_like(logits)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SMALLEST)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """Else replicas would wait for it, or its part of the optimiser would be missing."""
    plain = _gradients(name, checkpointing=False)
    assert [key for key, gradient in plain.items() if gradient is None] == []
    recomputed = _gradients(name, checkpointing=True)
    for key, gradient in plain.items():
        assert recomputed[key] is not None, key
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", SMALLEST)
def test_blocks_hold_most_of_a_model(name: str) -> None:
    """What `--sharded` takes apart; the rest stays whole for the length of a step."""
    model = timm.create_model(name, **SMALLEST[name])
    blocks = find_blocks(model)
    inside = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert len(inside) == len(set(inside)), "blocks overlap"
    assert len(blocks) >= 4
    heads = ("head", "classifier", "fc", "conv_head")
    head = sum(parameter.numel() for key, parameter in model.named_parameters() if key.startswith(heads))
    total = sum(parameter.numel() for parameter in model.parameters()) - head
    assert sum(p.numel() for b in blocks for p in b.parameters()) > 0.5 * total
