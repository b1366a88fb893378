"""VWFormer as the authors compute it: every context unfolded and projected, maps enlarged and concatenated first.

Written out from the paper's description with the parameters of our modules, for maps at strides that differ by 2 and
at least 8 x 8 tokens at stride 8. Slow and large; our form must give the same numbers. Tests compare with it, and
`vitrail-benchmark --heads` tells what the difference in work is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.varying_window import VaryingWindowAttention
from vitrail.models.vwformer import ConvNormAct, MergeConv, VWDecoder


def literal_attention(layer: VaryingWindowAttention, x: Tensor) -> Tensor:
    """Varying window attention of (B, C, H, W), H and W multiples of the number of windows."""
    ratio, n = layer.ratio, layer.n_windows
    height, width = x.shape[2] // n, x.shape[3] // n  # of a query window
    before, after = ratio // 2 - 1, ratio // 2
    context = layer.reduce_norm(layer.reduce(F.pad(x, (before, after, before, after)))).relu()
    for dim, window in ((3, width), (2, height)):
        context = _copy_shift(context, window, ratio, dim)
    context = context.unfold(2, ratio * height, height).unfold(3, ratio * width, width)[:, :, :n, :n]
    tokens = context.reshape(*context.shape[:4], height, ratio, width, ratio)
    tokens = tokens.permute(0, 2, 3, 4, 6, 5, 7, 1).flatten(5).flatten(3, 4).flatten(0, 2)  # (B * n * n, T, (i, j, c))
    weight = layer.kv.weight.permute(0, 2, 3, 1).flatten(1)
    k, v = F.linear(tokens, weight, layer.kv.bias).chunk(2, -1)
    q = x.unflatten(2, (n, height)).unflatten(4, (n, width)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
    q = F.linear(q, layer.q.weight.flatten(1), layer.q.bias)
    q, k, v = (t.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2) for t in (q, k, v))
    y = (q @ k.transpose(2, 3) * layer.head_dim**-0.5).softmax(-1) @ v
    y = y.transpose(1, 2).flatten(2).reshape(x.shape[0], n, n, height, width, -1)
    y = y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    y = layer.norm(layer.proj(y))
    return x + y if layer.shortcut else y


def _copy_shift(x: Tensor, window: int, ratio: int, dim: int) -> Tensor:
    size, skipped = x.shape[dim], (ratio + 1) * window // 2
    spans = ((skipped, ratio * window), (0, size), (size - ratio * window, size - skipped))
    return x.index_select(dim, torch.cat([torch.arange(*span, device=x.device) for span in spans]))


def literal_decoder(decoder: VWDecoder, maps: Sequence[Tensor]) -> Tensor:
    """Mask features, or what a classifier sees, of maps at strides 4, 8, 16 and 32."""
    c1, c2, c3, c4 = maps
    levels = [_project(decoder, f"project{i}", x) for i, x in ((4, c4), (3, c3), (2, c2))]
    x = _merge(decoder, decoder.fuse, levels)
    branches = [decoder.short_path(x, decoder.tied_norm)]
    if decoder.image_pool is not None:
        pooled = decoder.image_pool(F.adaptive_avg_pool2d(x, 1), decoder.tied_norm)
        branches.append(pooled.expand_as(branches[0]))
    branches += [literal_attention(layer, x) for layer in decoder.attentions]
    x = _merge(decoder, decoder.merge, branches)
    return _merge(decoder, decoder.refine, [x, _project(decoder, "project1", c1)])


def _project(decoder: VWDecoder, name: str, x: Tensor) -> Tensor:
    module = getattr(decoder, name)
    return module(x, decoder.tied_norm) if isinstance(module, ConvNormAct) else module(x)


def _merge(decoder: VWDecoder, merge: MergeConv, maps: Sequence[Tensor]) -> Tensor:
    size = maps[-1].shape[2:]
    corners = False if merge.mode == "bilinear" else None
    whole = torch.cat([F.interpolate(x, size, mode=merge.mode, align_corners=corners) for x in maps], 1)
    x = F.conv2d(whole, torch.cat([conv.weight for conv in merge.convs], 1))
    norm = decoder.tied_norm if merge.norm is None else merge.norm
    return norm(x).relu()
