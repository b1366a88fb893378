"""Optimizers follow what the model declares; mixed precision runs where it can."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from vitrail.models.mm.backbone import VitrailBackbone
from vitrail.models.mm.optim import AutocastOptimWrapper, LayerDecayConstructor, TimmOptimWrapperConstructor


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


class _Segmenter(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = VitrailBackbone(**{"name": "biformer_n", **kwargs})
        self.decode_head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


def _decayed(model: nn.Module, **paramwise: Any) -> dict[str, dict[str, Any]]:
    config = {"type": "OptimWrapper", "constructor": "LayerDecayConstructor", "paramwise_cfg": paramwise}
    optimizer = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}
    built = build_optim_wrapper(model, {**config, "optimizer": optimizer, "clip_grad": {"max_norm": 1.0}})
    assert built.clip_grad_kwargs == {"max_norm": 1.0}
    assert built.optimizer.param_groups[0]["lr"] == 1e-3
    owned = [id(parameter) for group in built.optimizer.param_groups for parameter in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    owner = {id(parameter): group for group in built.optimizer.param_groups for parameter in group["params"]}
    return {name: owner[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_layers_of_a_backbone_decay_and_heads_do_not() -> None:
    model = _Segmenter()
    groups = _decayed(model, layer_decay=0.5)
    blocks = [f"{i}.blocks.{j}" for i, s in enumerate(model.backbone.model.stages) for j in range(len(s.blocks))]
    rates = [groups[f"backbone.model.stages.{block}.attn.qkv.weight"]["lr"] for block in blocks]
    assert rates[-1] == pytest.approx(0.5e-3)
    assert all(later > earlier for earlier, later in pairwise(rates))
    ladder = sorted({group["lr"] for group in groups.values()})
    assert all(later == pytest.approx(2 * earlier) for earlier, later in pairwise(ladder))
    assert ladder[0] == next(group["lr"] for name, group in groups.items() if name.startswith("backbone.model.stem"))
    assert {group["lr"] for name, group in groups.items() if not name.startswith("backbone.model.")} == {1e-3}
    parameters = dict(model.named_parameters())
    assert all(group["weight_decay"] == 0.05 * (parameters[name].ndim > 1) for name, group in groups.items())


def test_coarse_decay_has_a_step_for_each_stage() -> None:
    groups = _decayed(_Segmenter(), layer_decay=0.5, coarse=True)
    for i in range(4):
        rates = {group["lr"] for name, group in groups.items() if name.startswith(f"backbone.model.stages.{i}.")}
        assert rates == {0.5 ** (4 - i) * 1e-3}


def test_frozen_parameters_are_left_out_and_declared_names_not_decayed() -> None:
    model = _Segmenter(frozen_stages=1)
    groups = _decayed(model, layer_decay=0.9)
    assert not any(name.startswith("backbone.model.stem") for name in groups)
    arguments = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
    groups = _decayed(_Segmenter(name="swin_tiny_patch4_window7_224", **arguments), layer_decay=0.9)
    tables = {group["weight_decay"] for name, group in groups.items() if name.endswith("bias_table")}
    assert tables == {0.0}


@pytest.mark.parametrize("paramwise", [{}, {"layer_decay": 0}, {"layer_decay": 1.1}, {"layer_decay": 0.9, "depth": 3}])
def test_bad_layer_decay_is_named(paramwise: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layer_decay"):
        LayerDecayConstructor({}, paramwise)


def test_layer_decay_needs_a_backbone_that_declares_layers() -> None:
    constructor = LayerDecayConstructor({"optimizer": {"type": "SGD", "lr": 0.1}}, {"layer_decay": 0.9})
    with pytest.raises(ValueError, match="VitrailBackbone; the model's is Linear"):
        constructor(SimpleNamespace(backbone=nn.Linear(2, 2)))


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
