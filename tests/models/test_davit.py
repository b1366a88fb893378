"""DaViT against the official outputs and timm's port; checkpoints; what the class adds to timm's contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from _counts import parameters_and_gmacs
from _golden import GoldenCase, load_case
from _translations import assert_compiles_exports_and_scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.layers.window import WindowAttention
from vitrail.models.davit import DaViT, checkpoint_filter_fn

SMALL = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
DIMS = (16, 32, 48, 64)
# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 3.0


def small_davit(**kwargs: object) -> DaViT:
    return DaViT(**{"dims": DIMS, "num_classes": 10, **SMALL, **kwargs}).eval()


def small_pair(**kwargs: object) -> tuple[nn.Module, DaViT]:
    """timm's model and ours with the same weights, float64."""
    theirs = timm.create_model("davit_tiny", embed_dims=DIMS, num_classes=10, **SMALL, **kwargs).double().eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    ours = small_davit(dtype=torch.float64, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run_golden(case: GoldenCase, dtype: torch.dtype) -> dict[str, Tensor]:
    given = case.info["constructor"]
    model = DaViT(
        depths=given["depths"],
        dims=given["embed_dims"],
        num_heads=given["num_heads"],
        num_classes=1000 if "logits" in case.expected else 0,
        dtype=dtype,
    ).eval()
    weights = {k: v.to(dtype) for k, v in case.weights.items()}
    norms = {k: weights.pop(k) for k in list(weights) if k[:4] == "norm" and k[4].isdigit()}
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict="logits" in case.expected)
    with torch.no_grad():
        final, maps = model.forward_intermediates(case.image.to(dtype))
        outputs = {f"stage{i}": x for i, x in enumerate(maps)}
        if "logits" in case.expected:
            return {"logits": model.forward_head(final), **outputs}
    return {
        name: _output_norm(x, norms[f"norm{name[-1]}.weight"], norms[f"norm{name[-1]}.bias"])
        for name, x in outputs.items()
    }


