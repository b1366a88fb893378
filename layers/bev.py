"""A network on maps seen from above: encoder-decoders in series, all at one width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BevBlock", "BevEncoderDecoder", "CascadedBevBackbone"]

_EPS, _MOMENTUM = 1e-3, 0.01


class BevBlock(nn.Module):
    """Residual block of two 3x3 convolutions; with a stride, a 1x1 convolution on the shortcut.

    Args:
        dim: Channels.
        stride: Of the first convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, stride, 1, bias=False, device=device, dtype=dtype)
        self.bn1 = _norm(dim, device, dtype)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False, device=device, dtype=dtype)
        self.bn2 = _norm(dim, device, dtype)
        self.downsample_layer: nn.Module = nn.Identity()
        if stride != 1:
            shortcut = nn.Conv2d(dim, dim, 1, stride, bias=False, device=device, dtype=dtype)
            self.downsample_layer = nn.Sequential(shortcut, _norm(dim, device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample_layer(x)).relu()


class BevEncoderDecoder(nn.Module):
    """Three levels down by 2 and up again; each way up adds the level's map and normalises.

    Maps whose sides are no multiple of 4 work, too: what the way up makes larger than the level's map is cut off.

    Args:
        dim: Channels of all levels.
        blocks: Blocks of each level; the first of a level halves the map, save on the first level.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        blocks: tuple[int, ...] = (2, 2, 2),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.Sequential(*(BevBlock(dim, 2 if level and not i else 1, device, dtype) for i in range(count)))
            for level, count in enumerate(blocks)
        )
        ups = range(len(blocks) - 1)
        self.decoder = nn.ModuleList(_up(dim, device, dtype) for _ in ups)
        self.decoder_norm = nn.ModuleList(_norm(dim, device, dtype) for _ in ups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        skips: list[Tensor] = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        for up, norm, skip in zip(self.decoder, self.decoder_norm, reversed(skips[:-1]), strict=True):
            x = norm(up(x)[..., : skip.shape[-2], : skip.shape[-1]] + skip)
        return x


class CascadedBevBackbone(nn.Module):
    """Encoder-decoders in series (ScatterFormer's network from above; parameter names are those of its checkpoints).

    Args:
        dim: Channels in, between and out.
        depth: Encoder-decoders.
        blocks: Blocks of each level of an encoder-decoder.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int = 128,
        depth: int = 4,
        blocks: tuple[int, ...] = (2, 2, 2),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BevEncoderDecoder(dim, blocks, device, dtype) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


def _norm(dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=_EPS, momentum=_MOMENTUM, device=device, dtype=dtype)


def _up(dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Sequential:
    up = nn.ConvTranspose2d(dim, dim, 2, 2, bias=False, device=device, dtype=dtype)
    return nn.Sequential(up, _norm(dim, device, dtype), nn.ReLU())
