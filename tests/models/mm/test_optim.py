"""Optimizers follow what the model declares; mixed precision runs where it can."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from vitrail.models.mm.optim import AutocastOptimWrapper, TimmOptimWrapperConstructor


def _classifier(name: str = "test_vit") -> SimpleNamespace:
    return SimpleNamespace(backbone=timm.create_model(name, num_classes=3, img_size=32))


def _groups_by_name(classifier: Any, **optimizer: Any) -> dict[str, dict[str, Any]]:
    built = TimmOptimWrapperConstructor({"optimizer": {"opt": "adamw", **optimizer}}).build_optimizer(classifier)
    owner = {id(parameter): group for group in built.param_groups for parameter in group["params"]}
    return {name: owner[id(parameter)] for name, parameter in classifier.backbone.named_parameters()}


def test_weight_decay_spares_norms_biases_and_declared_names() -> None:
    groups = _groups_by_name(_classifier(), lr=1e-3, weight_decay=0.05)
    for name, group in groups.items():
        spared = name.endswith("bias") or "norm" in name or name in ("pos_embed", "cls_token", "reg_token")
        assert group["weight_decay"] == (0.0 if spared else 0.05), name


def test_layer_decay_scales_each_groups_own_rate() -> None:
    groups = _groups_by_name(_classifier(), lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    assert groups["head.weight"]["lr"] == pytest.approx(1e-3)
    rates = [groups[f"blocks.{i}.attn.qkv.weight"]["lr"] for i in range(len(_classifier().backbone.blocks))]
    assert all(later == pytest.approx(2 * earlier) for earlier, later in pairwise(rates))
    assert groups["patch_embed.proj.weight"]["lr"] < rates[0]


def test_unknown_optimizer_argument_is_named() -> None:
    with pytest.raises(ValueError, match="wrong"):
        _groups_by_name(_classifier(), lr=1e-3, wrong=1)


@pytest.mark.parametrize(("precision", "device"), [("fp16", "cpu"), ("fp8", "cuda")])
def test_precision_that_cannot_run_is_refused(precision: str, device: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=precision):
        AutocastOptimWrapper(precision, device, optimizer=optimizer)


def test_bf16_autocast_on_the_cpu_and_state() -> None:
    model = nn.Linear(4, 2)
    wrapper = AutocastOptimWrapper("bf16", "cpu", optimizer=torch.optim.Adam(model.parameters(), lr=0.1))
    with wrapper.optim_context(model):
        output = model(torch.ones(3, 4))
    assert output.dtype == torch.bfloat16
    before = model.weight.detach().clone()
    wrapper.update_params(output.float().sum())
    assert not torch.equal(model.weight, before)
    other = AutocastOptimWrapper("bf16", "cpu", optimizer=torch.optim.Adam(model.parameters(), lr=0.3))
    other.load_state_dict(wrapper.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.1
    assert len(other.optimizer.state) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_on_the_gpu(precision: str) -> None:
    model = nn.Linear(8, 1).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = AutocastOptimWrapper(precision, "cuda", optimizer=optimizer, clip_grad={"max_norm": 1.0})
    losses = []
    for _ in range(30):
        with wrapper.optim_context(model):
            loss = (model(torch.ones(4, 8, device="cuda")).float() - 3).square().mean()
        wrapper.update_params(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
