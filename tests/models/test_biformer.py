"""BiFormer against the official implementation, the published sizes and its own layouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from _golden import load_case
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitrail  # noqa: F401 -- registers the models
from vitrail.models.biformer import checkpoint_filter_fn

_CLASSIFIERS = {
    "biformer_tiny": "biformer_t",
    "biformer_small": "biformer_s",
    "biformer_base": "biformer_b",
    "biformer_tiny_autopad_200x264": "biformer_t",
}


@pytest.mark.parametrize("name", _CLASSIFIERS)
def test_golden_classifier(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    model = timm.create_model(_CLASSIFIERS[name], dtype=torch.float64).eval()
    _load(model, checkpoint_filter_fn(case.weights, model))
    with torch.no_grad():
        last, maps = model.forward_intermediates(case.image)
        outputs = {f"stage{i}": x for i, x in enumerate(maps)} | {"logits": model.forward_head(last)}
        single = model.float()(case.image.float())
    errors = case.relative_errors({key: x for key, x in outputs.items() if key in case.expected})
    assert "logits" in errors
    assert max(errors.values()) < 1e-8, errors
    # Rounding alone: the official float32 run is off by up to 1.2e-6 of the largest logit.
    assert case.relative_errors({"logits": single})["logits"] < 5e-6


def _load(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Strict but for the integer counters of batch norm, which the golden files leave out."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing), missing


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("biformer_t", 13_142_760), ("biformer_s", 25_536_232), ("biformer_b", 56_804_968), ("biformer_stl", 28_372_552)],
)
def test_parameter_count(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == parameters


def test_multiply_adds() -> None:
    model = timm.create_model("biformer_t").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(2.216, abs=5e-4)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40)])
def test_any_size_trains(size: tuple[int, int]) -> None:
    model = timm.create_model("biformer_n", num_classes=10)
    loss = model(torch.randn(2, 3, *size)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_own_checkpoint_passes_unchanged() -> None:
    model = timm.create_model("biformer_n")
    weights = model.state_dict()
    assert list(checkpoint_filter_fn(weights, model)) == list(weights)


def test_nchw_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="qkv_linear"):
        checkpoint_filter_fn({"stages.0.blocks.0.attn.qkv_linear.weight": torch.zeros(1)}, nn.Identity())


def test_too_many_routes_are_refused() -> None:
    with pytest.raises(ValueError, match="topk is 17"):
        timm.create_model("biformer_n", topk=(17, 2, 4, -2))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 32"):
        timm.create_model("biformer_n", dims=(48, 64, 128, 256))


def test_image_too_small_for_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="31 x 40 pixels"):
        timm.create_model("biformer_stl", dims=(32, 64, 96, 128), depths=(1, 1, 1, 1)).eval()(torch.randn(1, 3, 31, 40))


def test_official_swin_layout_is_renamed() -> None:
    model = timm.create_model("biformer_stl", device="meta")
    backwards = (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"(stages\.[012]\..*attn)\.qkv\.", r"\1.qkv.qkv."),
        (r"(stages\.[012]\..*attn)\.proj\.", r"\1.wo."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
        (r"^head\.fc\.", "head."),
    )
    official = {}
    for key, value in model.state_dict().items():
        for pattern, replacement in backwards:
            key = re.sub(pattern, replacement, key)
        official[key] = value
    assert {"downsample_layers.1.1.weight", "stages.0.blocks.0.attn.qkv.qkv.weight"} <= official.keys()
    model.load_state_dict(checkpoint_filter_fn({"model": official}, model), assign=True)
