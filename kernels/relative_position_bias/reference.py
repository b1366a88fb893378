"""The relative position bias in plain PyTorch: the definition that fused kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def relative_position_bias_reference(table: Tensor, window_size: Sequence[int]) -> Tensor:
    """Looks up the offset of every query from every key.

    See `vitrail.kernels.relative_position_bias.relative_position_bias` for the arguments.
    """
    height, width = window_size
    heads = table.shape[1]
    # Sliding windows over the table hold the offsets y + (height - 1 - y'); the flip turns them into y - y'. Unlike
    # indexing, its backward is deterministic and cheap.
    grid = table.reshape(2 * height - 1, 2 * width - 1, heads).unfold(0, height, 1).unfold(1, width, 1)
    return grid.flip(3, 4).permute(2, 0, 1, 3, 4).reshape(heads, height * width, height * width)
