"""Half precision on the GPU: outputs and gradients of the small models stay finite, also at detection size."""

from __future__ import annotations

import pytest
import timm
import torch

import vitrail  # noqa: F401 -- registers the models

MODELS = ("biformer_t", "dinat_mini", "dinats_t", "davit_t", "resnet50_ela_l", "mobilenetv2_ela_b")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(224, 224), (800, 1333)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_finite(name: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    model = timm.create_model(name, num_classes=10).cuda().train()
    image = torch.randn(2, 3, *size, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        logits = model(image)
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    bad = [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not bad
    assert image.grad.isfinite().all()
