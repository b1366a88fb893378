"""Gated-SwinRMT against the recorded reading of the paper's abstract, its sizes and its own layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from _counts import parameters_and_gmacs
from _golden import load_case
from _translations import assert_compiles_exports_and_scripts
from torch import Tensor, nn

from vitrail.layers.gated_retention import GatedRetention, SwatRetention
from vitrail.models.gated_swinrmt import GatedSwinRMT, GatedSwinRMTBlock, checkpoint_filter_fn

KINDS = {"swat": SwatRetention, "retention": GatedRetention}
SIZES = ("14", "14_shift", "11x17_shift", "5x9_shift")
SMALL = {"depths": (2, 1, 2, 1), "dims": (16, 32, 32, 64), "num_heads": (2, 2, 4, 4), "layer_scale": 0.5}
TWO_STAGES = {
    "depths": (2, 1),
    "dims": (16, 32),
    "num_heads": (2, 2),
    "heads_range": (4, 6),
    "decomposed": (True, True),
    "mlp_ratios": (4, 4),
}
# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 3.0


def small_model(**kwargs: object) -> GatedSwinRMT:
    return GatedSwinRMT(**{"num_classes": 10, **SMALL, **kwargs}).eval()


@torch.no_grad()
def run_block(block: GatedSwinRMTBlock, image: Tensor) -> dict[str, Tensor]:
    """The block's output and its attention's, NCHW float64."""
    x = image.permute(0, 2, 3, 1)
    after_pos = block.pos(x)
    outputs = {"out": block(x), "attn": block.attn(block.norm1(after_pos), after_pos)}
    return {name: y.permute(0, 3, 1, 2).double() for name, y in outputs.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_golden(golden_dir: Path, kind: str, size: str) -> None:
    case = load_case(golden_dir, f"gated_swinrmt_{kind}_block_{size}")
    given = case.info["constructor"]
    attn = KINDS[kind](
        given["dim"], given["num_heads"], given["window"], given["shift"], given["initial_value"], given["heads_range"]
    )
    block = GatedSwinRMTBlock(given["dim"], attn, given["mlp_ratio"]).double()
    assert sum(p.numel() for p in block.parameters()) == case.info["params"]
    block.load_state_dict(checkpoint_filter_fn(case.weights, block))
    double, single = run_block(block, case.image), run_block(block.float(), case.image.float())
    for name, want in case.expected.items():
        if name not in double:
            continue
        deviation = case.expected[f"{name}_std"]
        whole = double[name]
        assert (whole[:, ::2, ::2, ::2] - want).abs().max() < 1e-8 * deviation, name
        assert (whole.mean() - case.expected[f"{name}_mean"]).abs() < 1e-8 * deviation, name
        assert (whole.std(correction=0) - deviation).abs() < 1e-8 * deviation, name
        worst = (single[name][:, ::2, ::2, ::2] - want).abs().max()
        assert worst < FLOAT32_FACTOR * case.info["float32_max_abs_diff"], name


@pytest.mark.parametrize(
    ("dims", "depths", "mlp_ratios", "millions"),
    [
        ((96, 192, 384, 768), (2, 2, 22, 4), (4, 4, 4, 4), 78.87),
        ((128, 256, 512, 1024), (2, 2, 12, 2), (4, 4, 4, 4), 77.68),
        ((112, 224, 448, 896), (2, 2, 18, 2), (4, 4, 4, 4), 75.48),
        ((96, 192, 384, 768), (3, 4, 18, 4), (4, 4, 4, 4), 72.18),
        ((112, 224, 448, 640), (4, 8, 25, 8), (4, 4, 3, 3), 102.62),
        ((80, 160, 320, 512), (4, 8, 25, 8), (4, 4, 3, 3), 57.56),
    ],
)
@pytest.mark.parametrize("attention", KINDS)
def test_sizes_of_the_reading(
    attention: str, dims: tuple[int, ...], depths: tuple[int, ...], mlp_ratios: tuple[int, ...], millions: float
) -> None:
    model = GatedSwinRMT(
        attention=attention,
        dims=dims,
        depths=depths,
        mlp_ratios=mlp_ratios,
        num_heads=[dim // 16 for dim in dims],
        num_classes=100,
        device="meta",
    )
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "size", "parameters", "gmacs"),
    [
        ("gated_swinrmt_swat", 224, 79_561_560, 12.5945),
        ("gated_swinrmt_retention", 224, 79_559_704, 12.5945),
        ("gated_swinrmt_swat_n", 32, 1_658_170, 0.0302),
        ("gated_swinrmt_retention_n", 32, 1_657_946, 0.0302),
    ],
)
def test_size_and_cost(name: str, size: int, parameters: int, gmacs: float) -> None:
    assert parameters_and_gmacs(name, size) == (parameters, pytest.approx(gmacs, abs=5e-5))


def test_small_models_can_be_compared() -> None:
    counts = [
        sum(p.numel() for p in timm.create_model(name, device="meta", num_classes=10).parameters())
        for name in ("gated_swinrmt_swat_n", "gated_swinrmt_retention_n", "rmt_n")
    ]
    assert max(counts) < 1.03 * min(counts)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (70, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_size_trains(attention: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = small_model(attention=attention, window_size=4, drop_path_rate=0.2).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(torch.randn(2, 3, *size))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_second_block_is_shifted() -> None:
    model = GatedSwinRMT(depths=(1, 2, 3, 4), window_size=(7, 4), device="meta")
    shifts = [[block.attn.shift_size for block in stage.blocks] for stage in model.stages]
    assert shifts == [[(0, 0), (3, 2), (0, 0), (3, 2)][:depth] for depth in (1, 2, 3, 4)]


def test_arguments_reach_the_attention() -> None:
    options = {"gate_target": "output", "slope_base": "halving"}
    model = small_model(
        attention_options=options, heads_range=(1, 2, 3, 4), decomposed=(True, True, True, False), device="meta"
    )
    layers = [stage.blocks[0].attn for stage in model.stages]
    assert not any(layer.gates_value for layer in layers)
    assert all(layer.halving_slopes for layer in layers)
    assert [layer.heads_range for layer in layers] == [1, 2, 3, 4]
    assert [layer.decomposed for layer in layers] == [True, True, True, False]
    gated = small_model(attention="retention", attention_options={"gate_bias": 1.0})
    assert all(block.attn.gate.bias.eq(1).all() for stage in gated.stages for block in stage.blocks)


def test_head_of_rmt() -> None:
    model = small_model(projection=48)
    x = torch.randn(2, 3, 40, 40)
    assert model(x).shape == (2, 10)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 48)
    assert model.head_hidden_size == 48


def test_window_can_be_changed() -> None:
    model, wanted = small_model(), small_model(window_size=(3, 5))
    wanted.load_state_dict(model.state_dict())
    model.set_input_size(img_size=(64, 80), window_size=(3, 5))
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        assert torch.equal(model(x), wanted(x))
    with pytest.raises(ValueError, match="window_size is 0"):
        model.set_input_size(window_size=0)


@pytest.mark.parametrize("attention", KINDS)
def test_compiles_exports_and_scripts(attention: str) -> None:
    """Two stages, which have all kinds of layers, on maps larger and smaller than a window."""
    model, x = small_model(attention=attention, **TWO_STAGES), torch.randn(2, 3, 37, 50)
    assert_compiles_exports_and_scripts(model, x)


@pytest.mark.parametrize("attention", KINDS)
def test_plain_layout_loads(attention: str) -> None:
    source, target = small_model(attention=attention), small_model(attention=attention)
    gate = {"swat": "v_gate", "retention": "g_proj"}[attention]
    plain = {}
    for key, value in reversed(source.state_dict().items()):
        for pattern, replacement in (
            (r"attn\.gate\.", f"attn.{gate}."),
            (r"attn\.proj\.", "attn.out_proj."),
            (r"(pos|lce|dwconv)\.", r"\1.conv."),
            (r"ls([12])\.gamma", r"gamma_\1"),
        ):
            key = re.sub(pattern, replacement, key)
        parts = zip("qkv", value.chunk(3), strict=True) if ".qkv." in key else ()
        plain |= {key.replace("qkv", f"{name}_proj"): part for name, part in parts} or {key: value}
    target.load_state_dict(checkpoint_filter_fn({"model": plain}, target))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_own_checkpoints_pass_unchanged_in_any_order() -> None:
    model = small_model()
    own = dict(reversed(model.state_dict().items()))
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[key] is own[key] for key in own)


def test_initial_weights() -> None:
    model = small_model(attention="retention", layer_scale=1e-6)
    assert all(block.ls1.gamma.eq(1e-6).all() for stage in model.stages for block in stage.blocks)
    assert all(block.attn.gate.bias.eq(0).all() for stage in model.stages for block in stage.blocks)
    emptied = small_model(device="meta").to_empty(device="cpu")
    for parameter in emptied.parameters():
        nn.init.constant_(parameter, float("nan"))
    emptied.init_weights()
    assert all(p.isfinite().all() for p in emptied.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention": "softmax"}, "attention is 'softmax'; allowed: swat, retention"),
        ({"depths": (1, 1)}, r"depths \(1, 1\), dims"),
        ({"num_heads": (5, 8, 12, 24)}, "dim is 96, num_heads 5"),
        ({"window_size": 0}, "window_size is 0"),
        ({"stem_stride": 1}, "stem_stride is 1"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"attention_options": {"output_norm": "none"}}, "output_norm is 'none'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedSwinRMT(device="meta", **kwargs)


def test_unknown_options_raise() -> None:
    with pytest.raises(TypeError, match="gate_input"):
        small_model(attention="swat", attention_options={"gate_input": "block"}, device="meta")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gated_swinrmt_swat_n", "gated_swinrmt_retention_n"])
@pytest.mark.parametrize("size", [(224, 224), (800, 1333)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_finite(name: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    model = timm.create_model(name, device="cuda").train()
    with torch.autocast("cuda", dtype):
        out = model(torch.randn(2, 3, *size, device="cuda"))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
