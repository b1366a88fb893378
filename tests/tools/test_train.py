"""The training command: what it leaves behind, exact resumption, several processes, and bad input."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from _killed_training import train_until_killed
from _processes import run_job

from vitrail.tools.train import main

_HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("_vitrail_test_runs", _HERE / "_runs.py")
_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_runs)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _runs.write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    return _runs.write_config(tmp_path, data)


def _train(config: Path, folder: Path, *options: str, changes: tuple[str, ...] = ()) -> int:
    arguments = [str(config), "--work-dir", str(folder), "--device", "cpu", *options]
    return main([*arguments, "--cfg-options", *changes] if changes else arguments)


def _metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def _last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.pth", weights_only=True)


def _assert_equal(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_equal(a, b, f"{where}.{i}")
    else:
        assert one == other, where


def test_leaves_weights_figures_and_picture(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert _train(config, folder) == 0
    text = capsys.readouterr().out
    for part in ("epoch 3/3", "loss", "held-out", "images/s", "left", "throughput", "go on with"):
        assert part in text
    metrics = _metrics(folder)
    assert metrics["held_out"]["images"] == 9
    assert [row["epoch"] for row in metrics["curve"]] == [1, 2, 3]
    assert metrics["held_out"]["top1"] == pytest.approx(metrics["curve"][-1]["val_top1"])
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "best.pth").is_file()
    model = timm.create_model("test_vit", num_classes=3, img_size=32, checkpoint_path=str(folder / "model.safetensors"))
    averaged = _last(folder)["state_dict"]
    _assert_equal(dict(model.state_dict()), {name.removeprefix("backbone."): t for name, t in averaged.items()})
    assert not list(folder.glob(".*.tmp"))


def test_killed_and_resumed_equals_unbroken(config: Path, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    arguments = [str(config), "--work-dir", str(broken), "--device", "cpu"]
    # The second of four iterations of the second epoch.
    done = run_job(1, train_until_killed, 6, "vitrail.models.mm.runner", arguments, folder=tmp_path)
    assert done.returncode == -9, done.stderr
    assert _last(broken)["meta"]["epoch"] == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert _train(config, unbroken) == 0
        assert _train(config, broken, "--resume") == 0
    finally:
        torch.set_num_threads(threads)
    one, other = _last(unbroken), _last(broken)
    for part in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        _assert_equal(one[part], other[part], part)
    for row, again in zip(_metrics(unbroken)["curve"], _metrics(broken)["curve"], strict=True):
        assert {k: row[k] for k in ("epoch", "train_loss", "val_loss", "lr")} == {
            k: again[k] for k in ("epoch", "train_loss", "val_loss", "lr")
        }


def test_resuming_a_finished_run_reports_again(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert _train(config, folder, changes=("train_cfg.max_epochs=1",)) == 0
    before = _metrics(folder)["held_out"]
    (folder / "metrics.json").unlink()
    assert _train(config, folder, "--resume", changes=("train_cfg.max_epochs=1",)) == 0
    assert _metrics(folder)["held_out"] == before


def test_two_processes_equal_one(config: Path, tmp_path: Path) -> None:
    plain = ("model.mixup=None", "model.backbone.drop_path_rate=0.0", "optim_wrapper.optimizer.opt=sgd",
             "train_cfg.max_epochs=2")  # fmt: skip
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert _train(config, alone, changes=(*plain, "train_dataloader.batch_size=6")) == 0
    arguments = [str(config), "--work-dir", str(both), "--device", "cpu", "--launcher", "pytorch"]
    done = run_job(2, main, [*arguments, "--cfg-options", *plain, "train_dataloader.batch_size=3"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = _metrics(alone), _metrics(both)
    assert two["processes"] == 2
    assert two["held_out"]["images"] == 9  # does not divide by two processes
    for row, other in zip(one["curve"], two["curve"], strict=True):
        for name in ("train_loss", "val_loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-5)
    for name, tensor in _last(alone)["state_dict"].items():
        torch.testing.assert_close(_last(both)["state_dict"][name], tensor, rtol=1e-4, atol=1e-6)


def test_accumulated_steps_equal_a_large_batch(config: Path, tmp_path: Path) -> None:
    plain = ("model.mixup=None", "model.backbone.drop_path_rate=0.0", "optim_wrapper.optimizer.opt=sgd",
             "train_cfg.max_epochs=1", "param_scheduler=None")  # fmt: skip
    large, small = tmp_path / "large", tmp_path / "small"
    assert _train(config, large, changes=(*plain, "train_dataloader.batch_size=6", "custom_hooks=[]")) == 0
    pieces = ("train_dataloader.batch_size=3", "optim_wrapper.accumulative_counts=2", "custom_hooks=[]")
    assert _train(config, small, changes=(*plain, *pieces)) == 0
    for name, tensor in _last(large)["state_dict"].items():
        torch.testing.assert_close(_last(small)["state_dict"][name], tensor, rtol=1e-4, atol=1e-6)


def test_bf16_on_the_cpu_trains_in_bf16(config: Path, tmp_path: Path) -> None:
    folder, full = tmp_path / "bf16", tmp_path / "full"
    assert _train(config, folder, "--amp", "bf16", changes=("train_cfg.max_epochs=1",)) == 0
    assert _train(config, full, changes=("train_cfg.max_epochs=1",)) == 0
    half, single = (_metrics(path)["curve"][0]["train_loss"] for path in (folder, full))
    assert half != single
    assert half == pytest.approx(single, rel=0.02)
    assert all(tensor.dtype != torch.bfloat16 for tensor in _last(folder)["state_dict"].values())


def test_nan_loss_stops_with_step_and_advice(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("optim_wrapper.optimizer.opt=sgd", "optim_wrapper.optimizer.lr=1e30", "optim_wrapper.clip_grad=None",
               "param_scheduler=None")  # fmt: skip
    assert _train(config, tmp_path / "run", changes=changes) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "the loss is nan in iteration 2 (epoch 1)" in message
    assert "lower learning rate" in message


def test_unreadable_images_are_counted(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _runs.write_images(tmp_path / "damaged")
    (data / "train" / "class1" / "2.png").write_bytes(b"")
    for path in (data / "val" / "class0").iterdir():  # all of the first validation batch
        path.write_bytes(b"x")
    changes = (f"data_root={data}", "train_cfg.max_epochs=2", "val_dataloader.batch_size=3")
    for workers in (0, 1):
        loading = f"train_dataloader.num_workers={workers}"
        capsys.readouterr()
        assert _train(config, tmp_path / f"stopped{workers}", changes=(*changes, loading)) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: cannot read image {data / 'train' / 'class1' / '2.png'}: the file is empty; ")
        assert error.count("\n") == 1
        assert "train_dataloader.dataset.unreadable=skip" in error
    skip = ("train_dataloader.dataset.unreadable=skip", "val_dataloader.dataset.unreadable=skip")
    assert _train(config, tmp_path / "run", changes=(*changes, *skip)) == 0
    metrics = _metrics(tmp_path / "run")
    lost = [f"class0/{i}.png" for i in range(3)]
    assert metrics["unreadable_images"] == {"train": ["class1/2.png"], "val": lost}
    assert metrics["held_out"]["images"] == 6


def test_a_run_is_not_overwritten_unasked(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, short = tmp_path / "run", ("train_cfg.max_epochs=1",)
    assert _train(config, folder, changes=short) == 0
    assert _train(config, folder, changes=short) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert _train(config, folder, "--overwrite", changes=short) == 0


def test_default_folders_are_numbered(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [str(config), "--device", "cpu", "--cfg-options", "train_cfg.max_epochs=1"]
    first = tmp_path / "runs" / config.parent.name / "tiny"
    assert main([*short[:-2], "--resume", *short[-2:]]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert main(short) == 0
    assert (first / "metrics.json").is_file()
    assert (first.with_name("tiny-2") / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("options", "changes", "status", "message"),
    [
        ([], ["model.backbone.name=test_vitt"], 2, "nearest names: test_vit"),
        ([], ["model.backbone.num_classes=5"], 1, "the data have 3 classes"),
        ([], ["model.backbone.wrong_option=5"], 1, "wrong_option"),
        ([], ["model.backbone.in_chans=4"], 1, "3 channels"),
        ([], ["train_dataloader.dataset.transform.input_size=20"], 1, "20x20 pixels"),
        ([], ["data_root=nowhere"], 1, "data folder nowhere does not exist (the config's data_root)"),
        ([], ["train_dataloader.batch_size=500"], 1, "smaller train_dataloader.batch_size"),
        ([], ["train_dataloader.sampler.type=NoSampler"], 1, "NoSampler"),
        (
            [],
            ["optim_wraper.optimizer.lr=1"],
            2,
            "unknown part of a config 'optim_wraper'; nearest names: optim_wrapper",
        ),
        ([], ["optim_wrapper.optimizer.opt=nothing"], 1, "nothing"),
        ([], ["no_equals_sign"], 2, "key=value"),
        (["--device", "warp"], [], 2, "auto, cpu, cuda"),
        (["--amp", "fp16"], [], 2, "fp16 needs a CUDA GPU"),
        (["--launcher", "pytorch"], [], 1, "torchrun"),
        (["--resume", "absent.pth"], [], 1, "absent.pth does not exist"),
        (["--frobnicate"], [], 2, "--frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    changes: list[str],
    status: int,
    message: str,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert _train(config, tmp_path / "run", *options, changes=tuple(changes)) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_without_gpu(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(config, tmp_path / "run", "--device", "cuda") == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_unknown_config_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digits/biformer_m"]) == 2
    assert "digits/biformer_n" in capsys.readouterr().err


def test_foreign_checkpoint_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "foreign.pth")
    assert _train(config, tmp_path / "run", "--resume", str(tmp_path / "foreign.pth")) == 1
    assert "resuming needs a last.pth" in capsys.readouterr().err


def test_the_command_leaves_sys_argv_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    assert main(["--help"]) == 0
    assert "--cfg-options" in capsys.readouterr().out
    assert sys.argv == before


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("launcher", ["none", "pytorch"])
def test_trains_biformer_on_the_gpu(tmp_path: Path, amp: str | None, launcher: str) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("mmengine")
    command = ["-m", "vitrail.tools.train"]
    if launcher == "pytorch":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *command]
    precision = ["--amp", amp] if amp else []
    changes = ["train_cfg.max_epochs=5", "sync_bn=True"]
    done = _runs.run_python(*command, "digits/biformer_n", "--work-dir", tmp_path / "run", "--device", "cuda",
                            "--launcher", launcher, *precision, "--cfg-options", *changes, folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert _metrics(tmp_path / "run")["held_out"]["top1"] > 80
