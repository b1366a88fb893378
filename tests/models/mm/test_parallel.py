"""Replicas and shards of every family, recomputed and compiled: the training of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _families import SMALLEST, build
from _parallel_training import compare_with_one_process
from _processes import run_job
from mmengine.model import MMDistributedDataParallel
from torch import nn

from vitrail.models.mm.classifier import TimmClassifier
from vitrail.models.mm.parallel import find_blocks, replicate

COMPILED = ("biformer_n",)


def test_two_processes_train_every_family_as_one(tmp_path: Path) -> None:
    """With static graphs and checkpoints; an unused parameter would end the second step of replicas."""
    file = tmp_path / "differences.pt"
    done = run_job(2, compare_with_one_process, list(SMALLEST), COMPILED, file, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(file, weights_only=True)
    assert len(found) == 2 * (len(SMALLEST) + len(COMPILED))
    assert {way: difference for way, difference in found.items() if difference > 1e-9} == {}
