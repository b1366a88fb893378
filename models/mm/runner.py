"""Puts a training config together and runs it with mmengine's Runner."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import broadcast, get_dist_info, is_distributed, is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitrail.models.mm import datasets, hooks, metrics, optim, samplers, sharding  # noqa: F401 -- they register their parts
from vitrail.models.mm.checkpoint import CheckpointError, atomic_write, load_strictly, read_checkpoint
from vitrail.models.mm.classifier import check_fits
from vitrail.models.mm.parallel import find_blocks, is_sharded, replicate, shard
from vitrail.models.mm.seeding import seed_everything

# What every run has, unless its config says otherwise.
DEFAULTS: dict[str, Any] = {
    "randomness": {"seed": 0},
    "train_cfg": {"by_epoch": True, "val_interval": 1},
    "val_cfg": {},
    "val_evaluator": {"type": "ClassificationMetric"},
    "train_dataloader": {
        "num_workers": 0,
        "dataset": {"type": "ClassificationDataset"},
        "sampler": {"type": "ShuffledSampler"},
        "batch_sampler": {"type": "WholeStepBatchSampler"},
        "collate_fn": {"type": "collate_classification", "replace_unreadable": True},
    },
    "val_dataloader": {
        "num_workers": 0,
        "dataset": {"type": "ClassificationDataset"},
        "sampler": {"type": "EverySampler"},
        "collate_fn": {"type": "collate_classification", "replace_unreadable": False},
    },
    "model": {"type": "TimmClassifier"},
    "optim_wrapper": {"type": "OptimWrapper", "constructor": "TimmOptimWrapperConstructor", "accumulative_counts": 1},
    "default_hooks": {
        "logger": {"type": "LoggerHook", "interval": 20},
        "checkpoint": {"type": "AtomicCheckpointHook", "interval": 1},
    },
    "custom_hooks": [],
}
_OWN_HOOKS = ("IterationSeedHook", "AverageBuffersHook", "CurveHook", "UnreadableImagesHook")
_REQUIRED = ("model", "train_dataloader", "val_dataloader", "optim_wrapper", "train_cfg")
_KNOWN = (*DEFAULTS, "data_root", "param_scheduler", "auto_scale_lr", "env_cfg", "sync_bn", "find_unused_parameters",
          "ddp", "visualizer", "log_processor", "load_from", "compile", "default_scope")  # fmt: skip
_DDP_OPTIONS = ("bucket_cap_mb", "static_graph")


class DeviceRunner(Runner):
    """mmengine's Runner on a chosen device, with atomic and safe checkpoints and a quiet terminal.

    Args:
        device: Where to train.
        sharded: Spread weights, gradients and optimiser state over the processes.
        amp: "bf16" or "fp16" for mixed precision, None for float32.
        *args, **kwargs: Of mmengine's Runner.
    """

    def __init__(
        self, *args: Any, device: torch.device, sharded: bool = False, amp: str | None = None, **kwargs: Any
    ) -> None:
        self.device = device
        self.sharded, self.amp = sharded, amp
        self.is_training = False
        self.whole_parts: dict[str, Any] = {}  # of a sharded checkpoint that is being written
        super().__init__(*args, **kwargs)

    def train(self) -> nn.Module:
        """Trains from the start or from where the checkpoint left off."""
        self.is_training = True
        try:
            return super().train()
        finally:
            self.is_training = False

    def wrap_model(self, model_wrapper_cfg: Mapping[str, Any] | None, model: nn.Module) -> nn.Module:
        """Moves the model to the device and, with several processes, joins it to theirs."""
        model = model.to(self.device)
        if not is_distributed():
            return model
        sync_bn = bool(self.cfg.get("sync_bn"))
        if self.sharded:
            if hasattr(model, "init_weights"):
                model.init_weights()
            for tensor in model.state_dict().values():
                broadcast(tensor)
            precision = optim.AUTOCAST_DTYPES[self.amp] if self.amp else None
            return shard(model, self.device, precision=precision, sync_bn=sync_bn)
        unused = bool(self.cfg.get("find_unused_parameters"))
        options = {"static_graph": self.has_static_graph() and not unused, **(self.cfg.get("ddp") or {})}
        return replicate(model, self.device, find_unused_parameters=unused, sync_bn=sync_bn, **options)

    def has_static_graph(self) -> bool:
        """Whether every iteration surely gives the same parameters their gradients, in one backward pass."""
        return False

    def _init_model_weights(self) -> None:
        if not is_sharded(self.model):  # which has been initialised before it was taken apart
            super()._init_model_weights()

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """mmengine's logger; its chatter goes to the log file alone."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        return logger

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads weights (and hands the rest to the hooks) without running code from the file.

        Raises:
            CheckpointError: The file is damaged, holds objects, or does not fit the model or the purpose.
        """
        checkpoint = read_checkpoint(filename)
        wanted = {"meta", "state_dict", "message_hub", "optimizer"} if self._resume else {"state_dict"}
        if not wanted <= checkpoint.keys():
            lacking = ", ".join(sorted(wanted - checkpoint.keys()))
            raise CheckpointError(f"checkpoint {filename} has no {lacking}; resuming needs a last.pth of this tool")
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        self.load_weights(checkpoint["state_dict"], filename)
        if is_sharded(self.model) and self._resume:
            checkpoint["optimizer"] = sharding.distribute_state(self.optim_wrapper.optimizer, checkpoint["optimizer"])
        return checkpoint

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Loads weights into the model.

        Raises:
            CheckpointError: They do not fit; the message names `source`.
        """
        load_strictly(unwrap(self.model), weights, source)

    def save_checkpoint(self, out_dir: str, filename: str, **kwargs: Any) -> None:
        """Saves atomically; of a sharded model, every process its part."""
        shards = None
        if is_sharded(self.model):
            if kwargs.get("save_optimizer", True):
                shards = Path(out_dir) / f"{Path(filename).stem}-{kwargs['meta']['iter']:08d}.{sharding.SHARDS}"
            self.whole_parts = sharding.collect_whole_parts(self.model, self.optim_wrapper, shards)
        super().save_checkpoint(out_dir, filename, **{**kwargs, "backend_args": {"backend": "atomic"}})
        self.whole_parts = {}
        if shards is not None and is_main_process():
            sharding.remove_old_shards(Path(out_dir), keep=shards.name)

    @master_only
    def dump_config(self) -> None:
        """Writes the complete config to `config.py` in the work folder."""
        atomic_write(Path(self.work_dir) / "config.py", self.cfg.pretty_text)


