"""The window attention layer against timm's Swin, and against the official padding written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _graphs import keep_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features_fx import is_notrace_module
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from vitrail.kernels._common import dispatch
from vitrail.layers.window import WindowAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, HEADS = 12, 3


def swin_attention(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """Swin's padding, roll, mask and attention on (B, H, W, C), as its authors order them: the padding first.

    timm's block rolls the unpadded map and pads afterwards; given a padded map it follows the authors.
    """
    height, width = x.shape[1:3]
    pad_h, pad_w = -height % block.window_size[0], -width % block.window_size[1]
    return block._attn(F.pad(x, (0, 0, 0, pad_w, 0, pad_h)))[:, :height, :width]


def make_pair(
    window: tuple[int, int], shift: tuple[int, int], qkv_bias: bool = True
) -> tuple[SwinTransformerBlock, WindowAttention]:
    """timm's block and our layer with the same random weights, float64."""
    theirs = SwinTransformerBlock(
        DIM,
        input_resolution=(224, 224),
        num_heads=HEADS,
        window_size=window,
        shift_size=shift,
        qkv_bias=qkv_bias,
        always_partition=True,
        dynamic_mask=True,
        dtype=torch.float64,
    )
    ours = WindowAttention(DIM, HEADS, window, shift, qkv_bias=qkv_bias, rel_pos_bias=True, dtype=torch.float64)
    for parameter in theirs.attn.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.attn.state_dict())
    return theirs, ours


@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    window=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    shifted=st.booleans(),
    qkv_bias=st.booleans(),
)
def test_equals_swin(size: tuple[int, int], window: tuple[int, int], shifted: bool, qkv_bias: bool) -> None:
    # timm's mask needs a shift in both directions or in none.
    shifted = shifted and min(window) > 1
    theirs, ours = make_pair(window, (window[0] // 2, window[1] // 2) if shifted else (0, 0), qkv_bias)
    x = torch.randn(2, *size, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x), swin_attention(theirs, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(14, 14), (28, 28), (15, 23)], ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=["plain", "shifted"])
def test_gradients_equal_swin(size: tuple[int, int], shift: tuple[int, int]) -> None:
    theirs, ours = make_pair((7, 7), shift)
    x, y = (torch.randn(1, *size, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    ours(x).square().sum().backward()
    swin_attention(theirs, y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    other = dict(theirs.attn.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no-bias"])
def test_padding_is_that_of_the_input(qkv_bias: bool) -> None:
    layer = WindowAttention(DIM, HEADS, (4, 5), qkv_bias=qkv_bias, dtype=torch.float64)
    if qkv_bias:
        nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, 6, 7, DIM, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 3, 0, 2))  # to 8 x 10, four windows
    for rows, columns in ((slice(0, 4), slice(0, 5)), (slice(4, 8), slice(5, 10))):
        tokens = padded[:, rows, columns].flatten(1, 2)
        q, k, v = layer.qkv(tokens).view(2, 20, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (DIM // HEADS) ** -0.5).softmax(-1)
        want = layer.proj((weights @ v).transpose(1, 2).flatten(2)).view(2, 4, 5, DIM)
        got = layer(x)[:, rows, columns]
        torch.testing.assert_close(got, want[:, : got.shape[1], : got.shape[2]], rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_windows_that_fit_have_no_padding_to_write_gradients_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator would write zeros; the reference's steps leave out what is not used anyway."""
    monkeypatch.setattr(dispatch.settings, "default_backend", "triton")
    layer = WindowAttention(32, 2, 4, shift_size=2).to(DEVICE)
    backend, graphs = keep_graphs()
    for size, padded in (((8, 12), False), ((8, 13), True)):
        graphs.clear()
        torch._dynamo.reset()
        torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(1, *size, 32, device=DEVICE)).sum().backward()
        assert ("aten.select_backward.default" in graphs[1]) == padded


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_sizes_make_no_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where attention is one node; the reference's steps depend on the padding."""
    monkeypatch.setattr(dispatch.settings, "default_backend", "triton")
    layer = WindowAttention(32, 2, 4, shift_size=2, rel_pos_bias=True).to(DEVICE)
    counter = CompileCounter()
    run = torch.compile(layer, backend=counter, fullgraph=True)
    for size in ((8, 12), (9, 16), (12, 20), (15, 17), (16, 13)):
        x = torch.randn(1, *size, 32, device=DEVICE)
        torch.testing.assert_close(run(x), layer(x))
    assert counter.frame_count == 2  # the second is for any size


@pytest.mark.parametrize("rel_pos_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["qkv-bias", "no-qkv-bias"])
def test_scripts_and_is_a_leaf_for_tracing(rel_pos_bias: bool, qkv_bias: bool) -> None:
    layer = WindowAttention(DIM, HEADS, 3, 1, qkv_bias=qkv_bias, rel_pos_bias=rel_pos_bias)
    x = torch.randn(2, 5, 7, DIM)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    assert is_notrace_module(WindowAttention)


def test_factory_arguments_reach_every_parameter() -> None:
    layer = WindowAttention(DIM, HEADS, 3, rel_pos_bias=True, proj_bias=False, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert not list(layer.buffers())
    assert layer.proj.bias is None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dim is 10, num_heads 4"):
        WindowAttention(10, 4, 7)
    with pytest.raises(ValueError, match="window_size is 0"):
        WindowAttention(8, 4, 0)
    with pytest.raises(ValueError, match=r"shift_size is \(7, 7\)"):
        WindowAttention(8, 4, 7, 7)
