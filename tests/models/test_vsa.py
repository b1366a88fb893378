"""VSA against the official outputs, its plain twins against timm's Swin; checkpoints; sizes, costs and modes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from _counts import parameters_and_gmacs
from _golden import GoldenCase, load_case
from _translations import assert_compiles_exports_and_scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import PatchMerging as TimmPatchMerging
from torch import Tensor, nn

from vitrail.layers.varied_window import VariedWindowAttention
from vitrail.layers.window import WindowAttention
from vitrail.models import _dense, vsa, vsa_vitae
from vitrail.models.vsa import PatchMerging, VSASwin
from vitrail.models.vsa_vitae import VSAViTAE, drop_path_rates

SWIN: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4), "num_classes": 10}
VITAE: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 16, 16, 32),
    "embed_dims": (4, 8, 8, 8),
    "num_heads": (1, 2, 2, 4),
    "reduction_heads": (1, 2, 2, 4),
    "groups": (1, 2, 4, 4),
    "reduction_groups": (1, 2, 4, 4),
    "num_classes": 10,
}
FAMILIES = [vsa, vsa_vitae]
DETECTION = {"padding": "center", "offset_norm": "floor_swapped"}


def small(family: Any, **kwargs: Any) -> VSASwin | VSAViTAE:
    """A small model whose windows vary."""
    model = VSASwin(**{**SWIN, **kwargs}) if family is vsa else VSAViTAE(**{**VITAE, **kwargs})
    for name, parameter in model.named_parameters():
        if ".transform." in name and parameter.device.type != "meta":
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def run_golden(case: GoldenCase, entry: str, dtype: torch.dtype, **kwargs: Any) -> dict[str, Tensor]:
    model = timm.create_model(entry, dtype=dtype, **kwargs).eval()
    family = vsa if entry.startswith("vsa_swin") else vsa_vitae
    weights = family.checkpoint_filter_fn({key: value.to(dtype) for key, value in case.weights.items()}, model)
    # Strict but for the integer counters of batch norm, which the golden files leave out.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        final, maps = model.forward_intermediates(case.image.to(dtype))
        outputs = {f"stage{i}": x for i, x in enumerate(maps)}
        return outputs | ({"logits": model.forward_head(final)} if "logits" in case.expected else {})


@pytest.mark.parametrize(
    ("name", "entry", "kwargs"),
    [
        ("vsa_swin_tiny", "vsa_swin_t", {}),
        ("vsa_swin_tiny_256x192", "vsa_swin_t", {}),
        ("vsa_vitaev2_s", "vsa_vitae_s", {}),
        ("vsa_vitaev2_s_det_256x320", "vsa_vitae_s", {**DETECTION, "num_classes": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_golden(golden_dir: Path, name: str, entry: str, kwargs: dict[str, Any]) -> None:
    case = load_case(golden_dir, name)
    errors = case.relative_errors(run_golden(case, entry, torch.float64, **kwargs))
    assert len(errors) == len(case.info["outputs"])
    assert max(errors.values()) < 1e-8, errors
    allowed = case.info["float32_max_diff_relative_to_output_max"]
    for output, error in case.relative_errors(run_golden(case, entry, torch.float32, **kwargs)).items():
        assert error <= allowed[output], output


def test_golden_as_dense_backbone(golden_dir: Path) -> None:
    case = load_case(golden_dir, "vsa_vitaev2_s_det_256x320")
    model = timm.create_model("vsa_vitae_s", **DETECTION)
    backbone = _dense.DenseBackbone(model, output_norm=False).eval()
    missing, unexpected = backbone.load_state_dict(_dense.checkpoint_filter_fn(case.weights, backbone), strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        maps = backbone(case.image.float())
    allowed = case.info["float32_max_diff_relative_to_output_max"]
    for output, error in case.relative_errors({f"stage{i}": x for i, x in enumerate(maps)}).items():
        assert error <= allowed[output], output


@pytest.mark.parametrize(
    ("name", "kwargs", "parameters", "gmacs"),
    [
        ("vsa_swin_t", {}, 28_779_274, 4.562),
        ("vsa_swin_s", {}, 50_549_338, 8.857),
        ("vsa_swin_b", {}, 89_243_776, 15.587),
        ("vsa_vitae_s", {}, 19_773_300, 5.72),
        ("vsa_vitae_s", {"wide_pcm": True, "reduction_heads": (2, 4, 8, 16)}, 20_342_442, 6.28),
        ("vsa_vitae_48m", {}, 51_089_119, 15.02),
        ("vsa_vitae_b", {}, 93_711_532, 27.11),
        ("vsa_vitae_b", {"window_size": 12}, 93_833_932, 28.70),
    ],
    ids=lambda value: str(value)[:30],
)
def test_size_and_cost(name: str, kwargs: dict[str, Any], parameters: int, gmacs: float) -> None:
    digits = len(f"{gmacs!r}".split(".")[1]) if gmacs != 28.70 else 2
    found_parameters, found_gmacs = parameters_and_gmacs(name, 224, **kwargs)
    assert (found_parameters, round(found_gmacs, digits)) == (parameters, gmacs)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_twins_have_the_size_and_cost_of_swin(size: str) -> None:
    ours, theirs = f"swin_{size[0]}", f"swin_{size}_patch4_window7_224"
    assert parameters_and_gmacs(ours, 224) == parameters_and_gmacs(theirs, 224)


def swin_pair(window: int, img_size: int) -> tuple[nn.Module, VSASwin]:
    """timm's model and our twin with the same weights, float64."""
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=img_size,
        window_size=window,
        embed_dim=8,
        depths=SWIN["depths"],
        num_heads=SWIN["num_heads"],
        num_classes=10,
    )
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = small(
        vsa, dims=(8, 16, 32, 64), window_size=window, attention="shifted", pos_conv=False, dtype=torch.float64
    )
    ours.load_state_dict(vsa.checkpoint_filter_fn(theirs.state_dict(), ours))
    return theirs, ours


