"""Tries the parts of a detector's or segmenter's config before a run makes its folder, and names the one that is wrong.

mmengine builds loops, schedules and hooks when a training starts, and says of wrong ones what Python happens to say.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, LOOPS, METRICS, OPTIMIZERS, PARAM_SCHEDULERS
from torch import nn

from vitrail.models.mm.value_types import check_value_types

_IOU_METRICS = ("mIoU", "mDice", "mFscore")
_REGISTRIES = {
    "param_scheduler": PARAM_SCHEDULERS,
    "default_hooks": HOOKS,
    "custom_hooks": HOOKS,
    "val_evaluator": METRICS,
}
_MISTAKES = (KeyError, TypeError, AssertionError, AttributeError, ValueError, ZeroDivisionError)


@contextmanager
def blaming(part: str) -> Iterator[None]:
    """A context whose errors become a ValueError that names the config's part.

    Args:
        part: Its key, such as "optim_wrapper".

    Raises:
        ValueError: What was raised inside is what wrong values bring about.
    """
    try:
        yield
    except _MISTAKES as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = text.split(" Please check whether")[0]
        place = traceback.extract_tb(error.__traceback__)[-1]  # many assertions of the libraries say nothing
        clear = isinstance(error, (KeyError, ValueError)) or "argument" in text
        where = "" if clear else f" ({place.name} of {Path(place.filename).name})"
        raise ValueError(f"{part}: {text or place.line}{where}") from error


def check_settings(config: Config) -> None:
    """Looks at numbers that mmengine takes as they are.

    Raises:
        ValueError: One is out of range.
    """
    _check_lengths(config.train_cfg)
    for name, hook in (config.get("default_hooks") or {}).items():
        if hook is not None and "interval" in hook and not _is_count(hook["interval"]):
            raise ValueError(f"default_hooks.{name}.interval is {hook['interval']!r}; allowed: integers of at least 1")
    for name in ("train_dataloader", "val_dataloader"):
        check_loader(config, name)
    check_metric(config, "val_evaluator")
    seed = config.randomness.get("seed")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"randomness.seed is {seed!r}; allowed: integers from 0 to 2^32 - 1")
    _check_crops(config)
    _check_padding(config)


def check_loader(config: Config, name: str) -> None:
    """Raises ValueError where a loader's batch size or number of workers is no such number."""
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        value = config[name].get(key, least)
        if not (_is_count(value) or (value == least and isinstance(value, int))):
            raise ValueError(f"{name}.{key} is {value!r}; allowed: integers of at least {least}")


def check_metric(config: Config, name: str) -> None:
    """Raises ValueError where mmsegmentation's metric is asked for a score that it would refuse after a validation."""
    given = config[name]
    for metric in given if isinstance(given, (list, tuple)) else [given]:
        asked = metric.get("iou_metrics", ["mIoU"]) if metric.get("type") == "IoUMetric" else []
        wrong = [score for score in asked if score not in _IOU_METRICS]
        if wrong:
            raise ValueError(
                f"{name}.iou_metrics has {', '.join(map(repr, wrong))}; allowed: {', '.join(_IOU_METRICS)}"
            )


def _check_lengths(loop: Mapping[str, Any]) -> None:
    iterative = "Iter" in str(loop.get("type", "")) or not loop.get("by_epoch", True)
    length = "max_iters" if iterative else "max_epochs"
    for name in (length, "val_interval"):
        if not _is_count(loop.get(name, 1)):
            raise ValueError(f"train_cfg.{name} is {loop[name]!r}; allowed: integers of at least 1")
    if length not in loop and loop.get("type") in (None, "EpochBasedTrainLoop", "IterBasedTrainLoop"):
        raise ValueError(f"train_cfg has no {length}")
    with blaming("train_cfg"):
        if "type" in loop:
            kind = LOOPS.get(loop["type"])
            if kind is None:
                raise ValueError(f"type {loop['type']!r} does not exist")
            inspect.signature(kind).bind(None, None, **{name: loop[name] for name in loop if name != "type"})


