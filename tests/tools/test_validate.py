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
from vitrail.models.mm.metrics import ClassificationMetric, Predictions, judge, lowest_classes
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
        (["test_resnet", "--data", "bad.pth", "--checkpoint", "w.pth"], 1, "bad.pth is a file, expected a folder"),
        (["test_resnet", "--data", "DATA", "--checkpoint", "RUN"], 1, "is a folder, expected a file"),
        (["mobilenetv2_ela_b", "--data", "DATA", "--pretrained"], 2, "no weights for mobilenetv2_ela_b"),
        (["test_resnet.no_tag", "--data", "DATA", "--pretrained"], 2, "tag (no_tag)"),
        (["RUN", "--batch-size", "0"], 2, "at least 1"),
        (["RUN", "--workers", "-1"], 2, "--workers is -1; allowed: at least 0"),
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
    assert "data_root" not in error
    assert not Path("out").exists()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The data of `run`, two whole classes of which (more than a batch) are damaged in `val`."""
    root = _runs.write_images(tmp_path / "images", train=1)
    for path in (root / "val").glob("class[01]/*.png"):
        path.write_bytes(path.read_bytes()[:-2000])
    return root


@pytest.mark.parametrize("workers", [0, 1])  # a worker that failed can hold up the next collection of garbage for 5 s
def test_unreadable_image_is_one_line_with_the_remedy(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    assert main([str(run), "--data", str(images), "--device", "cpu", "--workers", str(workers)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read image {images / 'val' / 'class0' / '0.png'}: ")
    assert error.count("\n") == 1
    assert "--skip-unreadable" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_without_a_readable_image_are_skipped(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    skip = [str(run), "--data", str(images), "--device", "cpu", "--workers", str(workers), "--skip-unreadable",
            "--batch-size", "2", "--output", "out"]  # fmt: skip
    assert main(skip) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["images"] == 3
    assert results["unreadable_images"] == [f"class{label}/{i}.png" for label in (0, 1) for i in range(3)]
    whole = [str(run), "--data", str(run.parent / "data"), "--device", "cpu", "--output", "whole"]
    assert main(whole) == 0
    expected = json.loads(Path("whole/results.json").read_text())
    assert results["per_class"][2]["recall"] == expected["per_class"][2]["recall"]
    for path in (images / "val" / "class2").iterdir():
        path.write_bytes(b"")
    capsys.readouterr()
    assert main(skip) == 1
    assert capsys.readouterr().err == "error: none of the 9 images can be read\n"


def test_missing_data_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "moved").mkdir()
    text = (run / "config.py").read_text().replace(str(run.parent / "data"), "gone")
    (tmp_path / "moved" / "config.py").write_text(text)
    assert main(["moved", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "error: data folder gone does not exist; --data names another\n"


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_output_is_checked_before_the_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("evaluated")

    Path("file").write_text("precious")
    monkeypatch.setattr("vitrail.models.mm.metrics.evaluate", fail)
    assert main([str(run), "--device", "cpu", "--output", output]) == 2
    assert f"the results cannot go to {output} (--output)" in capsys.readouterr().err
    assert Path("file").read_text() == "precious"


def test_attention_that_no_checkpoint_has_is_not_evaluated(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = timm.create_model("mobilenetv2_100", num_classes=3)
    save_weights(plain, "plain.safetensors")
    data = ["--data", str(run.parent / "data"), "--device", "cpu", "--output", "out"]
    assert main(["mobilenetv2_ela_b", *data, "--checkpoint", "plain.safetensors"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: checkpoint plain.safetensors cannot be evaluated, a part of the model is not in it")
    assert error.count("\n") == 1
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False: create(
        "mobilenetv2_ela_b", pretrained=pretrained, num_classes=3,
        pretrained_cfg_overlay={"state_dict": plain.state_dict(), "num_classes": 3}))  # fmt: skip
    assert main(["mobilenetv2_ela_b.start_ra_in1k", *data, "--pretrained"]) == 1
    assert "timm fetches for mobilenetv2_ela_b.start_ra_in1k cannot be evaluated" in capsys.readouterr().err
    assert not Path("out").exists()


def _rows(*recalls: float) -> list[dict[str, float | int]]:
    return [{"images": 1, "recall": recall} for recall in recalls]


def test_lowest_classes_lists_no_arbitrary_choice() -> None:
    lowest, heading = lowest_classes(_rows(50, 0, 100, 20), 2)
    assert [row["recall"] for row in lowest] == [0, 20]
    assert heading == "the 2 classes that go worst, of 4"
    lowest, heading = lowest_classes(_rows(50, 0, 50, 50, 100), 3)
    assert [row["recall"] for row in lowest] == [0]
    assert heading == "the 1 class that goes worst, of 5; the next 3 all have 50.0 %"
    lowest, heading = lowest_classes([*_rows(0, 0, 0, 70), {"images": 0, "recall": 0.0}], 2)
    assert lowest == []
    assert heading == "3 of 5 classes go worst, each with a recall of 0.0 %: too many to list"
    lowest, heading = lowest_classes([*_rows(40, 30), {"images": 0, "recall": 0.0}], 2)
    assert [row["recall"] for row in lowest] == [30, 40]


def test_many_classes_of_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    root = _runs.write_images(Path("many"), train=1, val=1, classes=60)
    model = timm.create_model("test_resnet", num_classes=60)
    nn.init.zeros_(model.get_classifier().weight)
    nn.init.zeros_(model.get_classifier().bias)
    save_weights(model, "weights.safetensors")
    assert main(["test_resnet", "--device", "cpu", "--checkpoint", "weights.safetensors", "--data", str(root)]) == 0
    text = capsys.readouterr().out
    assert "59 of 60 classes go worst, each with a recall of 0.0 %: too many to list (all are in results.csv)" in text
    assert "class1" not in text


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
