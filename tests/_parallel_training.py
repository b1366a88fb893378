"""What the processes of `tests/models/mm/test_parallel.py` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _families import build
from timm.layers import DropPath
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from vitrail.models.mm.parallel import find_blocks, replicate, shard

CPU = torch.device("cpu")
_SIZE, _STEPS = 32, 2  # the second shows what the first has left behind
# Of two stages, whose four blocks are of both kinds and see maps of two sizes: each takes a second to compile.
_SHORTER = {"davit_t": {"depths": (1, 1), "dims": (32, 64), "num_heads": (1, 2)}}


def compare_with_one_process(names: Sequence[str], compiled: Sequence[str], file: Path) -> None:
    """Trains models as replicas and as shards, computing blocks again.

    Args:
        names: Of the smallest models of families.
        compiled: Of those, to be compiled, too.
        file: Where the first process writes for every name and way how far the weights are at most from those of one
            process ("weights"), and how far training has moved these ("way").
    """
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        expected = _train(_build(name), joined=False) if dist.get_rank() == 0 else {}
        start = dict(_build(name).named_parameters())
        for graphs in (False, True) if name in compiled else (False,):
            for way in ("replicas", "shards"):
                weights = _train(_join(name, way, graphs), joined=True)
                found[f"{name}, {way}{', compiled' if graphs else ''}"] = {
                    "weights": _distance(weights, expected), "way": _distance(start, expected)
                }  # fmt: skip
    if dist.get_rank() == 0:
        torch.save(found, file)
    dist.destroy_process_group()


def _build(name: str, checkpointing: bool = False) -> nn.Module:
    """In float64, without what depends on chance or on the other images of a batch."""
    model = build(name, checkpointing, _SIZE, **_SHORTER.get(name, {})).double()
    for module in model.modules():
        if isinstance(module, (DropPath, nn.Dropout, _BatchNorm)):
            module.eval()
    return model


def _join(name: str, way: str, graphs: bool) -> nn.Module:
    model = _build(name, checkpointing=True)
    if graphs:
        for block in find_blocks(model):
            block.compile(backend="eager")
    return replicate(model, CPU, static_graph=not graphs) if way == "replicas" else shard(model, CPU)


def _distance(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max((float((weights[name].detach() - tensor).abs().max()) for name, tensor in expected.items()), default=0.0)


def _train(model: nn.Module, joined: bool) -> dict[str, Tensor]:
    """Weights after some steps on a batch, or on this process's part of it."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, _SIZE, _SIZE, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, 4])
    if joined:
        images, labels = (x[dist.get_rank() :: dist.get_world_size()] for x in (images, labels))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(_STEPS):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    named = getattr(model, "module", model).named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named}
