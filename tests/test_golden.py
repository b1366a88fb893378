"""The golden files' own loader, checked with an implementation that is known to agree: timm's DaViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from _golden import load_case, relative_error
from timm.models.davit import checkpoint_filter_fn


@pytest.mark.slow
def test_timm_davit_agrees_with_the_official_outputs(golden_dir: Path) -> None:
    case = load_case(golden_dir, "davit_tiny")
    kwargs = {"depths": tuple(case.info["constructor"]["depths"])}
    model = timm.create_model("davit_tiny", **kwargs).double().eval()
    model.load_state_dict(checkpoint_filter_fn(case.weights, model))
    with torch.no_grad():
        final, maps = model.forward_intermediates(case.image)
    outputs = {"logits": model.forward_head(final), **{f"stage{i}": x for i, x in enumerate(maps)}}
    assert max(case.relative_errors(outputs).values()) < 1e-9


def test_error_is_not_hidden(golden_dir: Path) -> None:
    case = load_case(golden_dir, "na2d_k7")
    want = case.expected["out"]
    assert set(case.inputs) == {"q", "k", "v"}
    assert case.relative_errors({"out": want}) == {"out": 0.0}
    assert case.relative_errors({"out": want + case.scale("out") * 1e-3})["out"] == pytest.approx(1e-3)
    assert relative_error(want * float("nan"), want, 1.0) == float("inf")
