"""The memory that a training step takes, found by running it without data (`fake_gpu`)."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrail.tools._common.fake_gpu import Backward, LiveStorages, pretended_gpu

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
H100_MULTIPROCESSORS = 132
H100_CUBLAS_WORKSPACE = 32 * 2**20  # of each thread that multiplies matrices: that of the forward, that of the backward


@dataclass(frozen=True)
class StepMemory:
    peak: int
    reserved: int
    parts: dict[str, int]
    peak_at: str


def measure_step(model: nn.Module, batch: int, size: tuple[int, int], amp: str | None) -> StepMemory:
    tracker = LiveStorages("cuda")
    with ExitStack() as stack:
        stack.enter_context(pretended_gpu(H100_MULTIPROCESSORS))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tracker)
        tracker.label = "parameters"
        model = to_device(model, torch.device("cuda", 0))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, foreach=True)
        tracker.label = "optimizer state"
        _fill_state(optimizer)
        tracker.label = "batch"
        images = torch.empty(batch, 3, *size, device="cuda")
        labels = torch.empty(batch, dtype=torch.long, device="cuda")
        for _ in range(2):
            tracker.reserve(H100_CUBLAS_WORKSPACE, "cuBLAS", "")
        tracker.reset_peak()
        tracker.label = "activations"
        with torch.autocast("cuda", AUTOCAST_DTYPES.get(amp or ""), enabled=amp is not None):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        del logits
        tracker.label = "passing"

        backward = Backward()
        loss_holder = [loss]
        del loss
        backward.run(loss_holder.pop())
        print("after backward", dict(tracker.live))
        tracker.label = "optimizer step"
        optimizer.step()
        optimizer.zero_grad()
    return StepMemory(tracker.allocator.peak_allocated, tracker.allocator.reserved, dict(tracker.peak), tracker.peak_at)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces parameters and buffers by empty ones on the device."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    moved[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
