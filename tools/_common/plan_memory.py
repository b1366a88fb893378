"""The memory that a training step takes on one GPU, found by running the step without data (`fake_gpu`).

The step is forward, cross-entropy, backward, AdamW (the foreach implementation, PyTorch's default on GPUs), in the
state of every step but the first: the optimizer's state is there, last step's gradients are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrail.tools._common.fake_gpu import Backward, Functions, LiveStorages, accumulate, pretended_gpu

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
H100_MULTIPROCESSORS = 132
CUBLAS_WORKSPACE = 32 * 2**20  # on Hopper, for each thread that multiplies matrices: forward's and backward's
PARTS = ("parameters", "optimizer state", "gradients", "batch", "activations", "passing", "workspace")


@dataclass(frozen=True)
class Setting:
    """How a model trains.

    Attributes:
        batch: Images a GPU.
        size: Height and width of the images.
        amp: "bf16", "fp16" or None for float32.
        mode: "single" (one GPU), "replicas" (DDP) or "shards" (`fully_shard`, block by block).
        gpus: That share the model.
        checkpointing: Blocks are computed again in the backward pass.
    """

    batch: int
    size: tuple[int, int]
    amp: str | None = "bf16"
    mode: str = "single"
    gpus: int = 1
    checkpointing: bool = False


@dataclass
class StepMemory:
    """Bytes, as PyTorch's allocator on a GPU counts them.

    Attributes:
        peak: The most that is allocated (`torch.cuda.max_memory_allocated`).
        reserved: What the allocator takes from the device for that (`torch.cuda.memory_reserved`).
        before: Allocated before the step.
        after_forward: Allocated between the forward and the backward pass.
        after_backward: Allocated between the backward pass and the optimizer's step.
        parts: What the peak consists of: parameters, optimizer state, gradients, batch, activations (made in the
            forward pass and still needed), passing (made in the backward pass), workspace (of cuBLAS and operators).
        peak_at: The operator that reached the peak.
        flops: Floating-point operations of the step.
    """

    peak: int = 0
    reserved: int = 0
    before: int = 0
    after_forward: int = 0
    after_backward: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    peak_at: str = ""
    flops: int = 0


def build_model(name: str, size: tuple[int, int], checkpointing: bool = False) -> nn.Module:
    """A model of timm's registry for images of a size, in training mode, on the CPU."""
    model = timm.create_model(name).train()
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    if checkpointing:
        model.set_grad_checkpointing()
    return model


def measure_step(model: nn.Module, setting: Setting, device: torch.device | None = None) -> StepMemory:
    """Runs a step without data and returns the memory that it takes.

    Args:
        model: In training mode, on any device. Its parameters are replaced: it cannot be used any more.
        setting: How it trains.
        device: A GPU unless given; there need not be one.
    """
    device = device or torch.device("cuda", 0)
    tracker = LiveStorages(device.type)
    with pretended_gpu(H100_MULTIPROCESSORS) as functions, FakeTensorMode(allow_non_fake_inputs=True), tracker:
        return _Step(model, setting, device, tracker).run(functions)


