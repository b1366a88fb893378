"""NAT, DiNAT and DiNAT_s against the official outputs; checkpoints; sizes and costs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from _counts import parameters_and_gmacs
from _golden import GoldenCase, load_case
from _translations import assert_compiles_exports_and_scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrail.layers.neighborhood import NeighborhoodAttention
from vitrail.models import _dense
from vitrail.models.nat import NAT, checkpoint_filter_fn

SMALL: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 2, 4),
    "kernel_size": 3,
    "dilations": ((1,), (2,), (1, 2), (1,)),
    "num_classes": 10,
}
# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 1.5
FRAMES = ["convolutions", "patches"]
DETECTION = ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1))


def small(**kwargs: Any) -> NAT:
    return NAT(**{**SMALL, **kwargs}).eval()


def run_golden(case: GoldenCase, entry: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = timm.create_model(entry, dtype=dtype).eval()
    model.load_state_dict(checkpoint_filter_fn({k: v.to(dtype) for k, v in case.weights.items()}, model))
    with torch.no_grad():
        final, maps = model.forward_intermediates(case.image.to(dtype))
        return {f"stage{i}": x for i, x in enumerate(maps)} | {"logits": model.forward_head(final)}


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("nat_mini", "nat_mini"),
        ("dinat_mini", "dinat_mini"),
        ("nat_small_224", "nat_s"),
        ("dinat_tiny_200x264", "dinat_t"),
        ("dinat_s_tiny_200x264", "dinats_t"),
    ],
    ids=lambda value: value,
)
def test_golden(golden_dir: Any, name: str, entry: str) -> None:
    case = load_case(golden_dir, name)
    errors = case.relative_errors(run_golden(case, entry, torch.float64))
    assert len(errors) == len(case.info["outputs"])
    assert max(errors.values()) < 1e-8, errors
    allowed = case.info["float32_max_diff_relative_to_output_max"]
    for output, error in case.relative_errors(run_golden(case, entry, torch.float32)).items():
        assert error <= FLOAT32_FACTOR * allowed[output], output


def test_golden_as_dense_backbone(golden_dir: Any) -> None:
    case = load_case(golden_dir, "dinat_mini_det_200x264")
    model = timm.create_model("dinat_mini", dilations=DETECTION, dtype=torch.float64)
    backbone = _dense.DenseBackbone(model).eval()
    backbone.load_state_dict(_dense.checkpoint_filter_fn(case.weights, backbone))
    with torch.no_grad():
        errors = case.relative_errors({f"stage{i}": x for i, x in enumerate(backbone(case.image))})
    assert len(errors) == len(case.info["outputs"])
    assert max(errors.values()) < 1e-8, errors


@pytest.mark.parametrize(
    ("name", "size", "parameters", "gmacs"),
    [
        ("nat_mini", 224, 19_984_174, 2.695),
        ("nat_t", 224, 27_901_582, 4.295),
        ("nat_s", 224, 50_743_297, 7.772),
        ("nat_b", 224, 89_769_652, 13.677),
        ("dinat_mini", 224, 19_984_174, 2.695),
        ("dinat_t", 224, 27_901_582, 4.295),
        ("dinat_s", 224, 50_719_681, 7.772),
        ("dinat_b", 224, 89_769_652, 13.677),
        ("dinat_l", 224, 200_943_514, 30.458),
        ("dinat_l_384", 384, 200_943_514, 89.505),
        ("dinat_l_k11_384", 384, 201_144_250, 92.085),
        ("dinats_t", 224, 28_288_354, 4.491),
        ("dinats_s", 224, 49_606_258, 8.741),
        ("dinats_b", 224, 87_768_224, 15.431),
        ("dinats_l", 224, 196_532_476, 34.476),
        ("dinats_l_384", 384, 196_532_476, 101.314),
    ],
    ids=lambda value: str(value),
)
def test_size_and_cost(name: str, size: int, parameters: int, gmacs: float) -> None:
    found_parameters, found_gmacs = parameters_and_gmacs(name, size)
    assert (found_parameters, round(found_gmacs, 3)) == (parameters, gmacs)


def dilations(model: NAT) -> list[list[int]]:
    return [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]


def test_dilations_fill_the_maps_of_the_released_models() -> None:
    make = {name: timm.create_model(name, device="meta") for name in ("nat_t", "dinat_t", "dinats_t", "dinats_l_384")}
    assert dilations(make["nat_t"]) == [[1] * 3, [1] * 4, [1] * 18, [1] * 5]
    assert dilations(make["dinat_t"]) == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
    assert dilations(make["dinats_t"]) == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]
    assert dilations(make["dinats_l_384"]) == [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]
    assert dilations(timm.create_model("dinat_mini", device="meta", dilations=DETECTION))[2] == [1, 3, 1, 5, 1, 7]


@pytest.mark.parametrize("frame", FRAMES)
@settings(max_examples=6)
@given(height=st.integers(32, 90), width=st.integers(32, 90))
def test_any_size(frame: str, height: int, width: int) -> None:
    model = small(frame=frame)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    for x, info in zip(maps, model.feature_info, strict=True):
        assert x.shape == (1, info["num_chs"], -(-height // info["reduction"]), -(-width // info["reduction"]))
        assert x.isfinite().all()
        assert x.is_contiguous(memory_format=torch.channels_last)


def official_layout(model: NAT) -> dict[str, Tensor]:
    """The authors' names for our weights, in reversed order."""
    levels = "layers" if hasattr(model.stem, "conv") else "levels"
    renamed = {}
    for key, value in reversed(model.state_dict().items()):
        key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"{levels}.{int(m[1]) - 1}.downsample", key)
        key = re.sub(r"^stages\.", f"{levels}.", re.sub(r"^head\.fc\.", "head.", key))
        key = re.sub(r"^stem\.conv(\d)\.", lambda m: f"patch_embed.proj.{int(m[1]) - 1}.", key)
        key = key.replace("stem.conv.", "patch_embed.proj.").replace("stem.norm.", "patch_embed.norm.")
        renamed[re.sub(r"\.ls(\d)\.gamma", r".gamma\1", key)] = value
    return renamed


