"""ELA networks against the author's outputs and timm's plain networks; checkpoints; what the classes add to timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from _counts import parameters_and_gmacs
from _golden import GoldenCase, load_case
from _translations import assert_compiles_exports_and_scripts
from timm.models import load_state_dict
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import vitrail
from vitrail.layers.strip import EfficientLocalAttention
from vitrail.models import ela
from vitrail.models._checkpoint import UntrainedPartWarning
from vitrail.models.ela import ElaMobileNetV2, ElaResNet, checkpoint_filter_fn

# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 3.0
SMALL: dict[str, dict[str, Any]] = {
    "resnet18_ela_t": {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 96), "num_classes": 10},
    "resnet50_ela_l": {"layers": (1, 1, 2, 1), "channels": (16, 32, 48, 64), "num_classes": 10},
    "mobilenetv2_ela_b": {"channel_multiplier": 0.35, "num_classes": 10},
}
PLAIN = {"resnet18_ela_t": "resnet18", "resnet50_ela_l": "resnet50", "mobilenetv2_ela_b": "mobilenetv2_035"}


def small(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **{**SMALL[name], **kwargs}).eval()


def plain(name: str, **kwargs: Any) -> nn.Module:
    """timm's network without attention, of the same size."""
    arguments = {key: value for key, value in SMALL[name].items() if key != "channel_multiplier"}
    return timm.create_model(PLAIN[name], **{**arguments, **kwargs}).eval()


def randomise(model: nn.Module) -> None:
    """Gives norms (also those that start at zero) and statistics values of their own, which a mistake would mix up."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def attention_keys(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if ".se." in key}


def run_golden(case: GoldenCase, dtype: torch.dtype) -> dict[str, Tensor]:
    model = ElaMobileNetV2(form="l", dtype=dtype).eval()
    weights = {key: value.to(dtype) for key, value in case.weights.items()}
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    with torch.no_grad():
        final, maps = model.forward_intermediates(case.image.to(dtype), indices=[1, 2, 3, 4])
        return {"logits": model.forward_head(final), **{f"stage{i}": x for i, x in enumerate(maps)}}


def test_golden(golden_dir: Path) -> None:
    case = load_case(golden_dir, "mobilenetv2_ela_l_224")
    errors = case.relative_errors(run_golden(case, torch.float64))
    assert len(errors) == 5
    assert max(errors.values()) < 1e-8, errors
    for name, error in case.relative_errors(run_golden(case, torch.float32)).items():
        assert error * case.scale(name) < FLOAT32_FACTOR * case.info["float32_max_abs_diff"][name], name


RESNETS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160}
ATTENTION = {
    "resnet18": (13_440, 17_280, 80_640, 111_360),
    "resnet34": (26_432, 33_984, 158_592, 219_008),
    "resnet50": (26_432, 33_984, 158_592, 219_008),
    "resnet101": (56_896, 73_152, 341_376, 471_424),
}
SIZES = {
    f"{backbone}_ela_{form}": (parameters, attention)
    for backbone, parameters in RESNETS.items()
    for form, attention in zip("tbsl", ATTENTION[backbone], strict=True)
} | {
    "mobilenetv2_ela_b": (3_504_872, 63_936),
    "mobilenetv2_ela_s": (3_504_872, 298_368),
    "mobilenetv2_ela_l": (3_504_872, 412_032),
}


def test_the_variants_are_those_of_the_paper() -> None:
    assert vitrail.list_models("*_ela_*") == sorted(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name: str) -> None:
    model = timm.create_model(name, device="meta")
    counts = {key: parameter.numel() for key, parameter in model.named_parameters()}
    attention = sum(counts[key] for key in attention_keys(model))
    assert (sum(counts.values()) - attention, attention) == SIZES[name]


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("resnet18_ela_t", 1.8144),
        ("resnet50_ela_l", 4.0956),
        ("mobilenetv2_ela_b", 0.3021),
        ("mobilenetv2_ela_l", 0.3112),
    ],
)
def test_cost(name: str, gmacs: float) -> None:
    assert parameters_and_gmacs(name, 224)[1] == pytest.approx(gmacs, abs=5e-5)


def attach(block: nn.Module, attention: EfficientLocalAttention) -> None:
    """Puts attention into a block of timm's plain network by a hook on the layer whose output the author passes on."""
    place = {BasicBlock: "bn2", Bottleneck: "act2", InvertedResidual: "bn2"}[type(block)]
    block.get_submodule(place).register_forward_hook(lambda _module, _inputs, x: attention(x.clone()))


