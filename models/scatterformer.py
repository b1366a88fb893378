"""ScatterFormer: voxels attend linearly inside windows of the bird's-eye view; the backbone of a LiDAR detector.

Paper: He et al., "ScatterFormer: Efficient Voxel Transformer with Scattered Linear Attention", arXiv 2401.00912.
Upstream: github.com/skyhehe123/ScatterFormer at a23f434 (Apache-2.0), an OpenPCDet fork.

Unlike the other models of the zoo it takes scans, not images, and returns one map seen from above. It is registered
with timm for its names, variants and checkpoints; timm's contract for image classifiers does not apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.layers.scattered import CrossWindowFeedForward, PillarPooling, ScatteredLinearAttention
from vitrail.layers.sparse import StridedConv3d, SubmanifoldConv3d
from vitrail.layers.voxels import SparseTensor, VoxelEncoder, VoxelGrid, VoxelNorm, VoxelSites
from vitrail.models._checkpoint import rename_keys, unwrap
from vitrail.models._weights import build_model_with_cfg

__all__ = ["ScatterFormer"]


class ResidualBlock(nn.Module):
    """Two submanifold convolutions with norms and a skip: (N, C) -> (N, C)."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = SubmanifoldConv3d(dim, dim, bias=True, **factory)
        self.bn1 = VoxelNorm(dim, **factory)
        self.conv2 = SubmanifoldConv3d(dim, dim, bias=True, **factory)
        self.bn2 = VoxelNorm(dim, **factory)

    def forward(self, features: Tensor, sites: VoxelSites) -> Tensor:
        x = self.bn1(self.conv1(features, sites)).relu()
        return (self.bn2(self.conv2(x, sites)) + features).relu()


class Stem(nn.Module):
    """Convolutions that encode positions, then half the height: voxels -> voxels."""

    def __init__(self, in_dim: int, dim: int, depth: int, **factory: Any) -> None:
        super().__init__()
        self.conv = SubmanifoldConv3d(in_dim, dim, **factory)
        self.norm = VoxelNorm(dim, **factory)
        self.blocks = nn.ModuleList(ResidualBlock(dim, **factory) for _ in range(depth))
        self.down = StridedConv3d(dim, dim, (3, 1, 1), (2, 1, 1), (0, 0, 0), **factory)
        self.down_norm = VoxelNorm(dim, **factory)

    def forward(self, x: SparseTensor) -> SparseTensor:
        features = self.norm(self.conv(x.features, x.sites)).relu()
        for block in self.blocks:
            features = block(features, x.sites)
        x = self.down(SparseTensor(features, x.sites))
        return SparseTensor(self.down_norm(x.features).relu(), x.sites)


class Block(nn.Module):
    """Attention inside windows, then the mixer across them: (N, C) -> (N, C)."""

    def __init__(self, dim: int, num_heads: int, window_size: int, kernel_size: int, **factory: Any) -> None:
        super().__init__()
        self.norm = VoxelNorm(dim, **factory)
        self.attn = ScatteredLinearAttention(dim, num_heads, window_size, **factory)
        self.mixer = CrossWindowFeedForward(dim, kernel_size, **factory)

    def forward(self, features: Tensor, sites: VoxelSites) -> Tensor:
        return self.mixer(features + self.attn(self.norm(features), sites), sites)


class Stage(nn.Module):
    """Blocks on the same voxels, a norm, and, but for the last stage, a strided convolution: voxels -> voxels."""

    def __init__(self, dim: int, blocks: Sequence[Block], downsample: bool, **factory: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = VoxelNorm(dim, **factory)
        self.down = StridedConv3d(dim, dim, **factory) if downsample else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: SparseTensor) -> SparseTensor:
        features = x.features
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                features = checkpoint(block, features, x.sites, use_reentrant=False)
            else:
                features = block(features, x.sites)
        return self.down(SparseTensor(self.norm(features), x.sites))


