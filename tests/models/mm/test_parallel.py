"""Replicas and shards, recomputed and compiled: the training of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _parallel_training import compare_with_one_process
from _processes import run_job
from torch import nn

from vitrail.models.mm.parallel import checkpoint_blocks

FAMILIES = ("biformer_n", "davit_t", "resnet18_ela_t", "vsa_swin_n")
COMPILED = ("davit_t",)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """With static graphs and checkpoints; an unused parameter would end the second step of replicas."""
    file = tmp_path / "differences.pt"
    done = run_job(2, compare_with_one_process, FAMILIES, COMPILED, file, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(file, weights_only=True)
    assert len(found) == 2 * (len(FAMILIES) + len(COMPILED))
    assert {way: differences for way, differences in found.items() if differences["weights"] > 1e-9} == {}
    assert all(differences["way"] > 1e-3 for differences in found.values())


def test_a_model_without_blocks_is_named() -> None:
    with pytest.raises(NotImplementedError, match="grad_checkpointing: Linear has no gradient checkpointing"):
        checkpoint_blocks(nn.Linear(1, 1), "grad_checkpointing")
