"""Data sets and samplers: what comes out depends on (seed, epoch, place) alone, and nothing is lost or doubled."""

from __future__ import annotations

import hashlib
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from vitrail.models.mm import samplers
from vitrail.models.mm.datasets import ClassificationDataset, SampleKey, build_source, collate_classification
from vitrail.models.mm.images import UnreadableImageError
from vitrail.models.mm.samplers import EverySampler, RepeatedSampler, ShuffledSampler, WholeStepBatchSampler

TRANSFORM = {"is_training": True, "input_size": 32, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5,
             "re_mode": "pixel"}  # fmt: skip


def _folder(root: Path, per_class: int = 3, classes: str = "ab") -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def _dataset(root: Path, **options: Any) -> ClassificationDataset:
    return ClassificationDataset({"type": "image_folder", "root": str(root), "split": "train"}, TRANSFORM, **options)


def _collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return collate_classification(samples, replace_unreadable=True)


def _on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(samplers, "get_dist_info", lambda: (rank, world_size))


def test_sample_depends_on_its_key_alone(tmp_path: Path) -> None:
    dataset = _dataset(_folder(tmp_path), seed=3)
    key = SampleKey(epoch=2, position=4, index=1)
    first = dataset[key]["images"]
    random.random(), torch.rand(3), np.random.rand(2)  # noqa: NPY002
    assert torch.equal(dataset[key]["images"], first)
    for other in (key._replace(epoch=3), key._replace(position=5)):
        assert not torch.equal(dataset[other]["images"], first)
    assert not torch.equal(_dataset(tmp_path, seed=4)[key]["images"], first)


def test_sample_leaves_the_generators_alone(tmp_path: Path) -> None:
    dataset = _dataset(_folder(tmp_path))
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    dataset[SampleKey(0, 0, 0)]
    assert torch.equal(torch.rand(2), expected)


def test_workers_do_not_change_the_batches(tmp_path: Path) -> None:
    dataset = _dataset(_folder(tmp_path))

    def batches(workers: int) -> list[torch.Tensor]:
        sampler = ShuffledSampler(dataset, seed=1)
        loader = DataLoader(dataset, 2, sampler=sampler, num_workers=workers, collate_fn=_collate,
                            persistent_workers=workers > 0)  # fmt: skip
        found = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            found += [batch["images"] for batch in loader]
        return found

    for alone, together in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize(("length", "world", "batch"), [(12, 2, 3), (13, 2, 2), (31, 3, 4)])
def test_processes_share_the_batches_of_one(
    monkeypatch: pytest.MonkeyPatch, length: int, world: int, batch: int
) -> None:
    def epoch_batches(rank: int, world_size: int, size: int) -> list[list[SampleKey]]:
        _on_rank(monkeypatch, rank, world_size)
        sampler = ShuffledSampler(range(length), seed=5)
        sampler.set_epoch(7)
        return list(WholeStepBatchSampler(sampler, size))

    alone = epoch_batches(0, 1, batch * world)
    parts = [epoch_batches(rank, world, batch) for rank in range(world)]
    assert {len(part) for part in parts} == {len(alone)}
    for step, whole in enumerate(alone):
        assert sorted(key for part in parts for key in part[step]) == sorted(whole)


@pytest.mark.parametrize("sampler_class", [ShuffledSampler, RepeatedSampler])
def test_order_changes_with_epoch_and_seed(sampler_class: type) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = sampler_class(range(300), seed=seed)
        sampler.set_epoch(epoch)
        return [key.index for key in sampler]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(1, 2) != order(2, 1)