class ScatterFormer(nn.Module):
    """Backbone from point clouds to a map seen from above.

    Args:
        in_chans: Values of a point, (x, y, z) first.
        num_classes: 0: detectors put a head behind it.
        low: Lower corner (x, y, z) of the space that is seen, in metres.
        high: Upper corner (x, y, z).
        voxel_size: Edges of a voxel along (x, y, z), in metres.
        voxel_dim: Channels that the voxel encoder gives.
        dim: Channels of all stages and of the map.
        num_heads: Attention heads.
        stem_depth: Residual blocks of the stem.
        depths: Blocks of each stage; from one stage to the next every axis is halved.
        window_size: Edge of an attention window in voxels; the long kernels have the next odd length.
        pool_heads: Heads of the attention along the height.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        grid: The voxels.
        num_features: Channels of the map.
        stride: Voxels along x and y that become one cell of the map.
        map_size: Height (along y) and width (along x) of the map.

    Raises:
        ValueError: A count or size is out of range.
    """

    def __init__(
        self,
        in_chans: int = 4,
        num_classes: int = 0,
        low: Sequence[float] = (0.0, -40.0, -3.0),
        high: Sequence[float] = (70.4, 40.0, 1.0),
        voxel_size: Sequence[float] = (0.2, 0.2, 0.125),
        voxel_dim: int = 64,
        dim: int = 128,
        num_heads: int = 4,
        stem_depth: int = 3,
        depths: Sequence[int] = (3, 3),
        window_size: int = 12,
        pool_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes != 0:
            raise ValueError(f"num_classes is {num_classes}; allowed: 0, a backbone of detectors has no classifier")
        if not depths or min(depths) < 1:
            raise ValueError(f"depths is {tuple(depths)}; allowed: at least one stage, at least 1 block each")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid = VoxelGrid(*(tuple(corner) for corner in (low, high, voxel_size)))
        self.num_features = dim
        self.stride = 2 ** (len(depths) - 1)
        self.grad_checkpointing = False
        self.encoder = VoxelEncoder(in_chans, voxel_dim, **factory)
        self.stem = Stem(voxel_dim, dim, stem_depth, **factory)
        kernel_size = window_size + 1 - window_size % 2
        stages = []
        for index, depth in enumerate(depths):
            blocks = [Block(dim, num_heads, window_size, kernel_size, **factory) for _ in range(depth)]
            stages.append(Stage(dim, blocks, index + 1 < len(depths), **factory))
        self.stages = nn.ModuleList(stages)
        shape = self.stem.down.out_shape(self._sparse_shape())
        for stage in stages[:-1]:
            shape = stage.down.out_shape(shape)
        if min(shape) < 1:
            raise ValueError(f"a grid of {self.grid.shape} voxels (z, y, x) is too small for {len(depths)} stages")
        self.map_size = shape[1:]
        self.pool = PillarPooling(dim, shape[0], pool_heads, **factory)
        self.feature_info = [{"num_chs": dim, "reduction": self.stride, "module": "pool"}]

    def forward_voxels(self, x: SparseTensor) -> list[SparseTensor]:
        """Encoded voxels -> voxels after the stem and after every stage, each on the grid that the next one sees.

        Raises:
            ValueError: The grid is not (nz, ny, nx) or (nz + 1, ny, nx) voxels of this model.
        """
        shape = self._sparse_shape()
        if x.sites.shape not in (shape, self.grid.shape):
            raise ValueError(f"voxels of a grid {x.sites.shape}; expected {self.grid.shape}")
        keys = x.sites.keys
        if x.sites.shape != shape:
            # The released code puts an empty layer above the grid.
            keys = keys + keys // (x.sites.shape[0] * shape[1] * shape[2]) * (shape[1] * shape[2])
        sites = VoxelSites(keys, shape, x.sites.batch_size)
        self._find_sites(sites)
        found = [self.stem(SparseTensor(x.features, sites))]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found

    def forward_features(self, points: Sequence[Tensor]) -> SparseTensor:
        """Scans, one (P_i, in_chans) tensor each -> voxels after the last stage."""
        return self.forward_voxels(self.encoder(points, self.grid))[-1]

    def forward(self, points: Sequence[Tensor]) -> Tensor:
        """Scans -> the map seen from above, (B, dim, ny / stride, nx / stride), 0 where no voxel is.

        Args:
            points: One (P_i, in_chans) tensor a scan, (x, y, z) first, in metres. Points outside of the grid and
                points with a value that is not finite are left out; a scan may be empty.
        """
        return self.pool(self.forward_features(points))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: recomputes every block's activations in the backward pass."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameter names into groups from input to output, for layer-wise learning rates."""
        per_block = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.(norm|down)", (9999,))]
        blocks = r"^stages\.(\d+)" if coarse else [*per_block, (r"^pool", (99999,))]
        return {"stem": r"^(encoder|stem)", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that recipes exempt from weight decay, besides norms and biases."""
        return {"pool.z_embed.weight"}

    def _find_sites(self, sites: VoxelSites) -> None:
        """Finds the voxels of all stages at once, which keep them.

        All that waits for the device does so here, before features are computed: behind, calls are queued far ahead.
        """
        for conv in (self.stem.down, *(stage.down for stage in self.stages[:-1])):
            sites, _ = sites.strided(conv.kernel_size, conv.stride, conv.padding)
        sites.pillars()

    def _sparse_shape(self) -> tuple[int, int, int]:
        depth, height, width = self.grid.shape
        return depth + 1, height, width


_OFFICIAL_KEYS = (
    (r"^vfe\.pfn_layers\.", "encoder.layers."),
    (r"^backbone_3d\.", ""),
    (r"^cpe\.0\.0\.", "stem.conv."),
    (r"^cpe\.0\.1\.", "stem.norm."),
    (r"^cpe\.4\.0\.", "stem.down."),
    (r"^cpe\.4\.1\.", "stem.down_norm."),
    (r"^cpe\.1\.", "stem.blocks.0."),
    (r"^cpe\.2\.", "stem.blocks.1."),
    (r"^cpe\.3\.", "stem.blocks.2."),
    (r"^stage1\.", "stages.0."),
    (r"^stage2\.", "stages.1."),
    (r"^(stages\.\d+)\.0\.norm_layers\.(\d+)\.", r"\1.blocks.\2.norm."),
    (r"^(stages\.\d+)\.0\.attn_layers\.(\d+)\.", r"\1.blocks.\2.attn."),
    (r"^(stages\.\d+)\.0\.cffn_layers\.(\d+)\.", r"\1.blocks.\2.mixer."),
    (r"^(stages\.\d+)\.1\.", r"\1.norm."),
    (r"^(stages\.\d+)\.2\.", r"\1.down."),
    (r"\.mixer\.bn\.", ".mixer.norm1."),
    (r"\.mixer\.bn2\.", ".mixer.norm2."),
    (r"\.mixer\.conv_k\.", ".mixer.conv."),
    (r"\.mixer\.conv_h\.", ".mixer.conv_x."),  # upstream's h is the last axis
    (r"\.mixer\.conv_w\.", ".mixer.conv_y."),
    (r"^app\.self_attn\.in_proj_", "pool.in_proj."),
    (r"^app\.self_attn\.", "pool."),
    (r"^app\.pos_embedding\.", "pool.z_embed."),
    (r"^app\.", "pool."),
)
_OFFICIAL_PARTS = ("vfe.", "backbone_3d.")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames the parameters of an official checkpoint; own names pass unchanged.

    Of a whole detector (keys under `backbone_3d.`) the voxel encoder and the 3D backbone are taken, no head.

    Args:
        state_dict: Checkpoint of the authors, its 3D backbone alone, or one of this model; alone or under
            "model_state", "state_dict" or "model".
        model: The model that will load it.
    """
    weights = unwrap(state_dict.get("model_state", state_dict))
    if any(key.startswith("backbone_3d.") for key in weights):
        weights = {key: value for key, value in weights.items() if key.startswith(_OFFICIAL_PARTS)}
    return rename_keys(weights, _OFFICIAL_KEYS)


_VARIANTS: dict[str, dict[str, Any]] = {
    "scatterformer_kitti_n": {
        "voxel_size": (0.4, 0.4, 0.25), "voxel_dim": 32, "dim": 64, "num_heads": 2, "stem_depth": 1,
        "depths": (1, 1), "window_size": 8,
    },
    "scatterformer_kitti": {"voxel_size": (0.2, 0.2, 0.125), "window_size": 16},
    "scatterformer_nuscenes": {
        "in_chans": 5, "low": (-54.0, -54.0, -5.0), "high": (54.0, 54.0, 3.0), "voxel_size": (0.3, 0.3, 0.2),
        "window_size": 20,
    },
    "scatterformer_waymo": {
        "in_chans": 5, "low": (-76.8, -76.8, -2.0), "high": (76.8, 76.8, 4.0), "voxel_size": (0.32, 0.32, 0.1875),
        "window_size": 12,
    },
}  # fmt: skip


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": -1,  # no classifier: timm then passes no number to the model
        "input_size": None,
        "license": "apache-2.0",
        "origin_url": "https://github.com/skyhehe123/ScatterFormer",
        "paper_ids": "arXiv:2401.00912",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in _VARIANTS})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ScatterFormer:
    if kwargs.pop("features_only", False):
        raise NotImplementedError(f"{variant}: features_only is given; a point-cloud backbone returns a single map")
    return build_model_with_cfg(
        ScatterFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def scatterformer_kitti_n(pretrained: bool = False, **kwargs: Any) -> ScatterFormer:
    """A small ScatterFormer of ours on a coarse grid of KITTI's field of view."""
    return _create("scatterformer_kitti_n", pretrained, **kwargs)


@register_model
def scatterformer_kitti(pretrained: bool = False, **kwargs: Any) -> ScatterFormer:
    """ScatterFormer on a grid of ours for KITTI: x 0 to 70.4 m, y -40 to 40 m, voxels of 0.2 m."""
    return _create("scatterformer_kitti", pretrained, **kwargs)


@register_model
def scatterformer_nuscenes(pretrained: bool = False, **kwargs: Any) -> ScatterFormer:
    """The authors' ScatterFormer for nuScenes: +-54 m, voxels of 0.3 m, window 20."""
    return _create("scatterformer_nuscenes", pretrained, **kwargs)


@register_model
def scatterformer_waymo(pretrained: bool = False, **kwargs: Any) -> ScatterFormer:
    """The authors' ScatterFormer for Waymo: +-76.8 m, voxels of 0.32 m, window 12."""
    return _create("scatterformer_waymo", pretrained, **kwargs)