def _check_crops(config: Config) -> None:
    """Crops may be smaller than the size to which the model pads them, not larger."""
    size = config.model.get("data_preprocessor", {}).get("size")
    if size is None:
        return
    if not _is_size(size):
        raise ValueError(f"model.data_preprocessor.size is {size!r}; allowed: (height, width)")
    for step in config.train_dataloader.dataset.get("pipeline") or ():
        crop = step.get("crop_size") if step["type"] == "RandomCrop" else None
        if _is_size(crop) and (crop[0] > size[0] or crop[1] > size[1]):
            raise ValueError(
                f"the training's RandomCrop has crop_size {tuple(crop)}, which does not fit into "
                f"model.data_preprocessor.size {tuple(size)}"
            )


def _check_padding(config: Config) -> None:
    """What masks are padded with has to be what a segmenter's loss leaves out."""
    head = config.model.get("decode_head")
    if config.default_scope != "mmseg" or not isinstance(head, Mapping):
        return
    padding, ignored = config.model.get("data_preprocessor", {}).get("seg_pad_val", 255), head.get("ignore_index", 255)
    if padding != ignored:
        raise ValueError(
            f"model.decode_head.ignore_index is {ignored}, but masks are padded with "
            f"model.data_preprocessor.seg_pad_val={padding}: they must be the same"
        )


def check_channels(model: nn.Module) -> None:
    """Compares what the backbone makes with what neck and heads expect.

    Raises:
        ValueError: The numbers of channels differ.
    """
    made = getattr(getattr(model, "backbone", None), "channels", None)
    if not isinstance(made, Sequence):
        return
    made = list(made)
    neck = getattr(getattr(model, "neck", None), "in_channels", None)
    if neck is not None:
        _compare("neck", neck, made)
    if getattr(model, "neck", None) is not None:
        return
    for name in ("decode_head", "auxiliary_head"):
        head = getattr(model, name, None)
        expected, index = getattr(head, "in_channels", None), getattr(head, "in_index", None)
        if isinstance(expected, int) and isinstance(index, int):
            expected, index = [expected], [index]
        if isinstance(expected, Sequence) and isinstance(index, Sequence):
            if max(index) >= len(made):
                raise ValueError(f"model.{name}.in_index is {list(index)}, the backbone makes {len(made)} maps")
            _compare(name, expected, [made[i] for i in index])


def _compare(part: str, expected: Sequence[int], made: list[int]) -> None:
    if list(expected) != made:
        raise ValueError(f"model.{part}.in_channels is {list(expected)}, the backbone's maps have {made} channels")


def check_builds(config: Config, wrapper: Mapping[str, Any], model: nn.Module) -> None:
    """Builds optimiser, schedules, hooks and metric as the run will; the library's scope must be the default.

    Raises:
        ValueError: One of them cannot be built.
    """
    kind = wrapper.get("optimizer", {}).get("type")
    with blaming("optim_wrapper"):
        if OPTIMIZERS.get(str(kind)) is None:
            raise ValueError(f"optimizer type {kind!r} does not exist")
        built = build_optim_wrapper(model, copy.deepcopy(dict(wrapper)))
        if getattr(built, "clip_grad_kwargs", None):
            inspect.signature(built.clip_func).bind([], **built.clip_grad_kwargs)
    parts = config.to_dict()
    for name, registry in _REGISTRIES.items():
        check_value_types(name, parts.get(name), (registry,))
    for number, schedule in enumerate(parts.get("param_scheduler") or ()):
        schedule = {name: value for name, value in schedule.items() if name != "convert_to_iter_based"}
        with blaming(f"param_scheduler.{number}"):
            PARAM_SCHEDULERS.build({**schedule, "optimizer": built.optimizer})
    for name, hook in parts["default_hooks"].items():
        if hook is not None:
            with blaming(f"default_hooks.{name}"):
                HOOKS.build(hook)
    for number, hook in enumerate(parts.get("custom_hooks") or ()):
        if isinstance(hook, Mapping):
            with blaming(f"custom_hooks.{number}"):
                HOOKS.build(dict(hook))
    with blaming("val_evaluator"):
        Evaluator(parts["val_evaluator"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_count, value))