@pytest.mark.parametrize(("window", "img_size"), [(3, 96), (2, 64), (7, 224)])
def test_twin_equals_timm(window: int, img_size: int) -> None:
    theirs, ours = swin_pair(window, img_size)
    x = torch.randn(1, 3, img_size, img_size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    for got, want in zip(
        ours.forward_intermediates(x, intermediates_only=True),
        theirs.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_twin_gradients_equal_timm() -> None:
    theirs, ours = swin_pair(2, 64)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = vsa.checkpoint_filter_fn({name: p.grad for name, p in theirs.named_parameters()}, ours)
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max()
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=0, atol=1e-9, msg=name)


def test_twins_shift_every_other_window_but_in_the_last_stage() -> None:
    model = timm.create_model("swin_t", device="meta")
    assert [[block.attn.shift_size for block in stage.blocks] for stage in model.stages] == [
        [(0, 0), (3, 3)],
        [(0, 0), (3, 3)],
        [(0, 0), (3, 3)] * 3,
        [(0, 0), (0, 0)],
    ]
    everywhere = timm.create_model("swin_t", device="meta", shift_stages=(True,) * 4)
    assert everywhere.stages[3].blocks[1].attn.shift_size == (3, 3)
    varied = timm.create_model("vsa_swin_t", device="meta")
    assert not any(isinstance(m, WindowAttention) for m in varied.modules())
    assert sum(isinstance(m, VariedWindowAttention) for m in varied.modules()) == 12


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 4)], ids=str)
def test_patch_merging_equals_timm(size: tuple[int, int]) -> None:
    theirs, ours = TimmPatchMerging(6, 10).double(), PatchMerging(6, 10, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    got = ours(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
@settings(max_examples=6)
@given(height=st.integers(32, 90), width=st.integers(32, 90))
def test_any_size(family: Any, height: int, width: int) -> None:
    model = small(family)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    for x, info in zip(maps, model.feature_info, strict=True):
        expected = (1, info["num_chs"], -(-height // info["reduction"]), -(-width // info["reduction"]))
        assert x.shape == expected
        assert x.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
def test_missing_pixels_are_zeros_at_the_bottom_and_right(family: Any) -> None:
    model = small(family, dtype=torch.float64)
    image = torch.randn(1, 3, 58, 61, dtype=torch.float64)
    with torch.no_grad():
        got, want = model(image), model(nn.functional.pad(image, (0, 3, 0, 2)))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
def test_released_forms_can_be_chosen(family: Any) -> None:
    released, default = small(family, dtype=torch.float64, **DETECTION), small(family, dtype=torch.float64)
    default.load_state_dict(released.state_dict())
    same, other = torch.randn(1, 3, 224, 224).double(), torch.randn(1, 3, 256, 320).double()
    with torch.no_grad():
        torch.testing.assert_close(released(same), default(same), rtol=1e-9, atol=1e-9)
        assert (released(other) - default(other)).abs().max() > 1e-4
        with pytest.raises(ValueError, match="smaller than the window"):
            released(same[:, :, :192, :192])


def test_drop_path_is_as_released() -> None:
    line = [0.13 * i / 13 for i in range(14)]
    got = drop_path_rates(0.13, (2, 2, 8, 2))
    for rates, start in zip(got, (0, 2, 2, 8), strict=True):
        assert rates == pytest.approx(line[start : start + len(rates)])
    cells = [cell for stage in VSAViTAE(drop_path_rate=0.13, device="meta").stages for cell in stage.blocks]
    for cell, rate in zip(cells, (rate for rates in got for rate in rates), strict=True):
        for drop in (cell.drop_path1, cell.drop_path2, cell.drop_path3):
            assert (0.0 if isinstance(drop, nn.Identity) else drop.drop_prob) == pytest.approx(rate)


def test_drop_path_of_swin_rises() -> None:
    blocks = [block for stage in small(vsa, drop_path_rate=0.4).stages for block in stage.blocks]
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    assert [b.drop_path2.drop_prob for b in blocks[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def official_layout(family: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names and shapes for our weights, in reversed order, with their derived buffers."""
    renamed = {}
    for key, value in reversed(state_dict.items()):
        key = re.sub(r"^head\.fc\.", "head.", key)
        if family is vsa:
            key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
            key = key.replace("stem.conv.", "patch_embed.proj.").replace("stem.norm.", "patch_embed.norm.")
            key = re.sub(r"^stages\.", "layers.", key).replace(".transform.", ".transform.2.")
            renamed[key] = value[..., None, None] if key.endswith("transform.2.weight") else value
        else:
            key = re.sub(r"^stages\.(\d)\.downsample\.", r"layers.\1.RC.", key)
            key = re.sub(r"^stages\.(\d)\.blocks\.", r"layers.\1.NC.", key).replace(".pcm.", ".PCM.")
            key = re.sub(r"\.prm\.convs\.(\d)\.", r".PRM.convs.\1.0.", key)
            if ".attn." in key and key.endswith("weight"):
                value = value[..., None, None]
            if ".transform." in key:
                rows = torch.arange(len(value)).view(-1, 4)
                for name, part in (("offsets", rows[:, :2]), ("scales", rows[:, 2:])):
                    renamed[key.replace("transform.", f"sampling_{name}.2.")] = value[part.flatten()]
            else:
                renamed[key] = value
        if key.endswith("relative_position_bias_table"):
            renamed[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    return renamed


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
def test_official_checkpoints_load(family: Any, wrapper: str | None) -> None:
    source, target = small(family), small(family)
    official = official_layout(family, source.state_dict())
    target.load_state_dict(family.checkpoint_filter_fn({wrapper: official} if wrapper else official, target))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_averaged_weights_are_preferred() -> None:
    averaged, plain, target = small(vsa_vitae), small(vsa_vitae), small(vsa_vitae)
    checkpoint = {"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}
    target.load_state_dict(vsa_vitae.checkpoint_filter_fn(checkpoint, target))
    assert torch.equal(target.head.fc.weight, averaged.head.fc.weight)


@pytest.mark.parametrize("with_head", [True, False], ids=["head", "headless"])
@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
def test_own_checkpoints_pass_unchanged_in_any_order(family: Any, with_head: bool) -> None:
    model = small(family)
    own = {k: v for k, v in reversed(model.state_dict().items()) if with_head or not k.startswith("head.")}
    filtered = family.checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(torch.equal(filtered[key], own[key]) for key in own)


def test_wrong_keys_are_named() -> None:
    model = small(vsa_vitae)
    official = official_layout(vsa_vitae, model.state_dict())
    missing = {key: value for key, value in official.items() if "layers.2.NC.1.attn.sampling_" not in key}
    with pytest.raises(RuntimeError, match=r"Missing.*stages\.2\.blocks\.1\.attn\.transform\.weight"):
        model.load_state_dict(vsa_vitae.checkpoint_filter_fn(missing, model))
    with pytest.raises(RuntimeError, match=r"Unexpected.*surplus"):
        model.load_state_dict(vsa_vitae.checkpoint_filter_fn({**official, "surplus": torch.ones(1)}, model))


@pytest.mark.parametrize("entry", ["vsa_swin_t", "vsa_vitae_s"])
def test_pretrained_weights_are_adapted_to_channels_and_classes(entry: str, tmp_path: Path) -> None:
    family, kwargs = (vsa, {**SWIN}) if entry == "vsa_swin_t" else (vsa_vitae, {**VITAE})
    del kwargs["num_classes"]
    source = timm.create_model(entry, **kwargs)
    torch.save(official_layout(family, source.state_dict()), tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    adapted: dict[str, Any] = {"in_chans": 1, "num_classes": 7, "pretrained_cfg_overlay": overlay}
    model = timm.create_model(entry, pretrained=True, **adapted, **kwargs).eval()
    first = source.pretrained_cfg["first_conv"]
    for name in [first] if isinstance(first, str) else first:
        want = source.get_submodule(name).weight.sum(1, keepdim=True)
        torch.testing.assert_close(model.get_submodule(name).weight, want)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)


def test_timm_keeps_its_own_models() -> None:
    assert timm.models.model_entrypoint("swin_tiny_patch4_window7_224").__module__ == "timm.models.swin_transformer"
    assert timm.get_pretrained_cfg("swin_t.ms_in1k").hf_hub_id == "timm/swin_tiny_patch4_window7_224.ms_in1k"
    assert isinstance(timm.create_model("swin_t", device="meta"), VSASwin)


@pytest.mark.parametrize("entry", ["vsa_swin_n", "vsa_vitae_s", "swin_t"])
def test_initial_weights(entry: str) -> None:
    model = timm.create_model(entry, depths=(1, 1, 1, 1), device="meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.constant_(tensor, float("nan"))
    model.init_weights()
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert all(t.isfinite().all() for t in tensors)
    for name, module in model.named_modules():
        if isinstance(module, VariedWindowAttention):
            assert not module.transform.weight.any()
            assert not module.transform.bias.any()
            # The authors' ViTAE-based models keep these as convolutions, which PyTorch draws uniformly.
            want = 0.02 if isinstance(model, VSASwin) else (3 * module.qkv.in_features) ** -0.5
            assert module.qkv.weight.std().item() == pytest.approx(want, rel=0.1), name
            assert module.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.3), name
        elif isinstance(module, nn.Linear) and "mlp" in name:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
    assert model.stages[1].blocks[0].norm1.eps == (1e-5 if isinstance(model, VSASwin) else 1e-6)


def test_weight_decay_spares_the_tables_of_swin_only() -> None:
    assert len(small(vsa).no_weight_decay()) == 5
    assert {name.rpartition(".")[2] for name in small(vsa).no_weight_decay()} == {"relative_position_bias_table"}
    assert small(vsa_vitae).no_weight_decay() == set()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
def test_compiles_exports_and_scripts(family: Any) -> None:
    """Two stages, which have all kinds of layers, on maps larger and smaller than a window."""
    if family is vsa:
        model = small(vsa, depths=(1, 1), dims=(8, 16), num_heads=(1, 2), shift_stages=(False, False))
    else:
        model = small(vsa_vitae, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16))
        model.stages = model.stages[:2]  # the others are made of the same cells
    x = torch.randn(2, 3, 37, 50)
    assert_compiles_exports_and_scripts(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
def test_trains_with_autocast_checkpointing_and_drop_path(family: Any, dtype: torch.dtype) -> None:
    model = small(family, drop_path_rate=0.2).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(torch.randn(2, 3, 45, 60))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES, ids=["swin", "vitae"])
def test_maps_travel_channels_last(family: Any) -> None:
    maps = small(family).forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize(
    ("family", "kwargs", "message"),
    [
        (vsa, {"depths": (1, 1)}, r"depths \(1, 1\)"),
        (vsa, {"depths": (1, 1, 0, 1)}, r"depths is \(1, 1, 0, 1\)"),
        (vsa, {"num_heads": (5, 5, 5, 5)}, "dim is 8, num_heads 5"),
        (vsa, {"attention": "plain"}, "attention is 'plain'; allowed: varied, shifted"),
        (vsa, {"shift_stages": (True,)}, r"shift_stages \(True,\)"),
        (vsa, {"padding": "right"}, "padding is 'right'"),
        (vsa, {"patch_size": 0}, "patch_size is 0"),
        (vsa, {"drop_path_rate": 1.5}, "drop_path_rate is 1.5"),
        (vsa, {"in_chans": 0}, "in_chans is 0"),
        (vsa_vitae, {"embed_dims": (4,)}, r"embed_dims \(4,\)"),
        (vsa_vitae, {"dims": (8, 16, 0, 32)}, r"dims is \(8, 16, 0, 32\)"),
        (vsa_vitae, {"offset_norm": "ceil"}, "offset_norm is 'ceil'"),
        (vsa_vitae, {"window_size": 0}, "window_size is 0"),
        (vsa_vitae, {"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        (vsa_vitae, {key: value[:3] for key, value in VITAE.items() if key != "num_classes"}, "each of 4 stages"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(family: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(family, device="meta", **kwargs)


@pytest.mark.parametrize("entry", ["vsa_swin_t", "vsa_vitae_s", "swin_t"])
def test_unknown_arguments_raise(entry: str) -> None:
    with pytest.raises(TypeError, match="img_size"):
        timm.create_model(entry, img_size=224, device="meta")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(224, 224), (800, 1333)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("entry", ["vsa_swin_t", "vsa_vitae_s"])
def test_half_precision_is_finite(entry: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    model = timm.create_model(entry, device="cuda").train()
    with torch.autocast("cuda", dtype):
        out = model(torch.randn(2, 3, *size, device="cuda"))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
