"""RMT against the official outputs, the published sizes and its own layouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from _counts import parameters_and_gmacs
from _golden import load_case
from _translations import assert_compiles_exports_and_scripts
from torch import Tensor, nn

from vitrail.models._dense import DenseBackbone
from vitrail.models._dense import checkpoint_filter_fn as dense_filter_fn
from vitrail.models.rmt import RMT, checkpoint_filter_fn, fuse_projections

SMALL = {
    "depths": (1, 1, 2, 1),
    "dims": (16, 32, 32, 64),
    "num_heads": (2, 2, 4, 4),
    "layer_scale": (None, None, 0.5, 0.5),
    "projection": 48,
}
TWO_STAGES = {
    "depths": (2, 1),
    "dims": (16, 32),
    "num_heads": (2, 2),
    "heads_range": (4, 6),
    "layer_scale": (None, 0.5),
    "decomposed": (True, False),
    "mlp_ratios": (4, 3),
}
# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 3.0


def small_rmt(**kwargs: object) -> RMT:
    return RMT(**{"num_classes": 10, **SMALL, **kwargs}).eval()


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strict but for the integer counters of batch norm, which the golden files leave out."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing), missing


@torch.no_grad()
def run(model: RMT, image: Tensor) -> dict[str, Tensor]:
    last, maps = model.forward_intermediates(image)
    return {"stem": model.stem(image), "logits": model.forward_head(last)} | {
        f"stage{i}": x for i, x in enumerate(maps)
    }


@pytest.mark.parametrize(("name", "model_name"), [("rmt_tiny_224", "rmt_t"), ("rmt_small_224", "rmt_s")])
def test_golden(golden_dir: Path, name: str, model_name: str) -> None:
    case = load_case(golden_dir, name)
    model = timm.create_model(model_name, dtype=torch.float64).eval()
    load(model, checkpoint_filter_fn(case.weights, model))
    errors = case.relative_errors(run(model, case.image))
    assert len(errors) == 6
    assert max(errors.values()) < 1e-8, errors
    single = case.relative_errors(run(model.float(), case.image.float()))
    for output, allowed in case.info["float32_max_abs_diff_by_output"].items():
        assert single[output] * case.scale(output) < FLOAT32_FACTOR * allowed, output


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("rmt_t", 14_334_216, 2.637),
        ("rmt_s", 26_967_240, 4.777),
        ("rmt_b", 54_154_896, 10.373),
        ("rmt_l", 95_464_864, 19.488),
    ],
)
def test_size_and_cost(name: str, parameters: int, gmacs: float) -> None:
    assert parameters_and_gmacs(name, 224) == (parameters, pytest.approx(gmacs, abs=5e-4))


def test_large_variants_scale_their_last_stages() -> None:
    blocks = [stage.blocks[0] for stage in timm.create_model("rmt_b", device="meta").stages]
    assert [isinstance(block.ls1, nn.Identity) for block in blocks] == [True, True, False, False]
    assert [block.attn.decomposed for block in blocks] == [True, True, True, False]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (70, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_size_trains(size: tuple[int, int], dtype: torch.dtype) -> None:
    model = small_rmt(drop_path_rate=0.2).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(torch.randn(2, 3, *size))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_maps_round_up() -> None:
    maps = small_rmt().forward_intermediates(torch.randn(1, 3, 33, 47), intermediates_only=True)
    assert [tuple(x.shape[2:]) for x in maps] == [(9, 12), (5, 6), (3, 3), (2, 2)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_checkpointing_changes_no_gradient() -> None:
    model, x = small_rmt(), torch.randn(2, 3, 40, 40)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_compiles_exports_and_scripts() -> None:
    """Two stages, which have all kinds of layers."""
    model, x = small_rmt(**TWO_STAGES), torch.randn(2, 3, 37, 50)
    assert_compiles_exports_and_scripts(model, x)


def test_half_precision_model_keeps_no_stale_positions() -> None:
    model, x = small_rmt(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        model(x)
        half = model.bfloat16()(x.bfloat16())
        again = model.float()(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), again, rtol=0.1, atol=0.05)


def official_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters in the authors' layout, with the buffers they keep, in reversed order."""
    official = {"layers.0.Relpos.angle": torch.ones(4), "layers.0.Relpos.decay": torch.ones(2)}
    renames = (
        (r"^stem\.", "patch_embed.proj."),
        (r"^stages\.(\d)\.blocks\.", r"layers.\1.blocks."),
        (r"norm1\.", "retention_layer_norm."),
        (r"norm2\.", "final_layer_norm."),
        (r"attn\.proj\.", "attn.out_proj."),
        (r"attn\.", "retention."),
        (r"(pos|lepe|dwconv)\.", r"\1.conv."),
        (r"^head\.fc\.", "head."),
        (r"^head\.(proj|norm)\.", r"\1."),
    )
    for key, value in reversed(weights.items()):
        for i in (1, 2, 3):
            key = key.replace(f"stages.{i}.downsample.0.", f"layers.{i - 1}.downsample.reduction.")
            key = key.replace(f"stages.{i}.downsample.1.", f"layers.{i - 1}.downsample.norm.")
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        if ".qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                official[key.replace("qkv", f"{name}_proj")] = part
        elif match := re.search(r"ls([12])\.gamma$", key):
            official[key[: match.start()] + f"gamma_{match[1]}"] = value.view(1, 1, 1, -1)
        else:
            official[key] = value
    return official


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_official_checkpoints_load(wrapper: str | None) -> None:
    source, target = small_rmt(), small_rmt()
    official = official_layout(source.state_dict())
    assert not set(official) & set(source.state_dict())
    assert {"layers.2.blocks.1.gamma_2", "layers.0.downsample.reduction.weight", "norm.running_var"} <= set(official)
    target.load_state_dict(checkpoint_filter_fn({wrapper: official} if wrapper else official, target))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize("with_head", [True, False], ids=["head", "headless"])
