"""Checkpoints and validation of a model that is spread over the processes.

Every process writes its own part of weights and optimiser state, as safetensors files in a folder beside `last.pth`;
that file holds the rest and the folder's name, and takes its place only when all parts are written. Parts of any number
of processes are read by any other number, or by one without process group. `best.pth` holds whole weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from vitrail.models.mm.optim import AUTOCAST_DTYPES
from vitrail.models.mm.parallel import gathered

SHARDS = "shards"  # the key in `last.pth`, and the ending of folders
_WEIGHT, _STATE = "weight:", "state:"


def write_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes weights and optimiser state, each process its part; all processes call it. The folder appears when whole.

    Args:
        model: After `shard`.
        optimizer: Of the model.
        folder: To write; its parent exists.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if is_main_process():
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    tensors = {_WEIGHT + name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors |= {_STATE + name: tensor for name, tensor in _optimizer_tensors(model, optimizer).items()}
    # safetensors cannot read a slice of a number
    flat = {name: tensor if tensor.ndim else tensor.reshape(1) for name, tensor in tensors.items()}
    save(flat, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    dist.barrier()
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)


def read_shards(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reads what `write_shards` wrote, whole and on the CPU, without a process group and without running code.

    Returns:
        Weights by name, and optimiser state by the parameter's name and the state's, joined by a colon.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no parts.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the checkpoint's parts {folder} do not exist")
    reader = HuggingFaceStorageReader(str(folder))
    described = reader.read_metadata().state_dict_metadata
    if not described:
        raise ValueError(f"{folder} holds no parts of a checkpoint")
    tensors = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in described.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return _with_prefix(tensors, _WEIGHT), _with_prefix(tensors, _STATE)


def join_shards(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The content of a `last.pth` of a sharded run, as that of any other run.

    Args:
        content: Of the file.
        path: Of the file.
    """
    weights, states = read_shards(path.parent / content[SHARDS])
    weights = {name: tensor.reshape(content["shapes"].get(name, tensor.shape)) for name, tensor in weights.items()}
    optimizer = {**content["optimizer"], "state": {}}
    for index, (name, numbers) in enumerate(content["optimizer"]["state"].items()):
        tensors = {key.rpartition(":")[2]: value for key, value in states.items() if key.rpartition(":")[0] == name}
        optimizer["state"][index] = {**numbers, **tensors}
    rest = {key: value for key, value in content.items() if key not in (SHARDS, "shapes")}
    return {**rest, "state_dict": weights, "optimizer": optimizer}


def load_whole_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads whole weights into a sharded model; each process keeps its part."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_distribute(weights[name], tensor))


def distribute_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole optimiser state in which each process has its part of what is as large as a parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {}
    for index, values in state["state"].items():
        like = parameters[index]
        parts[index] = {
            key: _distribute(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for key, value in values.items()
        }
    return {**state, "state": parts}


@HOOKS.register_module()
class ShardsHook(Hook):
    """Puts whole weights or the parts' folder into a sharded run's checkpoints, and gathers weights for validation."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._gathered = ExitStack()

    def before_val_epoch(self, runner: Any) -> None:
        """Processes may have different numbers of batches: none may depend on the others' weights."""
        self._gathered.enter_context(gathered(runner.model))
        if runner.amp:  # the gathered weights are of that precision
            runner.model.predict_dtype = AUTOCAST_DTYPES[runner.amp]

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Takes the weights apart again."""
        self._gathered.close()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replaces this process's parts, which mmengine collected."""
        checkpoint.update(runner.whole_parts)


def collect_whole_parts(model: nn.Module, wrapper: OptimWrapper, folder: Path | None) -> dict[str, Any]:
    """What a checkpoint file of a sharded run holds in place of this process's parts; all processes call it.

    Args:
        model: After `shard`.
        wrapper: With the model's optimiser.
        folder: Where the parts go; None for whole weights without the optimiser's state.
    """
    if folder is None:
        return {"state_dict": get_model_state_dict(model, options=_WHOLE)}
    optimizer = wrapper.optimizer
    write_shards(model, optimizer, folder)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    numbers = {
        names[id(parameter)]: {
            key: value
            for key, value in optimizer.state[parameter].items()
            if not isinstance(value, Tensor) or value.ndim == 0
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    state = wrapper.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not tensor.ndim}
    return {
        SHARDS: folder.name,
        "shapes": shapes,
        "state_dict": {},
        "optimizer": {**state, "state": _on_cpu(numbers)},
    }


def remove_old_shards(folder: Path, keep: str) -> None:
    """Removes the parts of earlier checkpoints, and of writes that were killed."""
    for path in [*folder.glob(f"*.{SHARDS}"), *folder.glob(f".*.{SHARDS}.tmp")]:
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State as large as its parameter, by the parameter's name and the state's."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape != parameter.shape:
                raise NotImplementedError(
                    f"{type(optimizer).__name__} keeps a state of another shape than its parameter; "
                    "allowed with --sharded: optimisers such as adamw, sgd, lamb"
                )
            tensors[f"{name}:{key}"] = value
    return tensors


def _distribute(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device_mesh.device_type, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _on_cpu(numbers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value.cpu() if isinstance(value, Tensor) else value for key, value in values.items()}
        for name, values in numbers.items()
    }