def transformers_layout(model: NAT) -> dict[str, Tensor]:
    """Hugging Face's names: q, k and v apart, both layer scales in one."""
    renamed: dict[str, Tensor] = {}
    for key, value in official_layout(model).items():
        if key.startswith("head."):
            renamed[key.replace("head.", "classifier.")] = value
            continue
        for ours, theirs in (
            (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
            (r"^patch_embed\.norm\.", "embeddings.norm."),
            (r"^levels\.(\d)\.blocks\.", r"encoder.levels.\1.layers."),
            (r"^levels\.", "encoder.levels."),
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"\.attn\.proj\.", ".attention.output.dense."),
            (r"\.attn\.", ".attention.self."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
            (r"^norm\.", "layernorm."),
        ):
            key = re.sub(ours, theirs, key)
        key = f"dinat.{key}"
        if ".qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[key.replace(".qkv.", f".{name}.")] = part
        elif key.endswith("gamma1"):
            both = torch.stack([value, model.state_dict()[_own_gamma2(key)]])
            renamed[key.replace("gamma1", "layer_scale_parameters")] = both
        elif not key.endswith("gamma2"):
            renamed[key] = value
    return renamed


def _own_gamma2(key: str) -> str:
    stage, block = re.search(r"levels\.(\d)\.layers\.(\d)", key).groups()  # type: ignore[union-attr]
    return f"stages.{stage}.blocks.{block}.ls2.gamma"


def randomised(**kwargs: Any) -> NAT:
    model = small(**kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("layout", ["official", "wrapped", "patches", "transformers", "own"])
def test_checkpoints_load(layout: str) -> None:
    kwargs = {"frame": "patches"} if layout == "patches" else {"layer_scale": 0.1}
    source, target = randomised(**kwargs), randomised(**kwargs)
    weights: Any = source.state_dict() if layout == "own" else official_layout(source)
    if layout == "transformers":
        weights = transformers_layout(source)
    weights = {"model": weights} if layout == "wrapped" else weights
    target.load_state_dict(checkpoint_filter_fn(weights, target))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_wrong_keys_are_named() -> None:
    model = small()
    official = official_layout(model)
    del official["levels.2.blocks.1.attn.rpb"]
    with pytest.raises(RuntimeError, match=r"Missing.*stages\.2\.blocks\.1\.attn\.rpb"):
        model.load_state_dict(checkpoint_filter_fn(official, model))


@pytest.mark.parametrize("frame", FRAMES)
def test_initial_weights(frame: str) -> None:
    model = NAT(depths=(1, 1, 1, 1), frame=frame, layer_scale=1e-5, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, NeighborhoodAttention):
            assert module.rpb.std().item() == pytest.approx(0.02, rel=0.3), name
            assert module.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1), name
    assert torch.equal(model.stages[0].blocks[0].ls1.gamma, torch.full((64,), 1e-5))
    assert len(model.no_weight_decay()) == 4
    assert all(name.endswith("rpb") for name in model.no_weight_decay())


@pytest.mark.slow
@pytest.mark.parametrize("frame", FRAMES)
def test_compiles_exports_and_scripts(frame: str) -> None:
    """Two stages, which have all kinds of layers, the second's map shorter than a neighborhood."""
    model = small(frame=frame, depths=(1, 1), dims=(8, 16), num_heads=(1, 2), dilations=((1,), (2,)))
    x = torch.randn(2, 3, 37, 70)
    assert_compiles_exports_and_scripts(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_trains_with_autocast_checkpointing_and_drop_path(dtype: torch.dtype) -> None:
    model = small(drop_path_rate=0.2, layer_scale=0.1).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(torch.randn(2, 3, 45, 60))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1)}, r"depths \(1, 1\)"),
        ({"dilations": ((1,), (1,))}, "dilations"),
        ({"dilations": ((1, 2), (1,), (1,), (1,))}, r"dilations has \(1, 2\) for 1 blocks; allowed: 1 to 1 entries"),
        ({"dilations": ((0,), (1,), (1,), (1,))}, "dilation is 0"),
        ({"num_heads": (3, 2, 2, 4)}, "dim is 8, num_heads 3"),
        ({"frame": "swin"}, "frame is 'swin'; allowed: convolutions, patches"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"in_chans": 0}, "in_chans is 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(device="meta", **kwargs)