def test_own_checkpoints_pass_unchanged_in_any_order(with_head: bool) -> None:
    model = small_rmt()
    own = {k: v for k, v in reversed(model.state_dict().items()) if with_head or not k.startswith("head.")}
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[key] is own[key] for key in own)


def test_wrong_keys_are_named() -> None:
    model = small_rmt()
    official = official_layout(model.state_dict())
    missing = {k: v for k, v in official.items() if k != "layers.2.blocks.1.retention.k_proj.weight"}
    with pytest.raises(RuntimeError, match=r"Missing.*stages\.2\.blocks\.1\.attn\.qkv\.weight(.|\n)*q_proj"):
        model.load_state_dict(checkpoint_filter_fn(missing, model))
    with pytest.raises(RuntimeError, match=r"Unexpected.*aux_head\.weight"):
        model.load_state_dict(checkpoint_filter_fn({**official, "aux_head.weight": torch.ones(1)}, model))


def test_projections_are_joined_in_order() -> None:
    parts = {f"a.{name}_proj.bias": torch.full((2,), float(i)) for i, name in enumerate("kqv")}
    assert fuse_projections(parts)["a.qkv.bias"].tolist() == [1.0, 1.0, 0.0, 0.0, 2.0, 2.0]


def test_official_dense_checkpoints_load() -> None:
    source = small_rmt()
    official = {
        k: v for k, v in official_layout(source.state_dict()).items() if k.split(".")[0] in {"patch_embed", "layers"}
    }
    for i, dim in enumerate(SMALL["dims"]):
        official |= {f"extra_norms.{i}.weight": torch.full((dim,), i + 2.0), f"extra_norms.{i}.bias": torch.ones(dim)}
    backbone = DenseBackbone(small_rmt()).eval()
    backbone.load_state_dict(dense_filter_fn({"state_dict": official}, backbone))
    image = torch.randn(1, 3, 50, 66)
    maps = source.forward_intermediates(image, intermediates_only=True)
    for i, (got, x) in enumerate(zip(backbone(image), maps, strict=True)):
        centred = x - x.mean(1, keepdim=True)
        want = centred / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * (i + 2) + 1
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_head_projects_before_it_pools() -> None:
    model = small_rmt()
    x = torch.randn(2, 3, 64, 64)
    last = model.forward_features(x)
    hidden = nn.functional.silu(model.head.norm(model.head.proj(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
    torch.testing.assert_close(model.forward_head(last, pre_logits=True), hidden.mean((2, 3)))
    assert model.num_features == 64
    assert model.head_hidden_size == 48
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.head_hidden_size == 48


def test_initial_weights_follow_the_authors() -> None:
    model = RMT(depths=(1, 1, 1, 1), layer_scale=(None, None, 1e-6, 1e-6))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
    emptied = RMT(depths=(1, 1, 1, 1), layer_scale=(None, None, 1e-6, 1e-6), device="meta").to_empty(device="cpu")
    for tensor in emptied.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    emptied.init_weights()
    assert all(t.isfinite().all() for t in emptied.state_dict().values())
    assert torch.equal(emptied.stages[3].blocks[0].ls2.gamma, torch.full((512,), 1e-6))


def test_drop_path_grows_over_blocks() -> None:
    model = small_rmt(drop_path_rate=0.4)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    rates = [drop.drop_prob for block in blocks[1:] for drop in (block.drop_path1, block.drop_path2)]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1)}, r"depths \(1, 1\), dims"),
        ({"heads_range": (4, 4, 6)}, r"heads_range \(4, 4, 6\)"),
        ({"depths": (1, 1, 0, 1)}, r"depths is \(1, 1, 0, 1\)"),
        ({"num_heads": (3, 4, 8, 16)}, "dim is 64, num_heads 3"),
        ({"num_heads": (64, 4, 8, 16)}, "head_dim is 1"),
        ({"stem_stride": 3}, "stem_stride is 3"),
        ({"drop_path_rate": 1.5}, "drop_path_rate is 1.5"),
        ({"in_chans": 0}, "in_chans is 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RMT(device="meta", **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(224, 224), (800, 1333)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_finite(dtype: torch.dtype, size: tuple[int, int]) -> None:
    model = timm.create_model("rmt_t", device="cuda").train()
    with torch.autocast("cuda", dtype):
        out = model(torch.randn(2, 3, *size, device="cuda"))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
