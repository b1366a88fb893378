"""`explain` names every layer with an operator, what ran there, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitrail.layers.channel import ChannelAttention
from vitrail.layers.explain import explain
from vitrail.layers.window import WindowAttention


def make_model() -> nn.Module:
    inner = nn.Sequential(nn.LayerNorm(16), WindowAttention(16, 2, 3))
    return nn.Sequential(inner, nn.GELU(), ChannelAttention(16, 2))


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_lists_operator_calls_in_the_order_of_execution() -> None:
    explanation = explain(make_model(), torch.randn(1, 5, 7, 16))
    assert [(name, choice.op) for name, choice in explanation.rows] == [
        ("0.1", "window_attention"),
        ("2", "channel_attention"),
    ]
    for _, choice in explanation.rows:
        assert choice.backend == "eager"
        assert "triton" in choice.reason.lower()
        assert choice.shape == (1, 5, 7, 2, 8)


def test_table_holds_every_row() -> None:
    header, first, second = str(explain(make_model(), torch.randn(1, 5, 7, 16))).splitlines()
    assert header.split() == ["layer", "operator", "backend", "reason", "input"]
    assert first.startswith("0.1 ")
    assert "channel_attention" in second
    assert second.endswith("1x5x7x2x8")


def test_model_is_left_as_it_was() -> None:
    model = make_model().train()
    explain(model, torch.randn(1, 5, 7, 16))
    assert model.training
    assert n_hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())


def test_hooks_go_when_the_model_fails() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("stop")

    model = nn.Sequential(make_model(), Failing())
    with pytest.raises(RuntimeError, match="stop"):
        explain(model, torch.randn(1, 5, 7, 16))
    assert n_hooks(model) == 0


def test_call_without_a_layer_belongs_to_the_module_that_made_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = ChannelAttention(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.attn(x))

    assert [name for name, _ in explain(Twice(), torch.randn(1, 2, 3, 16)).rows] == ["attn", "attn"]
    assert [name for name, _ in explain(ChannelAttention(16, 2), torch.randn(1, 2, 3, 16)).rows] == ["(model)"]
