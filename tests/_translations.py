"""What PyTorch's compiler, exporter and TorchScript make of a whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.tools._common.export import wake_idle_parts


@torch.no_grad()
def assert_compiles_exports_and_scripts(model: nn.Module, images: Tensor) -> None:
    """Compiled into one graph, exported for any batch and scripted, the model computes what it does as it is.

    Args:
        model: In evaluation mode; its idle parts are woken, so that all of them can be seen in the output.
        images: A batch.
    """
    wake_idle_parts(model)
    want = model(images)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), want)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(exported.module()(images.repeat(2, 1, 1, 1)), want.repeat(2, 1))
    torch.testing.assert_close(torch.jit.script(model)(images), want)
