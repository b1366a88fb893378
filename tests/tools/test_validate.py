"""The validation command: figures of made predictions, files, and bad input."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from vitrail.models.mm.checkpoint import save_weights
from vitrail.models.mm.metrics import ClassificationMetric, Predictions, judge
from vitrail.tools.train import main as train
from vitrail.tools.validate import main

_spec = importlib.util.spec_from_file_location("_vitrail_test_runs", Path(__file__).parent / "_runs.py")
_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_runs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run of one epoch; its data are in `data` beside it."""
    root = tmp_path_factory.mktemp("validate")
    config = _runs.write_config(root, _runs.write_images(root / "data"))
    folder = root / "run"
    arguments = [str(config), "--work-dir", str(folder), "--device", "cpu", "--cfg-options", "train_cfg.max_epochs=1"]
    assert train(arguments) == 0
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)


def test_agrees_with_the_training_run(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    trained = json.loads((run / "metrics.json").read_text())
    assert results["top1"] == trained["held_out"]["top1"]
    assert results["loss"] == pytest.approx(trained["held_out"]["loss"], rel=1e-5)
    assert results["per_class"] == trained["per_class"]
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["class0", "class1", "class2"]
    assert [int(row["images"]) for row in rows] == [3, 3, 3]


def test_batch_size_does_not_matter(run: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 100):
        assert main([str(run), "--device", "cpu", "--batch-size", str(size), "--output", str(tmp_path / "out")]) == 0
        found.append(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert {result["images"] for result in found} == {9}
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    assert found[2]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)


def test_model_name_with_checkpoint_and_folder(run: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    nn.init.zeros_(model.get_classifier().weight)
    model.get_classifier().bias.data = torch.tensor([0.0, 1.0, 0.0])
    save_weights(model, tmp_path / "weights.safetensors")
    arguments = ["test_resnet", "--device", "cpu", "--checkpoint", "weights.safetensors", "--output", "out"]
    for data in (run.parent / "data", run.parent / "data" / "val"):
        assert main([*arguments, "--data", str(data)]) == 0
        results = json.loads(Path("out/results.json").read_text())
        assert results["top1"] == pytest.approx(100 / 3)  # always says class1
        assert [row["recall"] for row in results["per_class"]] == [0.0, 100.0, 0.0]
        assert [row["precision"] for row in results["per_class"]] == [0.0, 33.333, 0.0]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["test_resnett", "--data", "DATA"], 2, "nearest names: test_resnet"),
        (["digits/biformer_m"], 2, "nearest names: digits/biformer_n"),
        (["test_resnet"], 2, "--data is needed"),
        (["test_resnet", "--data", "DATA"], 2, "--checkpoint FILE, or --pretrained"),
        (["test_resnet", "--data", "nowhere", "--checkpoint", "w.pth"], 1, "nowhere does not exist"),
        (["test_resnet", "--data", "DATA", "--checkpoint", "w.pth"], 1, "w.pth does not exist"),
        (["RUN", "--checkpoint", "bad.pth"], 1, "bad.pth is damaged"),
        (["RUN", "--checkpoint", "other.pth"], 1, "does not fit the model: missing cls_token"),
        (["RUN", "--data", "digits"], 1, "the data have 10 classes"),
        (["RUN", "--batch-size", "0"], 2, "at least 1"),
        (["RUN", "--device", "warp"], 2, "--device"),
        (["DATA"], 2, "not the work folder of a training run"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    if "digits" in arguments:
        pytest.importorskip("sklearn")
    Path("bad.pth").write_bytes(b"nonsense")
    torch.save({"weight": torch.zeros(1)}, "other.pth")
    places = {"DATA": str(run.parent / "data"), "RUN": str(run)}
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main([*(places.get(word, word) for word in arguments), *device, "--output", "out"]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()


def test_predictions_count_right() -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(40, 7)), dtype=torch.float32)
    labels = torch.tensor(rng.integers(0, 7, 40))
    places = torch.tensor(rng.permutation(40))
    none = torch.empty(0, dtype=torch.long)
    halves = [slice(0, 25), slice(25, 40)]
    found = Predictions.from_batches([judge(logits[half], labels[half], places[half], none) for half in halves])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert found.top1 == pytest.approx(100 * (ranks < 1).float().mean().item())
    assert found.top5 == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert found.indices.tolist() == list(range(40))
    assert found.labels[places].tolist() == labels.tolist()
    assert found.confusion(7).sum() == 40
    report = found.per_class([str(i) for i in range(7)])
    hits = (logits.argmax(dim=1) == labels) & (labels == 2)
    assert report[2]["recall"] == pytest.approx(100 * hits.sum().item() / (labels == 2).sum().item(), abs=1e-3)


def test_metric_refuses_lost_and_doubled_images() -> None:
    metric = ClassificationMetric()
    sample = {"logits": torch.eye(3), "labels": torch.arange(3), "unreadable": torch.empty(0, dtype=torch.long)}
    for places, size in ([0, 1, 1], 3), ([0, 1, 2], 4):
        metric.process(None, [{**sample, "indices": torch.tensor(places)}])
        with pytest.raises(RuntimeError, match="evaluated 3 images"):
            metric.evaluate(size)
    metric.process(None, [{**sample, "indices": torch.arange(3)}])
    assert metric.evaluate(3)["accuracy/top1"] == 100.0
