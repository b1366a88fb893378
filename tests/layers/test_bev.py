"""The network on maps from above against the official one, and on awkward sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _golden import load_case

from vitrail.layers.bev import CascadedBevBackbone


def test_computes_what_the_official_one_does(golden_dir: Path) -> None:
    case = load_case(golden_dir, "scatterformer_bev_ded")
    model = CascadedBevBackbone(dtype=torch.float64).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == case.info["params"] == 7_751_680
    loaded = model.load_state_dict(case.weights, strict=False)
    assert not loaded.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    with torch.inference_mode():
        out = model(case.image)
    assert out.shape == case.image.shape
    (name,) = (key for key in case.expected if not key.endswith(("_mean", "_std")))
    assert max(case.relative_errors({name: out}).values()) < 1e-10


@pytest.mark.parametrize("size", [(1, 1), (5, 6), (12, 7), (16, 16)])
def test_any_size(size: tuple[int, int]) -> None:
    model = CascadedBevBackbone(8, depth=2, blocks=(1, 1, 1)).eval()
    x = torch.randn(2, 8, *size, requires_grad=True)
    y = model(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.isfinite().all()
