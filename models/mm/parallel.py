"""One model on several processes, by PyTorch's own engines: replicas (DDP) or shards (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from mmengine.model import MMDistributedDataParallel
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed import ProcessGroup, group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

_BLOCKS = ("blocks", "layers", "layer1", "layer2", "layer3", "layer4")  # containers of blocks, here and in timm


def replicate(
    model: nn.Module,
    device: torch.device,
    *,
    process_group: ProcessGroup | None = None,
    static_graph: bool = False,
    find_unused_parameters: bool = False,
    bucket_cap_mb: float = 25.0,
    sync_bn: bool = False,
) -> MMDistributedDataParallel:
    """Wraps a model so that every process has all of it and gradients are averaged, bucket by bucket, in the backward.

    Args:
        model: On `device`.
        device: Of this process.
        process_group: Processes that share the work; None for all.
        static_graph: The same parameters get gradients in every iteration, each once: what is ready is then known.
        find_unused_parameters: Look in every iteration for parameters that get none.
        bucket_cap_mb: Size of the pieces in which gradients travel.
        sync_bn: Batch norms see the batches of all processes (on GPUs; PyTorch has none for CPUs).
    """
    on_gpu = device.type == "cuda"
    if sync_bn and on_gpu:
        model = convert_sync_batchnorm(model, process_group)
    return MMDistributedDataParallel(
        module=model,
        device_ids=[device] if on_gpu else None,
        process_group=process_group,
        broadcast_buffers=False,
        find_unused_parameters=find_unused_parameters,
        static_graph=static_graph,
        bucket_cap_mb=bucket_cap_mb,
        gradient_as_bucket_view=True,
    )


def shard(
    model: nn.Module,
    device: torch.device,
    *,
    process_group: ProcessGroup | None = None,
    precision: torch.dtype | None = None,
    sync_bn: bool = False,
) -> nn.Module:
    """Spreads parameters, gradients and optimiser state over the processes, block by block, in place.

    A block's weights are whole only while it computes. With a `precision` they travel and compute in it, while the
    shards, the gradients' sum and the optimiser stay in float32. Batch norms, which take no other dtype than that of
    their running statistics, keep theirs.

    Args:
        model: On `device`, with the same weights on every process.
        device: Of this process.
        process_group: Processes that share the model; None for all.
        precision: Of the gathered weights; None for that of the parameters.
        sync_bn: As in `replicate`.

    Returns:
        The same model.
    """
    if sync_bn and device.type == "cuda":
        model = convert_sync_batchnorm(model, process_group)
    mesh = DeviceMesh.from_group(process_group or group.WORLD, device.type)
    for unit in find_shard_units(model, precision):
        # Autocast decides what computes in low precision, as without shards; inputs are left to it.
        policy = MixedPrecisionPolicy(
            param_dtype=unit.precision,
            reduce_dtype=torch.float32 if unit.precision else None,
            cast_forward_inputs=False,
        )
        fully_shard(unit.module, mesh=mesh, mp_policy=policy, reshard_after_forward=unit.reshard)
    return model


class ShardUnit(NamedTuple):
    """What is gathered as one: a module's parameters without those of earlier units inside it.

    Attributes:
        module: Whose parameters.
        precision: In which they travel and compute; None for their own.
        reshard: Whether they are given up after the forward pass, to be gathered once more for the backward pass.
    """

    module: nn.Module
    precision: torch.dtype | None
    reshard: bool


def find_shard_units(model: nn.Module, precision: torch.dtype | None) -> list[ShardUnit]:
    """The units of `shard`, each after those inside it: batch norms where a precision is given, blocks, the rest."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
    units = [ShardUnit(norm, None, False) for norm in norms if precision is not None]
    units += [ShardUnit(block, precision, True) for block in find_blocks(model)]
    return [*units, ShardUnit(model, precision, False)]


def checkpoint_blocks(model: nn.Module, option: str) -> None:
    """Lets a model of timm's registry keep its blocks' inputs alone and compute the blocks again in the backward pass.

    Args:
        model: To be changed.
        option: What asked for it, for the message.

    Raises:
        NotImplementedError: The model cannot.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise NotImplementedError(f"{option}: {type(model).__name__} has no gradient checkpointing") from error


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to a model."""
    return isinstance(model, FSDPModule)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a model's stages, in order: what is sharded, recomputed or compiled as one."""
    return list(_walk_blocks(model))


def _walk_blocks(module: nn.Module) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if name in _BLOCKS and isinstance(child, (nn.Sequential, nn.ModuleList)):
            for block in child:
                nested = list(_walk_blocks(block)) if isinstance(block, nn.Sequential) else []
                yield from nested or ([block] if any(True for _ in block.parameters()) else [])
        else:
            yield from _walk_blocks(child)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which every process has all weights of a sharded model, to evaluate different numbers of batches."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)
