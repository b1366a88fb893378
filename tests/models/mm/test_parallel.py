"""Replicas and shards, recomputed and compiled: the training of one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _parallel_training import compare_with_one_process
from _processes import run_job
from torch import nn

from vitrail.models.mm.parallel import checkpoint_blocks
from vitrail.models.mm.runner import ClassificationRunner

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


@pytest.mark.parametrize("blocks", [True, False])
def test_blocks_are_compiled_or_else_the_whole_model(blocks: bool) -> None:
    model = nn.Module()
    part = nn.Linear(1, 1)
    model.add_module("blocks" if blocks else "head", nn.Sequential(part) if blocks else part)
    ClassificationRunner._maybe_compile(SimpleNamespace(cfg={"compile": {"backend": "eager"}}, model=model), "train")
    assert (part._compiled_call_impl is not None) == blocks
    assert (model._compiled_call_impl is not None) == (not blocks)
