"""Attention, mixer and pooling of voxels against written-out definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitrail.layers.explain import explain
from vitrail.layers.scattered import CrossWindowFeedForward, PillarPooling, ScatteredLinearAttention
from vitrail.layers.voxels import SparseTensor

SHAPE = (4, 9, 10)


def draw_voxels(channels: int, share: float = 0.2) -> SparseTensor:
    coords = (torch.rand(2, *SHAPE) < share).nonzero()
    return SparseTensor.from_coords(torch.randn(len(coords), channels, dtype=torch.float64), coords, SHAPE, 2)


def test_attention_stays_inside_its_window() -> None:
    x = draw_voxels(8)
    layer = ScatteredLinearAttention(8, 2, 4, dtype=torch.float64)
    out = layer(x.features, x.sites)
    b, _, row, column = x.sites.coords.unbind(1)
    inside = (b == 1) & (row // 4 == 1) & (column // 4 == 1)
    changed = x.features.clone()
    changed[inside.nonzero()[0]] += 1
    difference = (layer(changed, x.sites) - out).abs().amax(1)
    assert (difference[inside] > 0).sum() > 1
    assert torch.equal(difference[~inside], torch.zeros_like(difference[~inside]))


def test_attention_is_its_definition() -> None:
    x = draw_voxels(8)
    layer = ScatteredLinearAttention(8, 2, 4, dtype=torch.float64)
    q, k, v = (t.unflatten(1, (2, 4)) for t in layer.qkv(x.features).chunk(3, 1))
    b, _, row, column = x.sites.coords.unbind(1)
    ids = (b * 100 + row // 4) * 100 + column // 4
    weights = torch.einsum("ihd,jhd->hij", q.relu(), k.relu()) * (ids[:, None] == ids)
    y = torch.einsum("hij,jhd->ihd", weights, v) / (weights.sum(2).T + 1e-6)[..., None]
    torch.testing.assert_close(layer(x.features, x.sites), layer.proj(y.flatten(1)))


def test_last_quarter_of_the_mixer_is_doubled() -> None:
    x = draw_voxels(8)
    layer = CrossWindowFeedForward(8, 5, dtype=torch.float64).eval()
    nn.init.zeros_(layer.fc2.weight)
    nn.init.zeros_(layer.fc2.bias)
    for conv in (layer.conv, layer.conv_x, layer.conv_y):
        nn.init.zeros_(conv.weight)
    want = layer.norm1(x.features)
    want[:, 6:] *= 2
    torch.testing.assert_close(layer(x.features, x.sites), want)


def test_pooling_is_multi_head_attention_in_every_pillar() -> None:
    x = draw_voxels(8, share=0.4)
    layer = PillarPooling(8, 4, num_heads=2, dtype=torch.float64)
    nn.init.normal_(layer.in_proj.bias)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    attention.in_proj_weight, attention.in_proj_bias = layer.in_proj.weight, layer.in_proj.bias
    attention.out_proj = layer.out_proj
    bev = layer(x)
    assert bev.shape == (2, 8, 9, 10)
    coords = x.sites.coords
    for b in range(2):
        for row in range(9):
            for column in range(10):
                here = (coords[:, [0, 2, 3]] == torch.tensor([b, row, column])).all(1)
                if not here.any():
                    assert not bev[b, :, row, column].any()
                    continue
                values = x.features[here]
                query, keys = values.amax(0, keepdim=True), values + layer.z_embed(coords[here, 1])
                want = layer.norm(attention(query[None], keys[None], values[None])[0][0, 0] + query[0])
                torch.testing.assert_close(bev[b, :, row, column], want)


def test_pooling_backpropagates() -> None:
    x = draw_voxels(4, share=0.15)
    layer = PillarPooling(4, 4, num_heads=2, dtype=torch.float64)
    features = x.features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: layer(SparseTensor(f, x.sites)).sum((2, 3)), features)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["empty", "full"])
def test_no_voxels_and_all(share: float) -> None:
    x = draw_voxels(8, share)
    features = x.features.requires_grad_()
    out = ScatteredLinearAttention(8, 2, 100, dtype=torch.float64)(features, x.sites)
    out = CrossWindowFeedForward(8, 5, dtype=torch.float64)(out, x.sites)
    bev = PillarPooling(8, 4, num_heads=2, dtype=torch.float64)(SparseTensor(out, x.sites))
    assert bev.shape == (2, 8, 9, 10)
    assert bev.any() == (share > 0)
    bev.sum().backward()
    assert features.grad.isfinite().all()


def test_operators_are_explained() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = ScatteredLinearAttention(8, 2, 4, dtype=torch.float64)
            self.mixer = CrossWindowFeedForward(8, 5, dtype=torch.float64)

        def forward(self, x: SparseTensor) -> torch.Tensor:
            return self.mixer(self.attn(x.features, x.sites), x.sites)

    rows = explain(Both(), draw_voxels(8)).rows
    assert [(name, choice.op) for name, choice in rows] == [
        ("attn", "scattered_linear_attention"),
        ("mixer", "mixed_depthwise_conv"),
    ]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dim is 8, num_heads 3"):
        ScatteredLinearAttention(8, 3, 4)
    with pytest.raises(ValueError, match="window_size is 0"):
        ScatteredLinearAttention(8, 2, 0)
    with pytest.raises(ValueError, match="dim is 6, kernel_size 5"):
        CrossWindowFeedForward(6, 5)
    with pytest.raises(ValueError, match="kernel_size 4"):
        CrossWindowFeedForward(8, 4)
    with pytest.raises(ValueError, match="depth 4; expected 5"):
        PillarPooling(8, 5)(draw_voxels(8))