@pytest.mark.parametrize("size", [(32, 32), (75, 101)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_equals_timms_network_with_attention_hooked_in(name: str, size: tuple[int, int]) -> None:
    ours, theirs = small(name, dtype=torch.float64), plain(name, dtype=torch.float64)
    randomise(ours)
    keys = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not keys.missing_keys
    assert set(keys.unexpected_keys) == attention_keys(ours)
    layers = dict(ours.named_modules())
    found = 0
    for path, block in theirs.named_modules():
        attention = layers.get(f"{path}.se")
        if isinstance(attention, EfficientLocalAttention):
            attach(block, attention)
            found += 1
    assert found == sum(isinstance(module, EfficientLocalAttention) for module in layers.values()) > 3
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    got.square().sum().backward()
    want.square().sum().backward()
    other = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if key in other:
            torch.testing.assert_close(parameter.grad, other[key].grad, rtol=1e-8, atol=1e-8, msg=key)


def test_the_identity_around_the_attention_can_be_chosen() -> None:
    for name, skip in (("resnet18_ela_t", True), ("resnet50_ela_l", True), ("mobilenetv2_ela_b", False)):
        for given, wanted in (({}, skip), ({"skip": not skip}, not skip)):
            layers = [m for m in small(name, **given).modules() if isinstance(m, EfficientLocalAttention)]
            assert {layer.skip for layer in layers} == {wanted}
            assert {layer.form for layer in layers} == {name[-1]}


@pytest.mark.parametrize("name", SMALL)
def test_timms_weights_load_and_the_attention_stays(name: str) -> None:
    theirs = plain(name)
    randomise(theirs)
    cfg = {**timm.get_pretrained_cfg(PLAIN[name]).to_dict(), "state_dict": theirs.state_dict(), "num_classes": 10}
    torch.manual_seed(1)
    with pytest.warns(UntrainedPartWarning, match="no efficient local attention"):
        ours = small(name, pretrained=True, pretrained_cfg=cfg)
    torch.manual_seed(1)
    fresh = small(name).state_dict()
    loaded = ours.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(loaded[key], value), key
    for key in attention_keys(ours):
        assert torch.equal(loaded[key], fresh[key]), key


def test_every_variant_names_its_starting_point() -> None:
    for name in SIZES:
        backbone = name.split("_")[0]
        start = "ra_in1k" if backbone == "mobilenetv2" else "a1_in1k"
        wanted = timm.get_pretrained_cfg(f"{'mobilenetv2_100' if backbone == 'mobilenetv2' else backbone}.{start}")
        cfg = timm.get_pretrained_cfg(f"{name}.start_{start}")
        assert cfg.hf_hub_id == f"timm/{wanted.architecture}.{start}"
        own = ("architecture", "paper_ids", "origin_url", "min_input_size", "url", "tag")
        differ = {key for key, value in wanted.to_dict().items() if cfg.to_dict().get(key) != value}
        assert differ <= set(own), name
        assert not timm.get_pretrained_cfg(name).has_weights
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        small("resnet18_ela_t", pretrained=True)


@pytest.mark.parametrize("name", SMALL)
def test_some_attention_parameters_are_an_error(name: str) -> None:
    model = small(name)
    weights = model.state_dict()
    first, *_ = sorted(attention_keys(model))
    without_one = {key: value for key, value in weights.items() if key != first}
    with pytest.raises(ValueError, match=rf"of {len(attention_keys(model))} parameters.*{first}"):
        checkpoint_filter_fn(without_one, model)
    only_one = {key: value for key, value in weights.items() if key == first or ".se." not in key}
    with pytest.raises(ValueError, match="has 1 of"):
        checkpoint_filter_fn(only_one, model)


@pytest.mark.parametrize("name", SMALL)
def test_own_checkpoints_pass_unchanged(name: str) -> None:
    model = small(name)
    weights = dict(reversed(model.state_dict().items()))
    headless = {key: value for key, value in weights.items() if not key.startswith(("fc.", "classifier."))}
    for checkpoint in (weights, headless, {"state_dict": weights}, {"model": weights}):
        filtered = checkpoint_filter_fn(checkpoint, model)
        assert filtered == checkpoint.get("state_dict", checkpoint.get("model", checkpoint))


def test_other_channel_attention_does_not_pass_for_this_one() -> None:
    model = timm.create_model("resnet18_ela_t")
    squeezed = timm.create_model("seresnet18").state_dict()
    with pytest.warns(UntrainedPartWarning), pytest.raises(RuntimeError, match=r"layer1\.0\.se\.fc1"):
        model.load_state_dict(checkpoint_filter_fn(squeezed, model))


def test_checkpoints_of_the_authors_resnet_load(tmp_path: Path) -> None:
    for name, official in (("resnet18_ela_t", "feat0"), ("resnet50_ela_l", "feat1")):
        source, model = small(name), small(name)
        official_weights = {f"module.{k.replace('.se.', f'.{official}.')}": v for k, v in source.state_dict().items()}
        torch.save({"state_dict": official_weights, "epoch": 1}, tmp_path / "checkpoint.pth")
        weights = load_state_dict(tmp_path / "checkpoint.pth")
        model.load_state_dict(checkpoint_filter_fn(weights, model))
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("name", SMALL)
def test_feature_pyramid_at_any_size(name: str) -> None:
    model = small(name, features_only=True)
    maps = model(torch.randn(1, 3, 70, 100))
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    for x, channels, stride in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert x.shape == (1, channels, -(-70 // stride), -(-100 // stride))


@pytest.mark.parametrize("name", SMALL)
def test_compiles_and_exports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stages of MobileNetV2 have all kinds of its blocks."""
    monkeypatch.setattr(ela, "_MOBILENET_STAGES", ela._MOBILENET_STAGES[:2])
    model = small(name)
    x = torch.randn(2, 3, 50, 70)
    assert_compiles_exports_and_scripts(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_trains_with_autocast_checkpointing_and_drop_path(name: str, dtype: torch.dtype) -> None:
    model = small(name, drop_path_rate=0.2).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(torch.randn(4, 3, 70, 80))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_attention_decays_with_its_block(name: str) -> None:
    model = small(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    for key in attention_keys(model):
        block = key.partition(".se.")[0]
        assert scale[id(parameters[key])] == scale[id(parameters[f"{block}.bn2.weight"])]
    assert len(set(scale.values())) > 4


def test_mobilenet_starts_as_the_authors() -> None:
    model = ElaMobileNetV2()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("name", SMALL)
def test_initial_values_can_be_drawn_anew(name: str) -> None:
    model = small(name, device="meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    for key, value in model.state_dict().items():
        assert value.isfinite().all() if value.is_floating_point() else value == 0, key
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_resnets_start_as_their_shortcuts_unless_told_otherwise() -> None:
    for name in ("resnet18_ela_t", "resnet50_ela_l"):
        last = "bn2" if name.startswith("resnet18") else "bn3"
        assert not small(name).layer1[0].get_submodule(last).weight.any()
        assert small(name, zero_init_last=False).layer1[0].get_submodule(last).weight.all()


def test_widths_that_the_groups_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="dim is 144; form 't' takes multiples of 32"):
        ElaMobileNetV2(form="t", device="meta")
    with pytest.raises(ValueError, match="dim is 40; form 'l' takes multiples of 16"):
        ElaResNet(channels=(40, 80, 160, 320), device="meta")
    with pytest.raises(ValueError, match="form is 'm'"):
        ElaResNet(form="m", device="meta")


@pytest.mark.parametrize("name", SMALL)
def test_unknown_arguments_raise(name: str) -> None:
    with pytest.raises(TypeError, match="window_size"):
        small(name, window_size=7, device="meta")


def test_timm_keeps_its_own_models() -> None:
    for name in ("resnet50", "mobilenetv2_100"):
        assert timm.models.model_entrypoint(name).__module__.startswith("timm.")
    assert not any(isinstance(m, EfficientLocalAttention) for m in timm.create_model("resnet18").modules())