class _Step:
    """A model that trains without data; call it inside the tracker."""

    def __init__(self, model: nn.Module, setting: Setting, device: torch.device, tracker: LiveStorages) -> None:
        self.model, self.setting, self.device, self.tracker = model, setting, device, tracker
        self.dtype = AUTOCAST_DTYPES.get(setting.amp or "")
        tracker.label = "parameters"
        self.units = [] if setting.mode != "shards" else find_units(model, setting.amp)
        moved = _move(model, device, {name: unit.dtype for unit in self.units for name in unit.names})
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shards: dict[Tensor, nn.Parameter] = {}
        self.buckets: dict[Tensor, Tensor] = {}
        self.held: list[Tensor] = []  # by DDP besides its buckets
        if setting.mode == "shards":
            self._shard(moved)
        elif setting.mode == "replicas":
            self._make_buckets()
        tracker.label = "optimizer state"
        self.optimizer = torch.optim.AdamW(self.trained, foreach=True)
        for parameter in self.trained:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def run(self, functions: Functions) -> StepMemory:
        tracker, setting, found = self.tracker, self.setting, StepMemory()
        tracker.label = "batch"
        images = torch.empty(setting.batch, 3, *setting.size, device=self.device)
        labels = torch.empty(setting.batch, dtype=torch.long, device=self.device)
        for _ in range(2 if self.device.type == "cuda" else 0):
            tracker.reserve(CUBLAS_WORKSPACE, "workspace", "")
        tracker.reset_peak()
        found.before = tracker.allocator.allocated
        tracker.label = "activations"
        losses = [self._forward(images, labels)]
        found.after_forward = tracker.allocator.allocated
        tracker.label = "passing"
        gathered = tracker.reserve(gathered_bytes(self.units), "workspace", "gathered weights")
        Backward(self._accumulate, functions.take_handles()).run(losses)
        gathered()
        found.after_backward = tracker.allocator.allocated
        self.optimizer.step()
        self.optimizer.zero_grad()
        found.peak, found.reserved = tracker.allocator.peak_allocated, tracker.allocator.reserved
        found.parts, found.peak_at, found.flops = dict(tracker.peak), tracker.peak_at, tracker.flops
        return found

    def _forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels)

    def _accumulate(self, parameter: Tensor, gradient: Tensor) -> None:
        if self.shards:
            shard = self.shards[parameter]
            shard.grad = torch.empty_like(shard)
            self.tracker.relabel(shard.grad, "gradients")
        elif self.buckets:
            parameter.grad = self.buckets[parameter]
        else:
            accumulate(parameter, gradient)
            self.tracker.relabel(parameter.grad, "gradients")

    def _make_buckets(self) -> None:
        """DDP keeps the gradients' memory from step to step; what autograd makes is copied there and dropped.

        On GPUs it holds as much once more, as measured on two H100 (torch 2.11, NCCL): a step of `biformer_s` or
        `davit_t` takes two sets of gradients more than in one process, although gradients are views of the buckets.
        """
        self.tracker.label = "gradients"
        for parameter in self.trained:
            self.buckets[parameter] = torch.empty_like(parameter)
        self.held = [torch.empty_like(parameter) for parameter in self.trained]

    def _shard(self, moved: dict[str, Tensor]) -> None:
        """Leaves this process its part; of the gathered weights only those count that stay from pass to pass."""
        for unit in self.units:
            for name in unit.names:
                if unit.reshard:
                    self.tracker.exclude(moved[name])
                part = torch.empty(-(-moved[name].numel() // self.setting.gpus), device=self.device)
                self.shards[moved[name]] = nn.Parameter(part)
        self.trained = list(self.shards.values())


@dataclass(frozen=True)
class Unit:
    """What `vitrail.models.mm.parallel.shard` gathers as one.

    Attributes:
        names: Of its parameters.
        numel: How many numbers they have.
        dtype: In which they are gathered.
        reshard: Gathered for the forward pass and once more for the backward pass.
    """

    names: tuple[str, ...]
    numel: int
    dtype: torch.dtype
    reshard: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the gathered weights."""
        return self.numel * self.dtype.itemsize


def find_units(model: nn.Module, amp: str | None) -> list[Unit]:
    """What is gathered as one when a model is sharded for training in a precision."""
    from vitrail.models.mm.parallel import find_shard_units

    left = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
    units = []
    for module, precision, reshard in find_shard_units(model, AUTOCAST_DTYPES.get(amp or "")):
        own = [left.pop(id(parameter)) for parameter in module.parameters() if id(parameter) in left]
        if own:
            numel = sum(parameter.numel() for _, parameter in own)
            units.append(Unit(tuple(name for name, _ in own), numel, precision or own[0][1].dtype, reshard))
    return units


def gathered_bytes(units: Sequence[Unit]) -> int:
    """The most that gathered blocks take at a time in the backward pass.

    The weights of one block and their gradients, those in float32 on their way to the other GPUs, and the block before
    it, which is gathered meanwhile: what arrived and its copy in the parameters' shapes.
    """
    blocks = [unit for unit in units if unit.reshard]
    before = [0, *(unit.nbytes for unit in blocks)]
    return max((2 * unit.nbytes + 4 * unit.numel + 2 * b for unit, b in zip(blocks, before, strict=False)), default=0)


def _move(model: nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Puts empty parameters and buffers on the device in place of the model's own; the parameters by their names.

    Args:
        model: To be changed.
        device: Of the new tensors.
        dtypes: Of parameters by name, if not their own.
    """
    moved: dict[int, nn.Parameter] = {}
    by_name = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in moved:
            empty = torch.empty(parameter.shape, dtype=dtypes.get(name, parameter.dtype), device=device)
            moved[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        by_name[name] = moved[id(parameter)]
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return by_name
