"""Puts a training config of mmdetection or mmsegmentation together and runs it with mmengine's Runner.

The configs are ordinary ones of these libraries. What differs from their own tools: a chosen device, mixed precision on
every device, checkpoints that are written atomically and read without running code, and checks before the first write.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS, TASK_UTILS, TRANSFORMS, DefaultScope
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitrail.models._checkpoint import abridge
from vitrail.models._checkpoint import unwrap as unwrap_checkpoint
from vitrail.models.mm import dense_hooks, hooks, optim  # noqa: F401 -- they register their parts
from vitrail.models.mm.checkpoint import CheckpointError, read_checkpoint
from vitrail.models.mm.data_findings import Findings
from vitrail.models.mm.dense_config_check import (
    blaming,
    check_builds,
    check_channels,
    check_loader,
    check_metric,
    check_settings,
)
from vitrail.models.mm.dense_data import (
    check_classes,
    check_data_folders,
    classes_of,
    datasets_of,
    naming_unreadable_images,
)
from vitrail.models.mm.dense_data_check import check_dense_data
from vitrail.models.mm.ops import install_operators
from vitrail.models.mm.runner import DeviceRunner, default_visualizer, unwrap
from vitrail.models.mm.seeding import seed_everything
from vitrail.models.mm.value_types import check_value_types

# The libraries by their scopes, with the score that the best checkpoint has most of. Detectors of objects in scans are
# ours; their parts stand in mmengine's own registries.
POINT_SCOPE = "mmengine"
SCORES = {"mmdet": "coco/bbox_mAP", "mmseg": "mIoU", POINT_SCOPE: "bev_mAP"}
_POINT_PARTS = ("samplers", "center_head", "point_detector", "point_data", "point_metric")
_LOADERS = ("train_dataloader", "val_dataloader")
_SAMPLE = 200  # images and masks of a data set that are opened before a training
_OWN_HOOKS = ("IterationSeedHook", "FiniteLossHook", "AverageStatisticsHook", "DenseCurveHook")
_REQUIRED = ("model", "train_dataloader", "val_dataloader", "val_evaluator", "optim_wrapper", "train_cfg")


class DenseRunner(DeviceRunner):
    """Runs epochs or iterations, with validations in between.

    Attributes:
        data_notes: What was noticed about the data and does no harm, names by kind.
    """

    data_notes: Mapping[str, Sequence[str]] = MappingProxyType({})

    @property
    def is_iterative(self) -> bool:
        """Whether the run is counted in iterations."""
        return isinstance(self.train_loop, IterBasedTrainLoop)

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Loads weights, also under the names of the backbone's or the head's authors.

        Raises:
            CheckpointError: They do not fit.
        """
        load_dense_weights(unwrap(self.model), weights, source)

    def train(self) -> nn.Module:
        """Trains from the start or from where the checkpoint left off.

        Raises:
            ValueError: An image cannot be read.
        """
        with naming_unreadable_images():
            return super().train()

    def validation_follows(self) -> bool:
        """Whether the epoch or iteration that is being trained ends with a validation."""
        done = (self.iter if self.is_iterative else self.epoch) + 1
        last = self.max_iters if self.is_iterative else self.max_epochs
        return done >= self.val_begin and (done % self.val_interval == 0 or done == last)

    def validations_left(self, iterations_done: int) -> int:
        """Number of validations still to come."""
        unit = 1 if self.is_iterative else self.max_iters // self.max_epochs
        done, last = iterations_done // unit, self.max_iters // unit
        unfinished = done < last and last % self.val_interval > 0
        return last // self.val_interval - done // self.val_interval + unfinished


def is_dense(config: Mapping[str, Any]) -> bool:
    """Whether a config is one of mmdetection or mmsegmentation, or one for scans in their form.

    Raises:
        ValueError: It is one of another library.
    """
    scope = config.get("default_scope")
    if scope is not None and scope not in SCORES:
        raise ValueError(f"the config's default_scope is {scope!r}; allowed: {', '.join(SCORES)}, none for classifiers")
    return scope is not None


def score_of(config: Mapping[str, Any]) -> str:
    """The validation metric that matters: what the config's checkpoint hook saves the best of, or the task's own."""
    hook = (config.get("default_hooks") or {}).get("checkpoint") or {}
    chosen = hook.get("save_best", hook.get("score"))  # a completed config has the latter
    return chosen if chosen not in (None, "auto") else SCORES[config["default_scope"]]


