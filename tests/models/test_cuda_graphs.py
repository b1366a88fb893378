"""Models compiled with CUDA graphs, PyTorch's own, train as they do without."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitrail  # noqa: F401 -- registers the models

pytestmark = pytest.mark.gpu

MODELS: dict[str, dict[str, Any]] = {
    "biformer_n": {},
    "davit_t": {"depths": (1, 1), "dims": (32, 64), "num_heads": (1, 2)},
    "rmt_n": {},
}


def _losses(model: nn.Module, mode: str | None) -> Tensor:
    """Of four steps, each on other images."""
    torch._dynamo.reset()
    run = torch.compile(model, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.Generator("cuda").manual_seed(0)
    losses = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        image = torch.randn(8, 3, 64, 64, device="cuda", generator=images)
        loss = F.cross_entropy(run(image), torch.arange(8, device="cuda"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return torch.stack(losses)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_same(name: str) -> None:
    found = []
    for mode in (None, "reduce-overhead"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=8, drop_path_rate=0.0, **MODELS[name]).cuda().train()
        with torch.backends.cudnn.flags(deterministic=True):  # the stem's convolutions would differ from run to run
            found.append(_losses(model, mode))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert found[0][-1] != found[0][0]
    torch.testing.assert_close(*found)
