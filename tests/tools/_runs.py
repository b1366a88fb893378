"""A tiny data set and config for training tests: seconds a run on one core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CONFIG = """
data_root = {root!r}
model = dict(
    backbone=dict(name="test_vit", num_classes=3, img_size=32, drop_path_rate=0.2), label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        source=dict(type="image_folder", split="train"),
        transform=dict(is_training=True, input_size=32, auto_augment="rand-m9-mstd0.5", re_prob=0.5, re_mode="pixel"),
    ),
)
val_dataloader = dict(
    batch_size=4, dataset=dict(source=dict(type="image_folder", split="val"), transform=dict(input_size=32))
)
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=2, by_epoch=True, begin=1, end=3, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=3)
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1, update_buffers=True)]
"""


def write_images(root: Path, train: int = 6, val: int = 3, classes: int = 3, size: int = 36) -> Path:
    """An image folder with `train` and `val` images a class; each class has its own brightness."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (size, size, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def write_config(folder: Path, data: Path) -> Path:
    """The config above, for the data."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(root=str(data)))
    return path


def run_python(*arguments: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs this Python with one thread, in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