def _output_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["davit_tiny", "davit_small", "davit_tiny_det_200x264"])
def test_golden(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    errors = case.relative_errors(run_golden(case, torch.float64))
    assert max(errors.values()) < 1e-8, errors
    allowed = case.info["float32_max_diff_relative_to_output_max"]
    for output, error in case.relative_errors(run_golden(case, torch.float32)).items():
        assert error < FLOAT32_FACTOR * allowed[output], output


@settings(max_examples=8)
@given(height=st.integers(32, 130), width=st.integers(32, 130), window=st.sampled_from([5, 7]))
def test_equals_timm_at_any_size(height: int, width: int, window: int) -> None:
    theirs, ours = small_pair(window_size=window)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
        for got, want in zip(
            ours.forward_intermediates(x, intermediates_only=True),
            theirs.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradients_equal_timm() -> None:
    theirs, ours = small_pair()
    x = torch.randn(2, 3, 75, 101, dtype=torch.float64)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = other[name].grad.abs().max()
        torch.testing.assert_close(parameter.grad / scale, other[name].grad / scale, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("name", "size", "parameters", "gmacs"),
    [
        ("davit_t", 224, 28_360_168, 4.522),
        ("davit_s", 224, 49_745_896, 8.773),
        ("davit_b", 224, 87_954_408, 15.474),
        ("davit_l", 384, 196_811_752, 102.805),
    ],
)
def test_size_and_cost(name: str, size: int, parameters: int, gmacs: float) -> None:
    assert parameters_and_gmacs(name, size) == (parameters, pytest.approx(gmacs, abs=5e-4))
    assert timm.models.get_pretrained_cfg(name).input_size == (3, size, size)


def test_cpu_counts_the_operations_of_every_device() -> None:
    counts = []
    for device in ("cpu", "meta"):
        model = small_davit(device=device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, 3, 64, 96, device=device))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def official_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames our parameters to the official ones, in reversed order."""
    replacements = [
        ("stem.conv.", "patch_embeds.0.proj."),
        ("stem.norm.", "patch_embeds.0.norm."),
        ("head.fc.", "head."),
        ("head.norm.", "norms."),
    ]
    for i in range(4):
        replacements += [
            (f"stages.{i}.downsample.conv.", f"patch_embeds.{i}.proj."),
            (f"stages.{i}.downsample.norm.", f"patch_embeds.{i}.norm."),
            (f"stages.{i}.blocks.", f"main_blocks.{i}."),
        ]
    replacements += [("cpe1.", "cpe.0."), ("cpe2.", "cpe.1.")]
    renamed = {}
    for key, value in reversed(state_dict.items()):
        for ours, official in replacements:
            key = key.replace(ours, official)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_official_checkpoints_load(wrapper: str | None) -> None:
    source, target = small_davit(), small_davit()
    official = official_layout(source.state_dict())
    assert not set(official) & set(source.state_dict())
    target.load_state_dict(checkpoint_filter_fn({wrapper: official} if wrapper else official, target))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize("with_head", [True, False], ids=["head", "headless"])
def test_own_checkpoints_pass_unchanged_in_any_order(with_head: bool) -> None:
    model = small_davit()
    own = {k: v for k, v in reversed(model.state_dict().items()) if with_head or not k.startswith("head.")}
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[key] is own[key] for key in own)


def test_wrong_keys_are_named() -> None:
    model = small_davit()
    official = official_layout(model.state_dict())
    missing = {k: v for k, v in official.items() if k != "main_blocks.2.1.0.attn.qkv.weight"}
    with pytest.raises(RuntimeError, match=r"Missing.*stages\.2\.blocks\.1\.0\.attn\.qkv\.weight"):
        model.load_state_dict(checkpoint_filter_fn(missing, model))
    with pytest.raises(RuntimeError, match=r"Unexpected.*relative_position_index"):
        model.load_state_dict(checkpoint_filter_fn({**official, "relative_position_index": torch.ones(1)}, model))
    misshaped = {**official, "norms.weight": torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.norm\.weight"):
        model.load_state_dict(checkpoint_filter_fn(misshaped, model))


def test_pretrained_weights_are_adapted_to_channels_and_classes(tmp_path: Path) -> None:
    source = timm.create_model("davit_t", dims=DIMS, **SMALL)
    torch.save(official_layout(source.state_dict()), tmp_path / "official.pth")
    model = timm.create_model(
        "davit_t",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "official.pth")},
        in_chans=1,
        num_classes=7,
        dims=DIMS,
        **SMALL,
    )
    torch.testing.assert_close(model.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))
    assert torch.equal(model.stages[3].blocks[0][1].mlp.fc2.weight, source.stages[3].blocks[0][1].mlp.fc2.weight)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)


def test_timm_keeps_its_own_models() -> None:
    assert {"davit_tiny", "davit_t"} <= set(timm.list_models(module="davit"))
    assert timm.models.model_entrypoint("davit_tiny").__module__ == "timm.models.davit"
    assert timm.get_pretrained_cfg("davit_t.msft_in1k").hf_hub_id == "timm/davit_tiny.msft_in1k"
    assert isinstance(timm.create_model("davit_t", device="meta"), DaViT)


def test_initial_weights_follow_the_paper() -> None:
    model = DaViT(depths=(1, 1, 1, 1), num_classes=1000)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5, name
    emptied = DaViT(depths=(1, 1, 1, 1), device="meta").to_empty(device="cpu")
    for parameter in emptied.parameters():
        nn.init.constant_(parameter, float("nan"))
    emptied.init_weights()
    assert all(p.isfinite().all() for p in emptied.parameters())


def test_drop_path_grows_over_single_blocks() -> None:
    model = small_davit(drop_path_rate=0.9)
    blocks = [block for stage in model.stages for pair in stage.blocks for block in pair]
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    rates = [drop.drop_prob for block in blocks[1:] for drop in (block.drop_path1, block.drop_path2)]
    assert rates == pytest.approx([0.1 * i for i in range(1, 10) for _ in range(2)])


def test_window_can_be_changed() -> None:
    model = small_davit(dtype=torch.float64)
    wanted = small_davit(dtype=torch.float64, window_size=(3, 5))
    wanted.load_state_dict(model.state_dict())
    model.set_input_size(img_size=(64, 80), window_size=(3, 5))
    x = torch.randn(1, 3, 70, 90, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x), wanted(x))
    with pytest.raises(ValueError, match="window_size is 0"):
        model.set_input_size(window_size=0)
    assert {m.window_size for m in model.modules() if isinstance(m, WindowAttention)} == {(3, 5)}


def test_compiles_and_exports() -> None:
    """Two stages, which have all kinds of layers, on maps larger and smaller than a window."""
    model = small_davit(depths=(1, 1), dims=(16, 32), num_heads=(1, 2))
    x = torch.randn(2, 3, 37, 50)
    assert_compiles_exports_and_scripts(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_trains_with_autocast_checkpointing_and_drop_path(dtype: torch.dtype) -> None:
    model = small_davit(drop_path_rate=0.2).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(torch.randn(2, 3, 45, 60))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_maps_travel_channels_last() -> None:
    model = small_davit()
    maps = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1)}, r"depths \(1, 1\)"),
        ({"depths": (1, 1, 0, 1)}, r"depths is \(1, 1, 0, 1\)"),
        ({"num_heads": (5, 5, 5, 5)}, "dim is 96, num_heads 5"),
        ({"window_size": 0}, "window_size is 0"),
        ({"drop_path_rate": 1.5}, "drop_path_rate is 1.5"),
        ({"in_chans": 0}, "in_chans is 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DaViT(device="meta", **kwargs)


def test_unknown_arguments_raise() -> None:
    with pytest.raises(TypeError, match="patch_size"):
        timm.create_model("davit_t", patch_size=4, device="meta")
