"""`vitrail.accelerate`: same outputs and gradients, nothing else changed, reversible, and an honest report."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.models.davit import ChannelAttentionV2, SpatialBlock
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import vitrail
from vitrail.kernels._common import dispatch
from vitrail.layers.stem import ImageConv2d
from vitrail.models.accelerate import FusedSwinBlock, register_acceleration

_TINY_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": 5}
_TINY_DAVIT = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}
_SWIN_PARTS = {"Conv2d": 1, "LayerNorm": 11, "SwinTransformerBlock": 4, "Mlp": 4}
_DAVIT_PARTS = {
    "Conv2d": 1, "LayerNorm2d": 3, "LayerNorm": 8, "SpatialBlock": 2, "ChannelAttention": 2, "ConvPosEnc": 8, "Mlp": 4
}  # fmt: skip
_SWIN_OPERATORS = frozenset({"window_attention", "relative_position_bias"})
_DAVIT_OPERATORS = frozenset({"window_attention", "channel_attention", "depthwise_conv"})


class _Case(NamedTuple):
    name: str
    options: dict[str, Any]
    size: tuple[int, int]
    replaced: dict[str, int]
    operators: frozenset[str] = _SWIN_OPERATORS


_CASES = {
    "swin": _Case("swin_tiny_patch4_window7_224", {**_TINY_SWIN, "img_size": 32}, (32, 32), _SWIN_PARTS),
    "swin, any size": _Case(
        "swin_tiny_patch4_window7_224", {**_TINY_SWIN, "strict_img_size": False}, (52, 76), _SWIN_PARTS
    ),
    "swin without bias": _Case(
        "swin_tiny_patch4_window7_224", {**_TINY_SWIN, "img_size": 48, "qkv_bias": False}, (48, 48), _SWIN_PARTS
    ),
    "davit": _Case("davit_tiny", _TINY_DAVIT, (60, 72), _DAVIT_PARTS, _DAVIT_OPERATORS),
    "davit, second channel attention": _Case(
        "davit_tiny",
        {**_TINY_DAVIT, "channel_attn_v2": True, "cpe_act": True},
        (60, 72),
        {("ChannelAttentionV2" if kind == "ChannelAttention" else kind): n for kind, n in _DAVIT_PARTS.items()},
        _DAVIT_OPERATORS,
    ),
    "maxvit": _Case(
        "maxvit_pico_rw_256",
        {"img_size": 64, "num_classes": 5},
        (64, 64),
        {"PartitionAttentionCl": 11, "AttentionCl": 22, "LayerNorm": 44, "LayerNorm2d": 1},
        frozenset({"window_attention"}),
    ),
    "maxvit, tensorflow": _Case(
        "maxvit_tiny_tf_224",
        {"img_size": 64, "num_classes": 5, "depths": (1, 1), "embed_dim": (32, 64)},
        (64, 64),
        {"PartitionAttentionCl": 2, "AttentionCl": 4, "LayerNorm": 8, "LayerNorm2d": 1},
        frozenset({"window_attention"}),
    ),
    "vit": _Case("test_vit", {"num_classes": 5}, (160, 160), {"Conv2d": 1, "LayerNorm": 13, "Mlp": 6}, frozenset()),
}


def _model(name: str, options: dict[str, Any]) -> nn.Module:
    model = timm.create_model(name, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _outputs(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(image)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", _CASES)
def test_outputs_and_gradients_stay(case: str) -> None:
    name, options, size, replaced, operators = _CASES[case]
    model = _model(name, options)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    logits, gradients = _outputs(model, image)
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())

    report = vitrail.accelerate(model)
    assert Counter(report.replaced.values()) == replaced, report
    fast_logits, fast_gradients = _outputs(model, image)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast_gradients, gradients, rtol=1e-8, atol=1e-8)
    assert {op.op for _, op in vitrail.explain(model, image).rows} == operators
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)

    report.undo()
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model(image), logits, rtol=0, atol=0)


def test_a_second_call_finds_nothing_to_do() -> None:
    model = _model("swin_tiny_patch4_window7_224", {**_TINY_SWIN, "img_size": 32})
    first = vitrail.accelerate(model)
    assert Counter(first.replaced.values()) == _SWIN_PARTS
    assert not first.kept
    second = vitrail.accelerate(model)
    assert not second.replaced
    second.undo()
    assert any(isinstance(m, FusedSwinBlock) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {**_TINY_SWIN, "img_size": 32, "attn_drop_rate": 0.1},
            r"layers\.\*\.blocks\.\* +4 x kept: it drops attention weights \(attn_drop 0\.1\)",
        ),
        (
            "swin_tiny_patch4_window7_224",
            {**_TINY_SWIN, "img_size": 32, "embed_dim": 24},
            r"layers\.\*\.blocks\.\* +\d+ x kept: its heads have 24 channels",
        ),
        (
            "swin_tiny_patch4_window7_224",
            {**_TINY_SWIN, "img_size": 32, "embed_dim": 256, "num_heads": (8, 16)},
            r"layers\.\*\.blocks\.\*\.mlp +2 x kept: it is 512 channels wide; fused: up to 256",
        ),
        (
            "swin_tiny_patch4_window7_224",
            {**_TINY_SWIN, "img_size": 32, "in_chans": 5},
            r"patch_embed\.proj +1 x kept: its images have 5 channels; quicker: up to 4",
        ),
        ("convnext_atto", {}, r"stages\.\*\.blocks\.\*\.mlp +12 x kept: it is more than two linear layers"),
        ("test_vit", {}, r"blocks\.\*\.attn +6 x kept: no replacement is registered for timm"),
        ("davit_tiny", {**_TINY_DAVIT, "num_heads": (1, 4)}, r"\.attn +1 x kept: its heads have 8 channels"),
    ],
)
def test_says_what_it_kept_and_why(name: str, options: dict[str, Any], line: str) -> None:
    report = vitrail.accelerate(timm.create_model(name, **options))
    assert re.search(line, str(report)), report
    assert str(report).endswith(f"{len(report.replaced)} modules replaced, {len(report.kept)} kept")
    assert not report.replaced.keys() & report.kept.keys()


def test_leaves_other_convolutions_alone() -> None:
    model = timm.create_model("test_resnet")
    assert not vitrail.accelerate(model).replaced
    assert all(type(module) is not ImageConv2d for module in model.modules())


def test_registered_classes() -> None:
    with pytest.raises(TypeError, match="a subclass of SpatialBlock"):
        register_acceleration(SpatialBlock, FusedSwinBlock)
    assert str(vitrail.accelerate(nn.Linear(2, 2))) == "nothing found that could be replaced"
    assert issubclass(FusedSwinBlock, SwinTransformerBlock)


def test_compiles_into_one_graph() -> None:
    one_stage = {**_TINY_SWIN, "depths": (2,), "num_heads": (1,)}  # of a block that shifts and one that does not
    model = _model("swin_tiny_patch4_window7_224", {**one_stage, "img_size": 32}).float()
    image = torch.randn(1, 3, 32, 32)
    want = model(image)
    vitrail.accelerate(model)
    got = torch.compile(model, fullgraph=True, backend="eager")(image)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_numbers_of_tokens_make_no_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though one of DaViT's scales depends on it."""
    monkeypatch.setattr(
        dispatch.settings, "default_backend", "triton"
    )  # for which a scale is one of the graph's numbers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(ChannelAttentionV2(32, 2)).to(device)
    vitrail.accelerate(model)
    counter = CompileCounter()
    run = torch.compile(model, backend=counter)
    for n_tokens in (64, 72, 80, 99, 121):
        x = torch.randn(1, n_tokens, 32, device=device)
        torch.testing.assert_close(run(x), model(x))
    assert counter.frame_count == 2  # the second is for any number


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("case", ["swin", "swin, any size", "davit", "davit, second channel attention"])
def test_the_kernels_compute_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options, size, *_ = _CASES[case]
    model = _model(name, options).float()
    image = torch.randn(1, 3, *size)
    logits, gradients = _outputs(model, image)
    vitrail.accelerate(model)
    monkeypatch.setattr(dispatch.settings, "default_backend", "triton")
    if torch.cuda.is_available():
        model, image = model.cuda(), image.cuda()
    assert {choice.backend for _, choice in vitrail.explain(model, image).rows} == {"triton"}
    ours, our_gradients = _outputs(model, image)
    torch.testing.assert_close(ours.cpu(), logits, rtol=1e-4, atol=1e-4)
    for key, gradient in gradients.items():
        assert (our_gradients[key].cpu() - gradient).norm() <= 1e-3 * gradient.norm(), key


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(224, 224), (200, 332)], ids=str)
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "davit_tiny"])
def test_fused_kernels_compute_the_model(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32: a deep random network turns the rounding of half precision into logits of another kind.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # rounds the values that convolutions multiply
    options = {"strict_img_size": False} if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=10, **options).cuda().eval()
    image = torch.randn(2, 3, *size, device="cuda")
    logits, gradients = _outputs(model, image)
    vitrail.accelerate(model)
    assert {choice.backend for _, choice in vitrail.explain(model, image).rows} == {"triton"}
    ours, our_gradients = _outputs(model, image)
    assert (ours - logits).norm() <= 1e-4 * logits.norm()
    for key, gradient in gradients.items():
        assert (our_gradients[key] - gradient).norm() <= 1e-3 * gradient.norm(), key
