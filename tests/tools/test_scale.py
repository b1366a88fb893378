"""The measurement of scaling, on two processes of the CPU."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from _processes import run_job

from vitrail.tools._common.table import write_json
from vitrail.tools.scale import main


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    arguments = ["test_vit", "--device", "cpu", "--sharded", "--batch-size", "4", "--img-size", "32", "--steps", "1",
                 "--rounds", "2", "--check-steps", "3", "--check-batch", "8", "--json", str(file)]  # fmt: skip
    done = run_job(2, main, arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())
    speeds = [row for row in rows if "efficiency" in row]
    assert [(row["mode"], row["scaling"], row["processes"], row["batch_per_process"]) for row in speeds] == [
        ("one process", "-", 1, 4), ("replicas", "weak", 2, 4), ("shards", "weak", 2, 4), ("replicas", "strong", 2, 2)
    ]  # fmt: skip
    assert speeds[0]["efficiency"] == 1
    assert all(row["rounds"] == 2 for row in speeds)
    for row in speeds:
        speed = row["batch_per_process"] * row["processes"] / row["step_ms"] * 1e3
        assert row["images_per_s"] == pytest.approx(speed)
    curves = [row for row in rows if "deviation" in row]
    assert [row["mode"] for row in curves] == ["one process", "replicas", "shards"]
    assert all(row["deviation"] < 1e-6 for row in curves)


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process; the files as they are after every change."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    file, contents = tmp_path / "scale.json", []

    def write(path: Path, rows: list[dict]) -> None:
        write_json(path, rows)
        contents.append(json.loads(path.read_text()))

    monkeypatch.setattr("vitrail.tools.scale.write_json", write)
    arguments = ["test_vit", "--device", "cpu", "--batch-size", "2", "--img-size", "32", "--steps", "1",
                 "--rounds", "3", "--check-steps", "2", "--check-batch", "2", "--json", str(file)]  # fmt: skip
    assert main(arguments) == 0
    assert [len(rows) for rows in contents] == [1, 1, 1, 2]
    assert [rows[0]["rounds"] for rows in contents] == [1, 2, 3, 3]
    assert [rows[0]["model"] for rows in contents] == ["test_vit"] * 4
    contents.clear()
    assert main([*arguments, "--time-limit", "0.001"]) == 0  # one round, no curves
    assert [[row["rounds"] for row in rows] for rows in contents] == [[1]]


def test_it_wants_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for arguments, message in (
        (["test_vit"], "start it by torchrun"),
        (["test_vitt"], "test_vit"),
        (["test_vit", "--sharded", "--amp", "fp16"], "use --amp bf16"),
        (["test_vit", "--cuda-graph", "--compile"], "neither --compile nor"),
        (["test_vit", "--time-limit", "0"], "--time-limit is 0.0; allowed: more than 0"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
