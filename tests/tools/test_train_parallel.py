"""Training on several processes: the same as on one, after a process was killed, too; replicas and shards."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from _processes import Finished, run_job

from vitrail.models.mm.runner import start_processes
from vitrail.tools._common.cli import ToolError
from vitrail.tools.train import _run, main

_spec = importlib.util.spec_from_file_location("_vitrail_test_runs", Path(__file__).parent / "_runs.py")
_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_runs)

# Nothing that differs between processes by design (drop path, mixing); 6 images a step; no averaged weights.
PLAIN = ("model.mixup=None", "model.backbone.drop_path_rate=0.0", "custom_hooks=[]", "train_cfg.max_epochs=2",
         "optim_wrapper.optimizer.opt=sgd", "optim_wrapper.optimizer.lr=0.05")  # fmt: skip
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

_KILLED_RUN = """
import os, signal, sys, time
from pathlib import Path
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 4 and runner.rank == 1:  # the second of three iterations of the second epoch
            (Path(runner.work_dir) / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

from vitrail.tools._common.cli import ToolError
from vitrail.tools.train import _run, main
import vitrail.models.mm.runner as runner
runner._OWN_HOOKS = (*runner._OWN_HOOKS, "KillHook")
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 training images, which six do not divide, and 11 held-out ones, which neither two nor three do."""
    root = _runs.write_images(tmp_path_factory.mktemp("data"), train=7, val=4)
    (root / "val" / "class2" / "3.png").unlink()
    return _runs.write_config(tmp_path_factory.mktemp("config"), root)


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    arguments = [str(config), "--work-dir", str(folder), "--device", "cpu"]
    assert main([*arguments, "--cfg-options", *PLAIN, "train_dataloader.batch_size=6"]) == 0
    return folder


def _arguments(count: int, config: Path, folder: Path, *options: str, changes: tuple[str, ...] = ()) -> list[str]:
    """Of `vitrail-train` in each of some processes."""
    return [str(config), "--work-dir", str(folder), "--device", "cpu", "--launcher", "pytorch", *options,
            "--cfg-options", *PLAIN, f"train_dataloader.batch_size={6 // count}", *changes]  # fmt: skip


def _train(count: int, config: Path, folder: Path, *options: str, changes: tuple[str, ...] = ()) -> Finished:
    arguments = _arguments(count, config, folder, *options, changes=changes)
    return run_job(count, main, arguments, folder=folder.parent)


def _assert_same_training(folder: Path, alone: Path) -> None:
    """Losses and weights to 1e-6, every held-out image once."""
    one, other = (json.loads((path / "metrics.json").read_text()) for path in (alone, folder))
    assert other["held_out"]["images"] == 11
    assert len(one["curve"]) == len(other["curve"]) == 2
    for row, again in zip(one["curve"], other["curve"], strict=True):
        for name in ("train_loss", "val_loss"):
            assert again[name] == pytest.approx(row[name], rel=1e-6)
        assert again["iterations"] == row["iterations"]
    weights = [safetensors.torch.load_file(path / "model.safetensors") for path in (alone, folder)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_killed_process_ends_the_job_and_three_go_on(config: Path, alone: Path, tmp_path: Path) -> None:
    folder, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(_KILLED_RUN)
    done = _runs.run_python(*_TORCHRUN, 2, script, *_arguments(2, config, folder), folder=tmp_path)
    assert time.time() - float((folder / "killed").read_text()) < 30
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun names the process and its end
    assert "local_rank: 1" in done.stderr
    if "error: " in done.stderr:  # else torchrun was faster
        assert "process 0 lost its connection to another process of the job" in done.stderr
    assert not list(folder.glob(".*.tmp"))
    content = torch.load(folder / "last.pth", weights_only=True)
    assert (content["meta"]["epoch"], content["meta"]["iter"]) == (1, 3)
    done = _train(3, config, folder, "--resume", changes=("model.grad_checkpointing=True",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 2/2") == 1  # one process shows the progress
    assert json.loads((folder / "metrics.json").read_text())["processes"] == 3
    _assert_same_training(folder, alone)


def test_shards_equal_one_process_and_change_their_number(config: Path, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = ("train_cfg.max_epochs=1", "param_scheduler.1.end=2", "model.grad_checkpointing=True")
    done = _train(2, config, folder, "--sharded", changes=first)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = list(folder.glob("last-*.shards"))
    assert [part.name for part in parts] == ["last-00000003.shards"]
    assert len(list(parts[0].glob("*.safetensors"))) == 2
    assert torch.load(folder / "last.pth", weights_only=True)["state_dict"] == {}
    done = _train(3, config, folder, "--sharded", "--resume", changes=("compile.backend=eager",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [part.name for part in folder.glob("*.shards")] == ["last-00000006.shards"]
    assert not list(folder.glob(".*.tmp"))
    best = torch.load(folder / "best.pth", weights_only=True)["state_dict"]
    assert all(type(tensor) is torch.Tensor for tensor in best.values())
    _assert_same_training(folder, alone)
    # One process without shards reads the parts.
    arguments = [str(config), "--work-dir", str(folder), "--device", "cpu", "--resume", "--cfg-options", *PLAIN]
    assert main([*arguments, "train_dataloader.batch_size=6"]) == 0
    _assert_same_training(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--sharded",)])
def test_mixed_precision_of_a_hierarchical_model(options: tuple[str, ...], config: Path, tmp_path: Path) -> None:
    changes = ("model.backbone._delete_=True", "model.backbone.name=biformer_n", "model.backbone.num_classes=3",
               "optim_wrapper.optimizer.opt=adamw", "optim_wrapper.optimizer.lr=1e-3")  # fmt: skip
    done = _train(2, config, tmp_path / "run", *options, "--amp", "bf16", changes=changes)
    assert done.returncode == 0, done.stderr[-3000:]
    curve = json.loads((tmp_path / "run" / "metrics.json").read_text())["curve"]
    assert curve[1]["train_loss"] < curve[0]["train_loss"]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--sharded"], [], "--sharded needs --launcher pytorch"),
        (["--launcher", "pytorch"], [], "needs torchrun; the environment lacks RANK, WORLD_SIZE"),
        ([], ["ddp.bucket=1"], "ddp has bucket; allowed: bucket_cap_mb, static_graph"),
        ([], ["custom_hooks=[]", "custom_hooks.0.type=EMAHook"], "--cfg-options custom_hooks.0.type=EMAHook: "),
        ([], ["compile=eager"], "compile is 'eager'; allowed: True, False or a dict of torch.compile's arguments"),
    ],
)
def test_wrong_settings_are_named(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    changes: list[str],
    message: str,
) -> None:
    arguments = [str(config), "--work-dir", str(tmp_path / "run"), "--device", "cpu", *options]
    assert main([*arguments, "--cfg-options", *PLAIN, *changes]) in (1, 2)
    assert message in capsys.readouterr().err


def test_an_optimizer_that_mixes_parts_and_wholes_is_named() -> None:
    class Runner:
        optim_wrapper = SimpleNamespace(optimizer=torch.optim.Adafactor([torch.zeros(1)]))

        def train(self) -> None:
            raise RuntimeError("aten.lerp_.Scalar got mixed torch.Tensor and DTensor")

    with pytest.raises(ToolError, match=r"--sharded: Adafactor cannot work on parts of weights; allowed: .* adamw"):
        _run(Runner(), None)


def test_processes_of_torchrun_do_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"torchrun started 2 processes.* add --launcher pytorch"):
        start_processes("none", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [(), ("--sharded",), ("--amp", "bf16"), ("--sharded", "--amp", "bf16")])
def test_trains_over_nccl(options: tuple[str, ...], tmp_path: Path) -> None:
    """All GPUs of the machine; SyncBN makes the batch norms of the digits' model independent of their number."""
    pytest.importorskip("sklearn")
    count = torch.cuda.device_count()
    changes = ["train_cfg.max_epochs=3", "custom_hooks=[]", "sync_bn=True"]
    done = _runs.run_python(*_TORCHRUN, count, "-m", "vitrail.tools.train", "digits/biformer_n", "--work-dir",
                            tmp_path / "run", "--device", "cuda", "--launcher", "pytorch", *options,
                            "--cfg-options", *changes, folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == count
    assert metrics["held_out"]["top1"] > 60
