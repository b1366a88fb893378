"""Backbones for dense prediction against the official ones, and how they take weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from _golden import load_case

import vitrail  # noqa: F401 -- registers the models
from vitrail.models._dense import DenseBackbone, checkpoint_filter_fn

_CASES = {
    "biformer_tiny_det_200x264": ("biformer_t", {"n_win": 16}),
    "biformer_tiny_seg_200x264": ("biformer_t", {"n_win": 8}),
    "davit_tiny_det_200x264": ("davit_t", {}),
}


@pytest.mark.parametrize("name", _CASES)
def test_golden(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    model_name, kwargs = _CASES[name]
    backbone = DenseBackbone(timm.create_model(model_name, dtype=torch.float64, **kwargs)).eval()
    weights = checkpoint_filter_fn({"model": case.weights}, backbone)
    # Strict but for the integer counters of batch norm, which the golden files leave out.
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        double, single = backbone(case.image), backbone.float()(case.image.float())
    errors = case.relative_errors({f"stage{i}": x for i, x in enumerate(double)})
    assert len(errors) == 4
    assert max(errors.values()) < 1e-8, errors
    # Twice the worst of the official float32 runs of these cases.
    assert max(case.relative_errors({f"stage{i}": x for i, x in enumerate(single)}).values()) < 5e-6


def _nano(**kwargs: object) -> DenseBackbone:
    return DenseBackbone(timm.create_model("biformer_n"), **kwargs)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0,)])
def test_no_parameter_is_unused(indices: tuple[int, ...]) -> None:
    backbone = _nano(out_indices=indices)
    maps = backbone(torch.randn(2, 3, 40, 56))
    assert [x.shape[1] for x in maps] == backbone.channels
    assert [-(-40 // r) for r in backbone.reductions] == [x.shape[2] for x in maps]
    # A plain sum behind a LayerNorm has no gradient.
    sum(x.pow(3).sum() for x in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_norms_are_not_fed_forward() -> None:
    backbone = _nano().eval()
    image = torch.randn(1, 3, 32, 32)
    before = backbone(image)
    torch.nn.init.zeros_(backbone.norms["0"].weight)
    after = backbone(image)
    assert not after[0].any()
    assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2)])
def test_classifier_weights_leave_the_norms_alone(indices: tuple[int, ...]) -> None:
    classifier, backbone = timm.create_model("biformer_n").eval(), _nano(out_indices=indices).eval()
    torch.nn.init.constant_(backbone.norms["1"].bias, 7.0)
    backbone.load_state_dict(checkpoint_filter_fn(classifier.state_dict(), backbone))
    image = torch.randn(1, 3, 32, 32)
    maps = classifier.forward_intermediates(image, list(indices), intermediates_only=True)
    for norm, got, want in zip(backbone.norms.values(), backbone(image), maps, strict=True):
        torch.testing.assert_close(got, norm(want))


def test_own_checkpoint_passes_unchanged() -> None:
    backbone = _nano()
    weights = dict(reversed(backbone.state_dict().items()))
    assert list(checkpoint_filter_fn(weights, backbone)) == list(weights)


def test_missing_and_extra_keys_are_named() -> None:
    backbone = _nano()
    weights = timm.create_model("biformer_n").state_dict()
    del weights["stages.0.blocks.0.norm1.weight"]
    weights["stages.0.surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"norm1\.weight(.|\n)*surplus"):
        backbone.load_state_dict(checkpoint_filter_fn(weights, backbone))


@pytest.mark.parametrize("indices", [(), (1, 0), (0, 4), (-1,), (1, 1)])
def test_bad_indices_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="out_indices"):
        _nano(out_indices=indices)
