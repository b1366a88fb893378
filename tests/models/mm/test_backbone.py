"""Models of timm's registry as backbones of mmdetection and mmsegmentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from _golden import load_case
from mmengine.registry import MODELS, Registry
from torch import Tensor, nn

import vitrail  # noqa: F401 -- registers the models
from vitrail.models.mm.backbone import VitrailBackbone
from vitrail.models.mm.checkpoint import CheckpointError, save_weights

SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
SMALL: dict[str, dict[str, Any]] = {
    "biformer_n": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)},
    "resnet18": {"layers": (1, 1, 1, 1), "out_indices": (1, 2, 3, 4)},
    "mobilenetv2_ela_b": {},
    "test_vit": {"out_indices": (0, 1)},
}


def _build(name: str, **kwargs: Any) -> VitrailBackbone:
    return VitrailBackbone(name, **{**SMALL[name], **kwargs})


def _maps(backbone: VitrailBackbone, size: tuple[int, int] = (64, 96)) -> tuple[Tensor, ...]:
    return backbone(torch.randn(2, 3, *size))


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_configs_of_every_scope_find_it(scope: str) -> None:
    child = Registry("test models", parent=MODELS, scope=scope + "-test")
    backbone = child.build({"type": "VitrailBackbone", "name": "biformer_n", "out_indices": (1, 3)})
    assert isinstance(backbone, VitrailBackbone)
    assert backbone.channels == [64, 256]


@pytest.mark.parametrize("name", SMALL)
def test_maps_are_nchw_at_any_size_and_every_parameter_learns(name: str) -> None:
    backbone = _build(name)
    maps = _maps(backbone, (70, 101))
    assert isinstance(maps, tuple)
    assert [m.shape[1] for m in maps] == backbone.channels
    ceiled = [(-(-70 // r), -(-101 // r)) for r in backbone.reductions]
    floored = [(70 // r, 101 // r) for r in backbone.reductions]
    assert [tuple(m.shape[2:]) for m in maps] == (floored if name.startswith("convnext") else ceiled)
    sum(m.pow(3).mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_maps_are_those_of_the_model(name: str) -> None:
    arguments = dict(SMALL[name])
    indices = list(arguments.pop("out_indices", (0, 1, 2, 3)))
    backbone = _build(name, output_norm=False).eval()
    size = 160 if name == "test_vit" else 224
    model = timm.create_model(name, **arguments).eval()
    backbone.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        wanted = model.forward_intermediates(image, indices, intermediates_only=True)
        for got, want in zip(backbone(image), wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_a_size_that_is_no_multiple_of_the_patch_is_padded_with_zeros() -> None:
    backbone = _build("swin_tiny_patch4_window7_224").eval()
    image = torch.randn(1, 3, 70, 101)
    with torch.no_grad():
        padded = backbone(nn.functional.pad(image, (0, 3, 0, 2)))
        assert all(map(torch.equal, backbone(image), padded))


def test_size_divisor_pads_and_cuts() -> None:
    backbone = VitrailBackbone("hrnet_w18_small", size_divisor=32, out_indices=(1, 2)).eval()
    image = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        got, whole = backbone(image), backbone(nn.functional.pad(image, (0, 26, 0, 24)))
    for m, full, reduction in zip(got, whole, backbone.reductions, strict=True):
        rows, columns = -(-40 // reduction), -(-70 // reduction)
        assert torch.equal(m, full[:, :, :rows, :columns])


@pytest.mark.parametrize(("name", "eps"), [("swin_tiny_patch4_window7_224", 1e-5), ("convnext_atto", 1e-6)])
def test_norms_of_timms_families_and_their_official_names(name: str, eps: float) -> None:
    backbone = _build(name)
    assert list(backbone.norms) == ["0", "1", "2", "3"]
    assert {norm.eps for norm in backbone.norms.values()} == {eps}
    official = {k.removeprefix("model."): v for k, v in backbone.state_dict().items() if k.startswith("model.")}
    norms = {f"norm{i}.{part}": torch.randn(n) for i, n in enumerate(backbone.channels) for part in ("weight", "bias")}
    holder = nn.ModuleDict({"backbone": backbone})
    holder.load_state_dict({f"backbone.{key}": value for key, value in (official | norms).items()})
    assert torch.equal(backbone.norms["2"].bias, norms["norm2.bias"])


def test_official_detector_checkpoint(golden_dir: Path, tmp_path: Path) -> None:
    case = load_case(golden_dir, "davit_tiny_det_200x264")
    weights = {f"backbone.{key}": value.float() for key, value in case.weights.items()}
    torch.save({"state_dict": {**weights, "neck.convs.0.weight": torch.zeros(1)}}, tmp_path / "official.pth")
    backbone = VitrailBackbone("davit_t", checkpoint=tmp_path / "official.pth", norm_eval=True)
    backbone.init_weights()
    with torch.no_grad():
        maps = backbone.eval()(case.image.float())
    assert max(case.relative_errors({f"stage{i}": m for i, m in enumerate(maps)}).values()) < 5e-6
    holder = nn.ModuleDict({"backbone": VitrailBackbone("davit_t")})
    holder.load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(holder.parameters(), backbone.parameters(), strict=True))


@pytest.mark.parametrize(("name", "indices"), [("biformer_n", (0, 2)), ("swin_tiny_patch4_window7_224", (1, 2))])
@pytest.mark.parametrize("wrapped", ["plain", "classifier run", "safetensors"])
def test_weights_of_a_classifier(name: str, indices: tuple[int, ...], wrapped: str, tmp_path: Path) -> None:
    arguments = {key: value for key, value in SMALL[name].items() if key != "out_indices"}
    model = timm.create_model(name, num_classes=7, **arguments)
    path = tmp_path / ("weights.safetensors" if wrapped == "safetensors" else "weights.pth")
    if wrapped == "safetensors":
        save_weights(model, path)
    elif wrapped == "plain":
        torch.save(model.state_dict(), path)
    else:
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in model.state_dict().items()}, "meta": {}}, path)
    backbone = _build(name, out_indices=indices, init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    norms = {key: value.clone() for key, value in backbone.norms.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(value, backbone.norms.state_dict()[key]) for key, value in norms.items())
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in backbone.model.state_dict().items())


def test_pretrained_weights_come_when_mmengine_asks(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1))
    save_weights(model, tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "url": "", "hf_hub_id": ""}
    backbone = _build("resnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert not torch.equal(backbone.model.conv1.weight, model.conv1.weight)
    backbone.init_weights()
    assert torch.equal(backbone.model.layer4[0].conv2.weight, model.layer4[0].conv2.weight)
    nn.init.zeros_(backbone.model.conv1.weight)
    backbone.init_weights()
    assert not backbone.model.conv1.weight.any()


def test_own_checkpoint_passes() -> None:
    source, target = _build("resnet18"), _build("resnet18")
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("frozen", [-1, 0, 2])
@pytest.mark.parametrize("name", ["resnet18", "biformer_n"])
def test_frozen_stages_stay_as_they_are(name: str, frozen: int) -> None:
    backbone = _build(name, frozen_stages=frozen)
    assert backbone.eval() is backbone
    assert backbone.train() is backbone
    layers = {"resnet18": ("conv1", "bn1", "layer1.", "layer2."), "biformer_n": ("stem.", "stages.0.", "stages.1.")}
    n_frozen = {"resnet18": {-1: 0, 0: 2, 2: 4}, "biformer_n": {-1: 0, 0: 1, 2: 3}}[name][frozen]
    prefixes = tuple(f"model.{layer}" for layer in layers[name][:n_frozen])
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    sum(m.pow(3).mean() for m in _maps(backbone)).backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == key.startswith(prefixes or "nothing"), key
    for key, module in backbone.named_modules():
        if list(module.parameters()) and not list(module.children()):
            assert module.training != key.startswith(prefixes or "nothing"), key
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not any(key.startswith(prefixes or "nothing") for key in changed)


def test_norm_eval_keeps_statistics_and_trains_the_affine_part() -> None:
    backbone = _build("biformer_n", norm_eval=True)
    statistics = {key: value.clone() for key, value in backbone.named_buffers()}
    sum(m.pow(3).mean() for m in _maps(backbone)).backward()
    assert statistics
    assert all(torch.equal(value, statistics[key]) for key, value in backbone.named_buffers())
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert backbone.training
    assert backbone.model.stages.training


@pytest.mark.parametrize("name", ["biformer_n", "swin_tiny_patch4_window7_224"])
def test_gradient_checkpointing_computes_blocks_again(name: str) -> None:
    plain, saving = _build(name, norm_eval=True), _build(name, norm_eval=True, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    image, calls = torch.randn(1, 3, 56, 56), []
    for backbone in (plain, saving):
        count: list[int] = []
        module = next(m for key, m in backbone.named_modules() if key.endswith("blocks.0"))
        module.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        sum(m.pow(3).mean() for m in backbone(image)).backward()
        calls.append(len(count))
    assert calls == [1, 2]
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_drop_path_reaches_the_model() -> None:
    backbone = _build("biformer_n", drop_path_rate=0.4)
    rates = [m.drop_prob for m in backbone.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("biformer_nn", {}, ValueError, "biformer_nn.*near: .*biformer_n"),
        ("biformer_n", {"depth": 3}, ValueError, "biformer_n.*depth"),
        ("biformer_n", {"out_indices": (0, 4)}, ValueError, "out_indices"),
        ("biformer_n", {"frozen_stages": 9}, ValueError, "frozen_stages is 9; allowed for biformer_n: -1 to 4"),
        ("biformer_n", {"pretrained": True, "checkpoint": "x"}, ValueError, "one source of weights"),
        ("biformer_n", {"init_cfg": {"type": "Kaiming"}}, ValueError, "init_cfg is .*Kaiming"),
        ("biformer_n", {"size_divisor": 0}, ValueError, "size_divisor is 0"),
        ("resnet18", {"output_norm": True}, NotImplementedError, "output_norm: ResNet"),
    ],
)
def test_bad_arguments_are_named(name: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VitrailBackbone(name, **kwargs)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = timm.create_model("biformer_n").state_dict()
    del weights["stages.0.blocks.0.norm1.weight"]
    torch.save(weights, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"short\.pth .*missing model\.stages\.0\.blocks\.0\.norm1\.weight"):
        _build("biformer_n", checkpoint=tmp_path / "short.pth").init_weights()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        _build("biformer_n", checkpoint=tmp_path / "absent.pth").init_weights()
    with pytest.raises(ValueError, match="pretrained weights of mobilenetv2_ela_b"):
        _build("mobilenetv2_ela_b", pretrained=True).init_weights()


def test_neither_mmdet_nor_mmseg_is_imported() -> None:
    loaded = "any(name.startswith(('mmdet', 'mmseg', 'mmcv')) for name in sys.modules)"
    code = f"import sys, vitrail.models.mm.backbone; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
