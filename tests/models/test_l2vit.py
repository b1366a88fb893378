"""L2ViT against the official outputs; checkpoints, counts, sizes, and what the class adds to timm's contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from _counts import parameters_and_gmacs
from _golden import GoldenCase, load_case
from torch import Tensor, nn

from vitrail.layers.window import WindowAttention
from vitrail.models._dense import DenseBackbone
from vitrail.models._dense import checkpoint_filter_fn as dense_filter_fn
from vitrail.models.l2vit import L2ViT, checkpoint_filter_fn
from vitrail.tools._common.export import wake_idle_parts

SMALL: dict[str, Any] = {"depths": (2, 2), "dims": (16, 32), "num_heads": (1, 2), "window_size": 3, "num_classes": 10}
# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 3.0


def small_l2vit(**kwargs: object) -> L2ViT:
    return L2ViT(**{**SMALL, **kwargs}).eval()


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strict but for the integer counters of batch norm, which the golden files leave out."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing), missing


@torch.no_grad()
def run(case: GoldenCase, dtype: torch.dtype) -> dict[str, Tensor]:
    model = timm.create_model("l2vit_s" if "small" in case.name else "l2vit_t", dtype=dtype).eval()
    load(model, {k: v.to(dtype) for k, v in checkpoint_filter_fn(case.weights, model).items()})
    last, maps = model.forward_intermediates(case.image.to(dtype))
    outputs = {"logits": model.forward_head(last), "features": model.forward_head(last, pre_logits=True)}
    return outputs | {f"stage{i}": x for i, x in enumerate(maps)}


@pytest.mark.parametrize("name", ["l2vit_tiny_224", "l2vit_tiny_200x264", "l2vit_small_224"])
def test_golden(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    errors = case.relative_errors(run(case, torch.float64))
    assert errors.keys() >= {"logits", "features", "stage0", "stage3"}
    assert max(errors.values()) < 1e-8, errors


@pytest.mark.parametrize("name", ["l2vit_tiny_200x264"])
def test_golden_in_float32(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    errors = case.relative_errors(run(case, torch.float32))
    for output, recorded in case.info["float32_max_abs_diff"].items():
        assert errors[output] <= FLOAT32_FACTOR * recorded / case.scale(output), (output, errors)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("l2vit_t", 28_596_781, 4.69),
        ("l2vit_s", 50_199_157, 8.98),
        ("l2vit_b", 88_577_188, 15.81),
        ("l2vit_b_384", 88_577_188, 47.32),
    ],
)
def test_counts_are_the_published_ones(name: str, parameters: int, gmacs: float) -> None:
    assert parameters_and_gmacs(name) == (parameters, pytest.approx(gmacs, abs=0.005))


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (61, 40)], ids=str)
def test_any_size(size: tuple[int, int]) -> None:
    _, maps = small_l2vit().forward_intermediates(torch.randn(1, 3, *size))
    sizes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8)]
    assert [tuple(x.shape[2:]) for x in maps] == sizes


def test_gradients_reach_every_parameter_with_and_without_checkpointing() -> None:
    model = small_l2vit().train()
    image = torch.randn(2, 3, 40, 36)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(g.abs().sum() > 0 for g in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
def test_compiles_exports_and_scripts() -> None:
    """Blocks of both kinds, and a second stage."""
    model, image = small_l2vit(depths=(2, 1)), torch.randn(2, 3, 41, 38)
    wake_idle_parts(model)
    want = model(image)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), want)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), want)
    torch.testing.assert_close(torch.jit.script(model)(image), want, rtol=1e-4, atol=1e-4)


def test_set_input_size_changes_the_windows() -> None:
    model = small_l2vit()
    model.set_input_size(img_size=64, window_size=(4, 5))
    assert {m.window_size for m in model.modules() if isinstance(m, WindowAttention)} == {(4, 5)}


def test_own_checkpoint_and_official_dense_layout_load() -> None:
    model = small_l2vit()
    torch.testing.assert_close(checkpoint_filter_fn(model.state_dict(), model), dict(model.state_dict()))
    backbone = DenseBackbone(small_l2vit(), out_indices=(0, 1))
    official = {f"norm{i}.{key}": torch.randn(dim) for i, dim in enumerate((16, 32)) for key in ("weight", "bias")}
    whole = {**model.state_dict(), **official}
    backbone.load_state_dict(dense_filter_fn(whole, backbone))
    assert torch.equal(backbone.norms["1"].weight, official["norm1.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (2,)}, "must have one entry a stage"),
        ({"depths": (2, 0)}, "allowed: at least 1 each"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"num_heads": (3, 2)}, "num_heads 3"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_l2vit(**arguments)
