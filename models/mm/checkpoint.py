"""Checkpoints that are whole or absent, and that cannot run code when they are read.

mmengine's own hook removes the old checkpoint before the new one is written and writes in place; its loader falls
back to unrestricted unpickling. Here a run keeps two files, each replaced in one step: `last.pth` (everything that
resuming needs) and `best.pth` (weights). Both hold tensors and plain containers only.
"""

from __future__ import annotations

import io
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from mmengine.dist import master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from torch import Tensor, nn

from vitrail.models._checkpoint import (
    DamagedError,
    HoldsObjectsError,
    UntrainedPartWarning,
    describe_misfits,
    load_without_code,
)
from vitrail.models.mm.parallel import is_sharded
from vitrail.models.mm.sharding import SHARDS, join_shards, load_whole_weights

LAST, BEST, WEIGHTS = "last.pth", "best.pth", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message names it."""


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file so that its name holds either the old or the whole new content, even across a power cut.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old content still stands and nothing is left.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(path.parent)


@register_backend("atomic")
class AtomicBackend(LocalBackend):
    """mmengine's local files, written by `atomic_write`."""

    def put(self, obj: bytes | io.BytesIO, filepath: str | os.PathLike[str]) -> None:
        """Writes a file atomically."""
        atomic_write(filepath, obj if isinstance(obj, bytes) else obj.getvalue())


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's state as a safetensors file, which `timm.create_model(..., checkpoint_path=)` loads."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    atomic_write(path, safetensors.torch.save(state))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a `.safetensors` or `torch.save` file without running any code from it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is a folder, damaged, or holds objects other than tensors and plain containers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder, expected a file")
    try:
        content = load_without_code(path)
    except HoldsObjectsError as error:
        raise CheckpointError(
            f"checkpoint {path} holds Python objects, which could run code on loading; refused. Convert it where "
            "you trust it: torch.save(torch.load(file, weights_only=False)['state_dict'], new_file)"
        ) from error
    except DamagedError as error:
        reason = f" ({error})" if str(error) else ""
        raise CheckpointError(f"checkpoint {path} is damaged or not a checkpoint{reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, expected a dict of tensors")
    return join_shards(content, path) if SHARDS in content else content


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a classifier's state dict from a training checkpoint, a released file or a safetensors file.

    Raises:
        CheckpointError: Besides `read_checkpoint`'s, there are no tensors in it.
    """
    content: Any = read_checkpoint(path)
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"checkpoint {path} holds no weights")
    if all(name.startswith("backbone.") for name in weights):
        weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
    return weights


def convert_for(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Translates a released checkpoint's names by the `checkpoint_filter_fn` of the model's module, if it has one."""
    module = sys.modules.get(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    return convert(dict(weights), model) if convert else weights


@contextmanager
def refuse_untrained_parts(source: str) -> Iterator[None]:
    """A context in which weights are converted for evaluation: nothing may stay as it was initialised.

    Args:
        source: What to call the weights in a message.

    Raises:
        CheckpointError: A `checkpoint_filter_fn` warned that the weights lack a part of the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedPartWarning)
        try:
            yield
        except UntrainedPartWarning as warning:
            raise CheckpointError(
                f"{source} cannot be evaluated, a part of the model is not in it: {warning}"
            ) from warning


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Loads weights into a model and names what does not fit.

    Raises:
        CheckpointError: A key is missing, left over or has another shape.
    """
    if misfits := describe_misfits(model.state_dict(), weights):
        raise CheckpointError(f"checkpoint {path} does not fit the model: {misfits}")
    if is_sharded(model):
        load_whole_weights(model, weights)
    else:
        model.load_state_dict(weights)


def load_trained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a classifier for evaluation, also from a file of its authors; every part must be in the file.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It does not fit the model.
    """
    with refuse_untrained_parts(f"checkpoint {path}"):
        weights = convert_for(model, read_weights(path))
    load_strictly(model, weights, path)


@HOOKS.register_module()
class AtomicCheckpointHook(Hook):
    """Writes `last.pth` when an epoch is complete, validation included, and `best.pth` when the score improved.

    A run that was killed in an epoch (or in its validation) resumes at that epoch's start.

    Args:
        interval: Epochs between two checkpoints; the last epoch always has one.
        score: Validation metric that `best.pth` maximises.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int = 1, score: str = "accuracy/top1") -> None:
        self.interval = interval
        self.score = score

    def after_train_epoch(self, runner: Any) -> None:
        """Saves unless a validation follows, which will save."""
        if not runner.validation_follows():
            self._save_last(runner, epoch=runner.epoch + 1)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Saves, best first: `last.pth` must know of it."""
        if not runner.is_training:
            return
        score = float((metrics or {}).get(self.score, -math.inf))
        best = runner.message_hub.runtime_info.get("best_score", -math.inf)
        if score > best:
            runner.message_hub.update_info("best_score", score)
            runner.message_hub.update_info("best_epoch", runner.epoch)
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            runner.save_checkpoint(runner.work_dir, BEST, save_optimizer=False, save_param_scheduler=False, meta=meta)
        self._save_last(runner, epoch=runner.epoch)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Turns mmengine's history objects and NumPy values into tensors and numbers: a checkpoint holds no objects."""
        for name in ("meta", "message_hub", "param_schedulers"):
            if name in checkpoint:
                checkpoint[name] = _plain(checkpoint[name])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Undoes `before_save_checkpoint`."""
        hub = checkpoint.get("message_hub")
        if hub is not None:
            hub["log_scalars"] = {name: _unpack_history(packed) for name, packed in hub["log_scalars"].items()}

    def _save_last(self, runner: Any, epoch: int) -> None:
        if epoch % self.interval == 0 or epoch == runner.max_epochs:
            runner.save_checkpoint(runner.work_dir, LAST, meta={"epoch": epoch, "iter": runner.iter})


@master_only
def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Removes what writes that were killed have left in a run's folder."""
    for name in (LAST, BEST, WEIGHTS):
        for path in Path(folder).glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {"history": torch.as_tensor(history, dtype=torch.float64), "counts": torch.as_tensor(counts)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _unpack_history(packed: Mapping[str, Tensor]) -> HistoryBuffer:
    return HistoryBuffer(packed["history"].tolist(), packed["counts"].tolist())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