@pytest.mark.parametrize(("length", "world"), [(10, 3), (2, 3), (7, 1)])
def test_evaluation_sees_every_image_once(monkeypatch: pytest.MonkeyPatch, length: int, world: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        _on_rank(monkeypatch, rank, world)
        sampler = EverySampler(range(length))
        part = [key.index for key in sampler]
        assert len(part) == len(sampler)
        seen += part
    assert sorted(seen) == list(range(length))


def test_repeated_augmentation_repeats_with_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[SampleKey] = []
    for rank in range(2):
        _on_rank(monkeypatch, rank, 2)
        sampler = RepeatedSampler(range(300), seed=1, num_repeats=3)
        sampler.set_epoch(4)
        keys += list(sampler)
    counts = Counter(key.index for key in keys)
    assert set(counts.values()) <= {1, 2, 3}
    assert Counter(counts.values())[3] >= 80
    assert len({key.position for key in keys}) == len(keys) == 256
    _on_rank(monkeypatch, 0, 2)
    other = RepeatedSampler(range(300), seed=2, num_repeats=3)
    other.set_epoch(4)
    assert [key.index for key in other] != [key.index for key in keys[: len(other)]]


@pytest.mark.parametrize(("images", "batch", "accumulate", "expected"), [(50, 4, 1, 12), (50, 4, 5, 10), (8, 8, 1, 1)])
def test_epochs_end_with_a_whole_step(images: int, batch: int, accumulate: int, expected: int) -> None:
    sampler = WholeStepBatchSampler(ShuffledSampler(range(images)), batch, accumulate)
    assert len(sampler) == expected == len(list(sampler))


def test_too_few_images_for_a_step() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        WholeStepBatchSampler(ShuffledSampler(range(7)), 8)


def test_unreadable_image_stops_or_is_skipped(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"nonsense")
    with pytest.raises(UnreadableImageError, match=r"1\.png"):
        _dataset(tmp_path)[1]
    dataset = _dataset(tmp_path, unreadable="skip")
    samples = [dataset[i] for i in range(3)]
    replaced = collate_classification(samples, replace_unreadable=True)
    assert len(replaced["images"]) == 3
    assert replaced["indices"].tolist() == [0, 2, 0]
    left_out = collate_classification(samples, replace_unreadable=False)
    assert left_out["indices"].tolist() == [0, 2]
    assert left_out["unreadable"].tolist() == replaced["unreadable"].tolist() == [1]


def test_batch_without_a_readable_image(tmp_path: Path) -> None:
    _folder(tmp_path)
    for path in (tmp_path / "train" / "a").iterdir():
        path.write_bytes(b"nonsense")
    dataset = _dataset(tmp_path, unreadable="skip")
    samples = [dataset[i] for i in range(3)]
    with pytest.raises(ValueError, match="none of the 3 images of a training batch"):
        collate_classification(samples, replace_unreadable=True)
    empty = collate_classification(samples, replace_unreadable=False)
    assert {name: len(values) for name, values in empty.items()} == {
        "images": 0, "labels": 0, "indices": 0, "unreadable": 3
    }  # fmt: skip
    assert empty["labels"].dtype == empty["indices"].dtype == torch.int64


def test_hidden_folders_and_files_are_left_out(tmp_path: Path) -> None:
    _folder(tmp_path)
    image = tmp_path / "train" / "a" / "0.png"
    for place in (".cache", "a/.thumbnails"):
        (tmp_path / "train" / place).mkdir()
        shutil.copy(image, tmp_path / "train" / place)
    shutil.copy(image, image.with_name("._0.png"))
    source = build_source({"type": "image_folder", "root": str(tmp_path), "split": "train"})
    assert source.classes == ["a", "b"]
    assert [source.name(i) for i in range(len(source.labels))] == [f"{name}/{i}.png" for name in "ab" for i in range(3)]
    (tmp_path / "only" / "val" / ".cache").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no class folders"):
        build_source({"type": "image_folder", "root": str(tmp_path / "only"), "split": "val"})


def test_digits_split_is_stratified_and_fixed() -> None:
    pytest.importorskip("sklearn")
    train, val = (build_source({"type": "digits", "split": split}) for split in ("train", "val"))
    assert (len(train.labels), len(val.labels)) == (1437, 360)
    names = {source.name(i) for source in (train, val) for i in range(len(source.labels))}
    assert len(names) == 1797
    assert set(Counter(val.labels).values()) <= {35, 36, 37}
    assert val.load(0).size == (32, 32)
    assert [val.name(i) for i in range(3)] == [
        build_source({"type": "digits", "split": "val"}).name(i) for i in range(3)
    ]


def test_cifar10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", {"data": pixels, "labels": [3, 5]})])
    monkeypatch.setattr(CIFAR10, "train_list", [])
    name, digest = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    source = build_source({"type": "cifar10", "root": str(tmp_path), "split": "val"})
    assert list(source.labels) == [3, 5]
    assert np.array_equal(np.asarray(source.load(1)), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
    (folder / "test_batch").write_bytes(b"tampered")
    with pytest.raises(FileNotFoundError, match="no intact CIFAR-10"):
        build_source({"type": "cifar10", "root": str(tmp_path), "split": "val"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "folder", "split": "train"}, "allowed: cifar10, digits, image_folder"),
        ({"type": "image_folder", "root": "x", "split": "dev"}, "split is 'dev'"),
        ({"type": "digits", "split": "val", "root": "x"}, "unexpected keyword"),
    ],
)
def test_wrong_source_is_explained(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_source(source)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build_source({"type": "image_folder", "root": str(tmp_path / "no"), "split": "train"})
    with pytest.raises(FileNotFoundError, match="no folder train"):
        build_source({"type": "image_folder", "root": str(tmp_path), "split": "train"})
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file, expected a folder"):
        build_source({"type": "image_folder", "root": str(tmp_path / "file"), "split": "train"})
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="have no image: a"):
        build_source({"type": "image_folder", "root": str(tmp_path), "split": "train"})