def register_library(scope: str) -> None:
    """Registers everything that mmdetection or mmsegmentation has, or the parts of detectors for scans.

    Raises:
        ValueError: It is not installed.
    """
    if scope == POINT_SCOPE:
        for part in _POINT_PARTS:
            importlib.import_module(f"vitrail.models.mm.{part}")
        return
    install_operators()
    try:
        with _silent():
            importlib.import_module(f"{scope}.utils").register_all_modules(init_default_scope=False)
    except ImportError as error:
        raise ValueError(f"the config needs {scope} ({error}): pip install 'vitrail[mm]'") from error


def complete_dense_config(config: Config, resumes: bool = False) -> Config:
    """Settles what a config leaves open, and what this runner does in its own way.

    `data_root` at the top reaches every data set and metric; workers persist where there are any; checkpoints are
    `last.pth` and `best.pth`.

    Args:
        config: As read from its file.
        resumes: A checkpoint will bring the weights, so that the backbone's starting weights are not read.

    Raises:
        ValueError: A required part is missing.
    """
    lacking = [name for name in _REQUIRED if not config.get(name)]
    if lacking:
        raise ValueError(f"the config has no {', '.join(lacking)}")
    for name in ("model", "train_dataloader", "val_dataloader", "optim_wrapper", "train_cfg"):
        if not isinstance(config[name], Mapping):
            raise ValueError(f"the config's {name} is {config[name]!r}; expected a dict")
    for name in _LOADERS:
        if not isinstance(config[name].get("dataset"), Mapping):
            raise ValueError(f"the config's {name}.dataset is {config[name].get('dataset')!r}; expected a dict")
    parts = copy.deepcopy(config.to_dict())
    _move_data_root(parts)
    parts.setdefault("test_dataloader", copy.deepcopy(parts["val_dataloader"]))
    parts.setdefault("test_evaluator", copy.deepcopy(parts["val_evaluator"]))
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        parts[name]["persistent_workers"] = parts[name].get("num_workers", 0) > 0
    given = (parts.get("default_hooks") or {}).get("checkpoint") or {}
    iterative = "Iter" in str(parts["train_cfg"].get("type", "")) or not parts["train_cfg"].get("by_epoch", True)
    parts.setdefault("default_hooks", {})["checkpoint"] = {
        "type": "DenseCheckpointHook",
        "interval": given.get("interval", parts["train_cfg"].get("val_interval", 1)),
        "by_epoch": given.get("by_epoch", not iterative),
        "score": score_of(parts) if given.get("type") != "DenseCheckpointHook" else given["score"],
    }
    parts["randomness"] = {"seed": 0, **(parts.get("randomness") or {})}
    parts.setdefault("env_cfg", {"mp_cfg": {"opencv_num_threads": 0}})
    parts["visualizer"] = default_visualizer()  # those of the libraries ask for a display of every image
    if resumes and "backbone" in parts["model"]:
        for name in ("pretrained", "checkpoint", "init_cfg"):
            parts["model"]["backbone"].pop(name, None)
    return Config(parts, filename=config.filename)


def build_model(config: Config) -> nn.Module:
    """Builds the detector or segmenter of a config, without reading any weights.

    Raises:
        ValueError: A type or an argument is unknown or wrong.
    """
    scope = config["default_scope"]
    register_library(scope)
    inference = config.model.get("test_cfg") or {}
    lacking = [name for name in ("crop_size", "stride") if name not in inference]
    if inference.get("mode") == "slide" and lacking:
        raise ValueError(f"model.test_cfg has mode 'slide' and no {', '.join(lacking)}")
    parts = copy.deepcopy(config.model.to_dict())
    with DefaultScope.overwrite_default_scope(scope):
        check_value_types("model", parts, (MODELS, TASK_UTILS))
        with blaming("model"):
            return MODELS.build(ConfigDict(parts))


def build_trained_model(config: Config, weights: str | Path) -> nn.Module:
    """Builds the detector or segmenter of a config for inference in one process, with all its weights from a file.

    Raises:
        ValueError: The config is wrong, or the checkpoint does not fit.
        OSError: The checkpoint is missing.
    """
    content = unwrap_checkpoint(read_checkpoint(weights))
    model = revert_sync_batchnorm(build_model(config))
    load_dense_weights(model, {name: value for name, value in content.items() if isinstance(value, Tensor)}, weights)
    return model


def build_dataset(config: Config, loader: str) -> Any:
    """Builds the data set of "train_dataloader" or "val_dataloader" alone.

    Raises:
        ValueError: A type is unknown.
        OSError: The data are missing.
    """
    check_data_folders(config, [loader])
    register_library(config.default_scope)
    with DefaultScope.overwrite_default_scope(config.default_scope), blaming(loader):
        return DATASETS.build(copy.deepcopy(config[loader]["dataset"].to_dict()))


