"""Checkpoints are whole or absent, and reading one runs no code."""

from __future__ import annotations

import errno
import os
import pickle
import random
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitrail.models.mm import checkpoint
from vitrail.models.mm.checkpoint import CheckpointError, atomic_write, load_strictly, read_checkpoint, read_weights


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(("writer", "verdict"), [("torch", "holds Python objects"), ("pickle", "is damaged")])
def test_pickled_code_is_not_run(tmp_path: Path, writer: str, verdict: str) -> None:
    harm, file = tmp_path / "harm", tmp_path / "bad.pth"
    content = {"state_dict": {"weight": torch.zeros(1)}, "extra": _Malicious(harm)}
    if writer == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=rf"bad\.pth {verdict}"):
        read_checkpoint(file)
    assert not harm.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"], ids=["empty", "cut"])
def test_damaged_file_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_noise_is_refused_whatever_it_spells(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"noise{suffix}"
    noise = random.Random(0)
    for _ in range(300):
        file.write_bytes(noise.randbytes(200))
        with pytest.raises(CheckpointError, match=r"damaged|holds"):
            read_checkpoint(file)


def test_folder_is_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "absent")


def test_weights_without_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        read_weights(tmp_path / "empty.pth")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "last.pth"
    atomic_write(file, b"old")
    monkeypatch.setattr(checkpoint.os, failing, fail)
    with pytest.raises(OSError, match="No space") as caught:
        atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pth"]
    assert caught.value.filename == str(file)


def test_misfits_are_named() -> None:
    model = nn.Linear(3, 2)
    weights = {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_strictly(model, weights, "some.pth")
    for part in ("some.pth", "missing bias", "unexpected extra", "weight is (2, 4), the model's is (2, 3)"):
        assert part in str(caught.value)


def test_exported_weights_load_into_timm(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    checkpoint.save_weights(model, tmp_path / "model.safetensors")
    loaded = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(tmp_path / "model.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