class ClassificationRunner(DeviceRunner):
    """Runs epochs, each of which may end with a validation."""

    def has_static_graph(self) -> bool:
        """Accumulation has several backward passes, and a compiled model is split in its own way."""
        return self.cfg.optim_wrapper.accumulative_counts == 1 and not self.cfg.get("compile")

    def _maybe_compile(self, target: str) -> None:
        """Compiles the classifier's blocks, where mmengine would compile the optimizer and the logging with them.

        What joins the processes stays between the graphs: shards are gathered for a block and given up after it.
        """
        options = self.cfg.get("compile")
        if options not in (None, False):
            for part in find_blocks(self.model) or [self.model]:
                part.compile(**({} if options is True else options))

    def validation_follows(self) -> bool:
        """Whether the epoch that is being trained ends with a validation."""
        return self._validates_after(self.epoch + 1)

    def validations_left(self, iterations_done: int) -> int:
        """Number of validations still to come."""
        first = -(-iterations_done // (self.max_iters // self.max_epochs)) or 1
        return sum(self._validates_after(epoch) for epoch in range(first, self.max_epochs + 1))

    def _validates_after(self, epoch: int) -> bool:
        return epoch >= self.val_begin and (epoch % self.val_interval == 0 or epoch == self.max_epochs)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper, or itself."""
    return model.module if is_model_wrapper(model) else model


def complete_config(config: Config) -> Config:
    """Adds `DEFAULTS` where the config is silent.

    Raises:
        ValueError: The config lacks a required part or has an unknown one.
    """
    given = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    lacking = [name for name in _REQUIRED if name not in given]
    unknown = [name for name in given if name not in _KNOWN]
    if lacking:
        raise ValueError(f"the config has no {', '.join(lacking)}")
    if unknown:
        raise ValueError(f"the config has unknown parts: {', '.join(unknown)}; allowed: {', '.join(sorted(_KNOWN))}")
    full = _merge(DEFAULTS, given)
    for name in ("train_dataloader", "val_dataloader"):
        source = full[name]["dataset"]["source"]
        if source["type"] != "digits":
            source.setdefault("root", full.get("data_root", "data"))
    return Config(full, filename=config.filename)


def build_loader(config: Mapping[str, Any], seed: int, device: torch.device, accumulate: int = 1) -> DataLoader:
    """Builds one loader of a completed config."""
    config = copy.deepcopy(dict(config))
    config["dataset"].setdefault("seed", seed)
    if "batch_sampler" in config:
        config["batch_sampler"].setdefault("accumulate", accumulate)
    config["pin_memory"] = device.type == "cuda"
    config["persistent_workers"] = config["num_workers"] > 0
    try:
        return Runner.build_dataloader(config, seed=seed)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise type(error)(f"{error} (the config's data_root)") from error


def build_dataset(config: Mapping[str, Any]) -> datasets.ClassificationDataset:
    """Builds a data set alone, without a loader.

    Raises:
        ValueError: An argument is unknown.
        OSError: The data are missing.
    """
    arguments = {name: value for name, value in config.items() if name != "type"}
    try:
        return datasets.ClassificationDataset(**arguments)
    except TypeError as error:
        raise ValueError(f"data set: {error}") from error


def build_classifier(config: Mapping[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Builds the `TimmClassifier` of a completed config and tries it on an image of zeros.

    Raises:
        ValueError: An argument is unknown, or the model does not fit the data.
    """
    try:
        model = MODELS.build(copy.deepcopy(dict(config)))
    except TypeError as error:
        raise ValueError(f"model: {error}") from error
    check_fits(model.backbone, image_shape, num_classes)
    return model


def check_same_classes(train: Any, val: Any) -> None:
    """Raises ValueError unless both data sets have the same classes."""
    if list(train.source.classes) != list(val.source.classes):
        differ = sorted(set(train.source.classes) ^ set(val.source.classes))
        raise ValueError(
            f"training data have {len(train.source.classes)} classes, validation data {len(val.source.classes)}; "
            f"{len(differ)} are in one only: {', '.join(differ[:5])}"
        )


def optimizer_config(config: Config, device: torch.device, amp: str | None) -> dict[str, Any]:
    """The `optim_wrapper` part with precision chosen and the learning rate scaled to the batch of all processes."""
    wrapper = copy.deepcopy(config.to_dict()["optim_wrapper"])
    if amp is not None:
        wrapper.update(type="AutocastOptimWrapper", precision=amp, device_type=device.type)
    base_batch = (config.get("auto_scale_lr") or {}).get("base_batch_size")
    if base_batch:
        batch = config.train_dataloader.batch_size * wrapper["accumulative_counts"] * get_dist_info()[1]
        wrapper["optimizer"]["lr"] *= batch / base_batch
    return wrapper


def build_runner(
    config: Config,
    work_dir: str,
    device: torch.device,
    launcher: str = "none",
    amp: str | None = None,
    resume_from: str | None = None,
    display: Hook | None = None,
    before_writing: Callable[[], None] | None = None,
    sharded: bool = False,
) -> ClassificationRunner:
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
        sharded: Spread weights, gradients and optimiser state over the processes.

    Raises:
        ValueError: The config, the data and the model do not fit together.
        OSError: Data or checkpoint are missing.
    """
    try:
        config = complete_config(config)
        _check_parallel(config, sharded)
        model, loaders = _build_parts(config, device)
        wrapper = optimizer_config(config, device, amp)
        _check_builds(config, wrapper, model)
        if resume_from is not None:
            read_checkpoint(resume_from)
        if before_writing is not None:
            before_writing()
        return _assemble(
            config, wrapper, model, loaders, work_dir, device, launcher, resume_from, display, sharded, amp
        )
    except KeyError as error:  # mmengine's registry, for a `type` that does not exist
        raise ValueError(f"config: {error.args[0]}") from error


def check_data(config: Config) -> list[datasets.ClassificationDataset]:
    """The training and validation data of a config, which have the same classes, as many as the model tells apart.

    Raises:
        ValueError: The config, the data and the model do not fit together.
        OSError: The data are missing.
    """
    try:
        config = complete_config(config)
        return [loader.dataset for loader in _build_parts(config, torch.device("cpu"))[1]]
    except KeyError as error:
        raise ValueError(f"config: {error.args[0]}") from error


def _build_parts(config: Config, device: torch.device) -> tuple[nn.Module, tuple[DataLoader, DataLoader]]:
    seed = config.randomness.seed
    seed_everything(seed)
    train_loader = build_loader(config.train_dataloader, seed, device, config.optim_wrapper.accumulative_counts)
    val_loader = build_loader(config.val_dataloader, seed, device)
    check_same_classes(train_loader.dataset, val_loader.dataset)
    classes = len(train_loader.dataset.source.classes)
    model = build_classifier(config.model, train_loader.dataset.image_shape, classes)
    check_fits(model.backbone, val_loader.dataset.image_shape, classes)
    return model, (train_loader, val_loader)


def _check_builds(config: Config, wrapper: Mapping[str, Any], model: nn.Module) -> None:
    """Tries what mmengine would otherwise build (and refuse) only after the work folder is made."""
    optim.TimmOptimWrapperConstructor({"optimizer": wrapper["optimizer"]}).build_optimizer(model)
    for scheduler in config.get("param_scheduler") or []:
        if PARAM_SCHEDULERS.get(scheduler["type"]) is None:
            raise ValueError(f"param_scheduler type {scheduler['type']!r} does not exist")
    for hook in [*config.custom_hooks, *config.default_hooks.values()]:
        if hook is not None and HOOKS.get(hook["type"]) is None:
            raise ValueError(f"hook type {hook['type']!r} does not exist")


def _check_parallel(config: Config, sharded: bool) -> None:
    """Raises ValueError for what would only fail when the processes are joined."""
    wrong = [name for name in config.get("ddp") or {} if name not in _DDP_OPTIONS]
    if wrong:
        raise ValueError(f"the config's ddp has {', '.join(wrong)}; allowed: {', '.join(_DDP_OPTIONS)}")
    if not isinstance(config.get("compile"), (bool, dict, type(None))):
        raise ValueError(
            f"the config's compile is {config.compile!r}; allowed: True, False or a dict of torch.compile's arguments"
        )
    if sharded and any("EMA" in str(hook["type"]) for hook in config.custom_hooks):
        raise ValueError("--sharded keeps no averaged copy of the weights; leave out the EMAHook (custom_hooks=[])")


def _assemble(
    config: Config,
    wrapper: dict[str, Any],
    model: nn.Module,
    loaders: tuple[DataLoader, DataLoader],
    work_dir: str,
    device: torch.device,
    launcher: str,
    resume_from: str | None,
    display: Hook | None,
    sharded: bool,
    amp: str | None,
) -> ClassificationRunner:
    parts = config.to_dict()
    own_hooks = [{"type": name} for name in (*_OWN_HOOKS, *(["ShardsHook"] if sharded else []))]
    return ClassificationRunner(
        model=model,
        work_dir=work_dir,
        device=device,
        sharded=sharded,
        amp=amp,
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        train_cfg=parts["train_cfg"],
        val_cfg=parts["val_cfg"],
        val_evaluator=parts["val_evaluator"],
        optim_wrapper=wrapper,
        param_scheduler=parts.get("param_scheduler"),
        default_hooks=parts["default_hooks"],
        custom_hooks=own_hooks + parts["custom_hooks"] + ([display] if display else []),
        load_from=resume_from or parts.get("load_from"),
        resume=resume_from is not None,
        launcher=launcher,
        env_cfg=parts.get("env_cfg", {}),
        visualizer=parts.get("visualizer") or default_visualizer(),
        randomness=parts["randomness"],
        experiment_name=f"vitrail-{uuid.uuid4().hex[:8]}",  # mmengine keeps loggers and histories by this name
        cfg=config,
    )


def default_visualizer() -> dict[str, Any]:
    """Scalars to a JSON file, and to TensorBoard where it is installed."""
    backends = ["LocalVisBackend"]
    if importlib.util.find_spec("tensorboard"):
        backends.append("TensorboardVisBackend")
    return {"type": "Visualizer", "vis_backends": [{"type": name} for name in backends]}


def start_processes(launcher: str, device: torch.device) -> torch.device:
    """Joins the process group that torchrun describes in the environment; returns this process's device.

    gloo on CPUs, NCCL on GPUs (mmengine's own start would ask for a GPU in any case).

    Raises:
        ValueError: The environment does not come from torchrun, or does although nobody asked for it; or there are more
            processes than GPUs.
    """
    if launcher == "none":
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, each of which would train alone; "
                "add --launcher pytorch"
            )
        return device
    lacking = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if lacking:
        raise ValueError(
            f"--launcher pytorch needs torchrun; the environment lacks {', '.join(lacking)}; start with "
            "torchrun --standalone --nproc-per-node N -m vitrail.tools.train ..."
        )
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine has no GPU; allowed: --nproc-per-node of at most {gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def _merge(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(defaults))
    for name, value in given.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else copy.deepcopy(value)
    return merged