def load_dense_weights(model: nn.Module, weights: Mapping[str, Any], source: str | Path) -> None:
    """Loads a whole detector or segmenter, also under the names of the backbone's or the head's authors.

    Raises:
        CheckpointError: Something is missing, left over or has another shape.
    """
    if not weights:
        raise CheckpointError(f"checkpoint {source} holds no weights")
    try:
        model.load_state_dict(dict(weights))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"checkpoint {source} does not fit the model: {_misfits(str(error))}") from error


def _misfits(message: str) -> str:
    """What PyTorch says of weights that do not fit, with the first of many names."""
    found = []
    for line in message.splitlines()[1:] or [message]:
        names = re.findall(r'"([^"]+)"', line)
        shapes = re.search(r"(size mismatch for \S+):.*?Size\((.*?)\).*?Size\((.*?)\)", line)
        if names:
            kind = line.split(" key(s)")[0].strip()
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            found.append(f"{kind} keys {', '.join(names[:2])}{more}")
        elif shapes:
            found.append(f"{shapes[1]}: the checkpoint's is {shapes[2]}, the model's {shapes[3]}")
        else:
            found.append(line.strip())
    return abridge(found)


@torch.inference_mode()
def evaluate_dense(
    config: Config, weights: str | Path, device: torch.device, on_batch: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Measures weights of a config's detector or segmenter on its test data, in one process.

    Args:
        config: As read from its file.
        weights: A checkpoint of the whole model, of `vitrail.tools.train` or released by others.
        device: Where to run.
        on_batch: Called with the number of batches done and their total.

    Returns:
        What the config's metrics say.

    Raises:
        ValueError: The config, the data, the model and the checkpoint do not fit together.
        OSError: Data or checkpoint are missing.
    """
    config = complete_dense_config(config, resumes=True)
    check_data_folders(config, ["test_dataloader"])
    check_loader(config, "test_dataloader")
    check_metric(config, "test_evaluator")
    model = build_trained_model(config, weights).to(device).eval()
    check_dense_data(config, ["test_dataloader"], _SAMPLE).refuse_faults()
    with DefaultScope.overwrite_default_scope(config.default_scope):
        loader = _build_loader(config, "test_dataloader", device)
        check_classes(model, tuple(loader.dataset.metainfo["classes"]))
        with blaming("test_evaluator"):
            evaluator = Evaluator(config.to_dict()["test_evaluator"])
        evaluator.dataset_meta = loader.dataset.metainfo
        with naming_unreadable_images():
            for done, batch in enumerate(loader, start=1):
                evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
                if on_batch is not None:
                    on_batch(done, len(loader))
        return {name: float(value) for name, value in evaluator.evaluate(len(loader.dataset)).items()}


def build_dense_runner(
    config: Config,
    work_dir: str,
    device: torch.device,
    launcher: str = "none",
    amp: str | None = None,
    resume_from: str | None = None,
    display: Hook | None = None,
    before_writing: Callable[[], None] | None = None,
) -> DenseRunner:
    """Builds everything that a run needs; nothing is written before data, model and checkpoint have been checked.

    Args:
        config: As read from its file.
        work_dir: Where results go.
        device: Where to train.
        launcher: "none", or "pytorch" for one of several processes (the process group exists already).
        amp: "bf16" or "fp16" for mixed precision.
        resume_from: Checkpoint to go on from.
        display: Hook that shows progress.
        before_writing: Called when all checks have passed.

    Raises:
        ValueError: The config, the data and the model do not fit together.
        OSError: Data or checkpoint are missing.
    """
    config = complete_dense_config(config, resumes=resume_from is not None)
    check_data_folders(config, _LOADERS)
    check_settings(config)
    seed_everything(config.randomness.seed)
    model = build_model(config)
    check_channels(model)
    _check_starting_weights(model)
    findings = check_dense_data(config, _LOADERS, _SAMPLE)
    findings.refuse_faults()
    if device.type != "cuda" or not is_distributed():
        model = revert_sync_batchnorm(model)
    if amp == "bf16":
        _keep_regions_precise(model)
    wrapper = _optimizer_config(config, device, amp)
    with DefaultScope.overwrite_default_scope(config.default_scope), _silent():
        # mmengine lists every parameter; the run's own log will have it
        loaders = [_build_loader(config, part, device) for part in _LOADERS]
        check_builds(config, wrapper, model)
    check_classes(model, tuple(loaders[0].dataset.metainfo["classes"]))
    if resume_from or config.get("load_from"):
        read_checkpoint(resume_from or config.load_from)
    if before_writing is not None:
        before_writing()
    runner = _assemble(config, wrapper, model, loaders, work_dir, device, launcher, resume_from, display)
    runner.data_notes = findings.notes
    return runner


def check_data(config: Config, limit: int | None = None) -> Findings:
    """Looks for faults in a config's training and validation data.

    Args:
        config: As read from its file.
        limit: How many images and masks of a data set are opened; None for all.

    Raises:
        ValueError: The config is wrong, a head has another number of classes than the data, an annotation file is not
            what it should be.
        OSError: A folder or file is missing.
    """
    config = complete_dense_config(config, resumes=True)
    check_data_folders(config, _LOADERS)
    with torch.device("meta"):
        model = build_model(config)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        for loader in _LOADERS:
            for dataset in datasets_of(config[loader]["dataset"]):
                check_classes(model, tuple(classes_of(dataset)))
    return check_dense_data(config, _LOADERS, limit)


def _assemble(
    config: Config,
    wrapper: dict[str, Any],
    model: nn.Module,
    loaders: list[DataLoader],
    work_dir: str,
    device: torch.device,
    launcher: str,
    resume_from: str | None,
    display: Hook | None,
) -> DenseRunner:
    parts = config.to_dict()
    own_hooks: list[Any] = [{"type": name} for name in _OWN_HOOKS]
    return DenseRunner(
        model=model,
        work_dir=work_dir,
        device=device,
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        train_cfg=parts["train_cfg"],
        val_cfg=parts.get("val_cfg") or {},
        val_evaluator=parts["val_evaluator"],
        optim_wrapper=wrapper,
        param_scheduler=parts.get("param_scheduler"),
        auto_scale_lr=parts.get("auto_scale_lr"),
        default_hooks=parts["default_hooks"],
        custom_hooks=own_hooks + (parts.get("custom_hooks") or []) + ([display] if display else []),
        load_from=resume_from or parts.get("load_from"),
        resume=resume_from is not None,
        launcher=launcher,
        env_cfg=parts["env_cfg"],
        log_processor=parts.get("log_processor"),
        visualizer=parts["visualizer"],
        default_scope=parts["default_scope"],
        randomness=parts["randomness"],
        experiment_name=f"vitrail-{uuid.uuid4().hex[:8]}",  # mmengine keeps loggers and histories by this name
        cfg=config,
    )


def _build_loader(config: Config, name: str, device: torch.device) -> DataLoader:
    loader = copy.deepcopy(dict(config[name]))
    loader["pin_memory"] = device.type == "cuda"
    check_value_types(name, loader, (DATASETS, TRANSFORMS, DATA_SAMPLERS))
    with blaming(name):
        return Runner.build_dataloader(loader, seed=config.randomness.seed)


def _optimizer_config(config: Config, device: torch.device, amp: str | None) -> dict[str, Any]:
    wrapper = copy.deepcopy(config.to_dict()["optim_wrapper"])
    if wrapper.get("type") == "AmpOptimWrapper":
        amp = amp or ("fp16" if device.type == "cuda" else "bf16")
    if amp is not None:
        wrapper.update(type="AutocastOptimWrapper", precision=amp, device_type=device.type)
        for name in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(name, None)
    return wrapper


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _check_starting_weights(model: nn.Module) -> None:
    path = getattr(getattr(model, "backbone", None), "checkpoint", None)
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(
            f"the backbone's starting weights {path} do not exist; --cfg-options model.backbone.checkpoint=FILE tells "
            "another place, model.backbone.checkpoint=None starts from random weights"
        )


def _keep_regions_precise(model: nn.Module) -> None:
    """mmdetection turns regions to the dtype of the maps; bfloat16 would round coordinates to several pixels."""
    if hasattr(model, "roi_head") and hasattr(model, "neck"):
        model.neck.register_forward_hook(lambda _, __, maps: tuple(x.float() for x in maps))


def _move_data_root(parts: dict[str, Any]) -> None:
    """Replaces the data sets' root by the one at the top, which the command line may have changed."""
    new = parts.get("data_root")
    old = {dataset.get("data_root") for dataset in datasets_of(parts["train_dataloader"]["dataset"])}
    if new is None or len(old) != 1 or None in old or new in old:
        return
    (root,) = (str(place).rstrip("/") for place in old)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator"):
        if name in parts:
            parts[name] = _replace_prefix(parts[name], root, str(new).rstrip("/"))


def _replace_prefix(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _replace_prefix(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replace_prefix(item, old, new) for item in value)
    is_inside = isinstance(value, str) and (value.rstrip("/") == old or value.startswith(old + "/"))
    return new + value[len(old) :] if is_inside else value
