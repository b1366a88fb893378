"""Public function of the relative position bias: meaning, argument checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitrail.kernels._common.checks import check_dims, check_floating, check_shape, to_pair
from vitrail.kernels._common.dispatch import choose_backend
from vitrail.kernels._common.shortcut import shortened
from vitrail.kernels.relative_position_bias.op import fused_support, run_relative_position_bias
from vitrail.kernels.relative_position_bias.reference import relative_position_bias_reference

_NAME = "relative_position_bias"


@shortened
def relative_position_bias(table: Tensor, window_size: int | Sequence[int], *, backend: str = "auto") -> Tensor:
    r"""Spreads Swin's table of relative positions over all pairs of tokens of a window (arXiv 2103.14030, eq. 4).

    :math:`b_{h,(y,x),(y',x')} = t_{(y - y',\, x - x'),h}`. PyTorch's own steps take two small kernels forward and five
    backward, whose launches a model waits for that is no CUDA graph; here it is one kernel each.

    Args:
        table: One row for each offset of a query (y, x) from a key (y', x'), raster order over (y - y', x - x') from
            the most negative: ((2 h - 1) * (2 w - 1), heads), any floating dtype.
        window_size: Height h and width w in tokens.
        backend: "auto", "eager" or "triton"; see `vitrail.kernels._common.dispatch`.

    Returns:
        (heads, h * w, h * w) in the table's dtype, also under autocast: row the query's, column the key's raster
        position.

    Raises:
        TypeError: `table` is not floating point.
        ValueError: `window_size` is not positive, or does not fit the table.
        NotImplementedError: `backend="triton"` and the kernel cannot compute this call.
    """
    window = to_pair(_NAME, "window_size", window_size, 1)
    check_dims(_NAME, "table", table, "((2 h - 1) * (2 w - 1), heads)")
    check_shape(_NAME, "table", table, ((2 * window[0] - 1) * (2 * window[1] - 1), table.shape[1]))
    check_floating(_NAME, table=table)
    if choose_backend(_NAME, backend, fused_support(table, window), table) == "triton":
        return run_relative_position_bias(table, window)
    return relative_position_bias_reference(table, window)
