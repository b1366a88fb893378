"""What every hierarchical backbone of the zoo shares: the stage, and timm's model contract on top of four attributes.

A family's model class derives from `HierarchicalBackbone`, builds `stem`, `stages`, `norm` and `head`, and inherits
the feature, pruning, classifier and checkpointing interface that timm's users and tools expect.
"""

# No `from __future__ import annotations`: torch.fx copies `forward`'s annotations as they are, and TorchScript, which
# compiles traced models, knows types but not their names.
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, List, Optional, Tuple, Union  # noqa: UP035 -- TorchScript reads the annotations of some methods

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import ClassifierHead
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitrail.kernels._common.recording import is_padded, padding_to


@torch.fx.wrap  # a size that decides whether to pad cannot be traced; a module that imports it must wrap it too
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pads (B, C, H, W) with zeros at the bottom and right to multiples of `multiple`."""
    pad_h = padding_to(x.shape[2], multiple)
    pad_w = padding_to(x.shape[3], multiple)
    if torch.jit.is_scripting():
        padded = pad_h > 0 or pad_w > 0
    else:
        padded = is_padded((pad_h, pad_w))
    return F.pad(x, (0, pad_w, 0, pad_h)) if padded else x


def check_stages(depths: Sequence[int], dims: Sequence[int], **others: Sequence[Any]) -> None:
    """Raises `ValueError` unless all lists have an entry for every stage, and depths, dims and heads are positive."""
    given = {"depths": depths, "dims": dims, **others}
    if not depths or len({len(values) for values in given.values()}) > 1:
        listed = ", ".join(f"{name} {tuple(values)}" for name, values in given.items())
        raise ValueError(f"{listed} must have one entry a stage")
    for name, values in given.items():
        if name in ("depths", "dims", "num_heads") and min(values) < 1:
            raise ValueError(f"{name} is {tuple(values)}; allowed: at least 1 each")


def check_drop_path(drop_path_rate: float) -> None:
    """Raises `ValueError` unless the rate is a chance below 1."""
    if not 0.0 <= drop_path_rate < 1.0:
        raise ValueError(f"drop_path_rate is {drop_path_rate}; allowed: 0 <= drop_path_rate < 1")


class Stage(nn.Module):
    """Downsampling followed by blocks.

    Takes and returns (B, C, H, W). The blocks see (B, H, W, C); the turn back is a view, so that a channels-last map
    travels from stage to stage without a copy.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class HierarchicalBackbone(nn.Module):
    """A stem, stages, a final norm and a classifier head, with timm's model contract.

    Derived classes call this constructor, then set:

    - `stem`: image (B, in_chans, H, W) -> (B, dims[0], H', W');
    - `stages`: `nn.Sequential` of modules from map to map, one for each entry of `dims`;
    - `norm`: on the last map, or identity where the head normalises after pooling;
    - `head`: a timm classifier head with `reset`, `global_pool`, `fc` and `num_features`.

    Args:
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for pooled features.
        dims: Channels of each stage.
        reductions: Stride of each stage's output against the image.
        drop_rate: Dropout before the classifier, in [0, 1).

    Raises:
        ValueError: A count or rate is out of range.
    """

    if TYPE_CHECKING:  # TorchScript would take the annotations for types of attributes
        stem: nn.Module
        stages: nn.Sequential
        norm: nn.Module
        head: nn.Module

    def __init__(
        self, in_chans: int, num_classes: int, dims: Sequence[int], reductions: Sequence[int], drop_rate: float
    ) -> None:
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}; allowed: at least 1")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; allowed: 0 (no classifier) or more")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate is {drop_rate}; allowed: 0 <= drop_rate < 1")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the authors' recipes exempt from weight decay, besides norms and biases."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameter names into groups from input to output, for layer-wise learning rates."""
        per_block = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else per_block}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: recomputes every block's activations in the backward pass."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer (identity where `num_classes` is 0)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:  # noqa: UP045
        """Replaces the classifier.

        Args:
            num_classes: New number of classes; 0 removes the classifier.
            global_pool: New pooling ("avg", "max", ...); "" keeps the map; None keeps the present pooling.

        Raises:
            ValueError: `num_classes` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; allowed: 0 (no classifier) or more")
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)
        # timm 1.0.29's simplest head has no count of its own: it pools the map's channels.
        self.head_hidden_size = getattr(self.head, "num_features", self.num_features)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,  # noqa: UP006, UP007, UP045
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:  # noqa: UP006, UP007
        """Returns the maps after chosen stages.

        Args:
            x: Image, (B, in_chans, H, W).
            indices: Stages to return: the last n if an int, all if None.
            norm: Apply the final norm to the last stage's map.
            stop_early: Do not run stages behind the last chosen one.
            output_fmt: Only "NCHW".
            intermediates_only: Return the list alone, without the final map.

        Raises:
            ValueError: `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed: 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        # TorchScript cannot slice a Sequential.
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: max_index + 1]
        intermediates = []
        x = self.stem(x)
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == last_index else x)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == last_index:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what `forward_intermediates(indices=...)` does not need; returns the stages' absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()  # it belongs to the last stage's map
        if prune_head or shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
            self.num_classes = 0
            self.head = ClassifierHead(self.num_features, 0, pool_type="").train(self.training)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> last map (B, num_features, h, w)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map -> logits (B, num_classes), or what the classifier would see with `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
