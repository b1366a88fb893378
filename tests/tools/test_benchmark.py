"""The benchmark on a CPU: models in alternation, operators behind their correctness gate, bad arguments."""

from __future__ import annotations

import csv
import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitrail.kernels._common.dispatch import record_choices, settings
from vitrail.layers import routing
from vitrail.tools import benchmark
from vitrail.tools._common import bench_kernels, bench_models, literal_models
from vitrail.tools._common.cli import UsageError
from vitrail.tools._common.kernel_cases import (
    OPERATORS,
    channel_attention,
    choose_cases,
    neighborhood_attention,
    routing_attention,
    strip_gate,
    window_attention,
)
from vitrail.tools._common.kernel_cases.common import SUITES, KernelCase, normal, parameter
from vitrail.tools._common.kernel_check import Check, make_inputs
from vitrail.tools._common.measure import Timed
from vitrail.tools._common.ready_models import Settings, Variant, resolve
from vitrail.tools._common.turns import Turns
from vitrail.tools.benchmark import main

_QUICK = ["--device", "cpu", "--min-time", "1e-4"]


@pytest.fixture(autouse=True)
def _quick_limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one test needs to see how fast this machine copies."""
    if request.node.name != test_all_kernels_and_their_peers_agree_on_a_cpu.__name__:
        monkeypatch.setattr(bench_kernels, "_measure_limits", lambda settings: bench_kernels._Limits(1e9, 1e10))


def test_models_are_compared(tmp_path: Path) -> None:
    files = [
        "--json",
        str(tmp_path / "rows.json"),
        "--csv",
        str(tmp_path / "rows.csv"),
        "--plot",
        str(tmp_path / "p.png"),
    ]
    sizes = ["--device", "cpu", "--batch-size", "2", "--img-size", "32", "--min-time", "0.02"]
    assert main(["biformer_n", "--compare", "timm/test_resnet", *sizes, *files]) == 0
    rows = {row["model"]: row for row in _rows(tmp_path / "rows.json")}
    assert rows.keys() == {"biformer_n", "timm/test_resnet"}
    assert all(row["torch"] and row["device"] for row in rows.values())
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_models_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(benchmark, "write_json", lambda path, rows: written.append([row["model"] for row in rows]))
    names = ["biformer_n", "timm/test_resnet"]
    sizes = ["--device", "cpu", "--batch-size", "2", "--img-size", "32", "--min-time", "0.001"]
    arguments = ["--models", *names, *sizes, "--json", str(tmp_path / "rows.json"), "--csv", str(tmp_path / "rows.csv")]
    assert main(arguments) == 0
    assert written == [(2 * names)[:count] for count in range(1, 5)]
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["infer"] * 2 + ["train"] * 2
    assert all(row["reference"] == "timm/test_resnet" and float(row["speed_ratio"]) > 0 for row in rows)
    assert all(float(row["speed_ratio"]) == 1 for row in rows if row["model"] == "timm/test_resnet")


def test_a_model_in_trouble_does_not_end_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_models.count_flops

    def fails_for_dinat(model: nn.Module, *rest: Any) -> int:
        if type(model).__name__ == "NAT":
            raise torch.OutOfMemoryError("too large")
        return right(model, *rest)

    monkeypatch.setattr(bench_models, "count_flops", fails_for_dinat)
    rows = _suite(["timm/test_resnet", "dinat_n", "biformer_n"], Variant())
    assert [row["note"] for row in rows] == [None, "out of memory", None]
    assert [row["images_per_s"] is None for row in rows] == [False, True, False]


def test_graphs_that_leave_no_memory_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    right, tries = bench_models._measure, []

    def too_large_at_first(*arguments: Any) -> list[dict]:
        tries.append(arguments)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("too large")
        return right(*arguments)

    monkeypatch.setattr(bench_models, "_measure", too_large_at_first)
    monkeypatch.setattr(bench_models, "capture_graph", lambda runs, pool: Timed(runs[0]))
    rows = _suite(["timm/test_resnet"], Variant(), Variant(graph=True))
    assert [row["note"] for row in rows] == [None, "out of memory beside the eager model"]
    assert [row["images_per_s"] is None for row in rows] == [False, True]


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = routing.routing_attention_lepe

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) * (1.05 if settings.default_backend == "auto" else 1)

    monkeypatch.setattr(routing, "routing_attention_lepe", wrong)
    rows = _suite(["timm/test_resnet", "biformer_n", "eager/biformer_n"], Variant())
    assert [(row["note"], row["correct"]) for row in rows] == [(None, None), ("wrong", False), (None, None)]
    assert main(["biformer_n", "--device", "cpu", "--img-size", "32", "--batch-size", "1"]) == 1
    assert "is wrong" in capsys.readouterr().err


def test_other_forms_of_a_model_compute_the_same() -> None:
    """Padded regions, so that the authors' zeros around the map count."""
    model = timm.create_model("biformer_n", n_win=4).eval()
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        want = model(image)
        literal_models.compute_by_definition(model, as_authors=True)
        with record_choices() as choices:
            got = model(image)
    assert (got - want).norm() < 1e-5 * want.norm()
    assert {choice.reason for choice in choices} == {"backend 'eager'"}
    assert "routing_attention_lepe" not in {choice.op for choice in choices}
    assert settings.default_backend == "auto"


def test_names_carry_sources_and_arguments() -> None:
    assert resolve("biformer_s:n_win=16") == ("vitrail", "biformer_s", {"n_win": 16})
    assert resolve("timm/davit_tiny:a=False,b=x") == ("timm", "davit_tiny", {"a": False, "b": "x"})
    for name in ("authors/davit_t", "eager/davit_tiny", "timm/davit_t", "mine/davit_t", "biformer_s:n_win"):
        with pytest.raises(UsageError):
            resolve(name)


def test_nothing_is_compiled_when_it_is_late() -> None:
    rows = _suite(["timm/test_resnet"], Variant(), Variant(compiled=True))
    assert [(row["variant"], row["note"]) for row in rows] == [("eager", None), ("compiled", "skipped: time limit")]


def _suite(names: list[str], *variants: Variant) -> list[dict]:
    """Rows of models on small images, when it is too late to compile any."""
    rows: list[dict] = []
    how = Settings(
        device=torch.device("cpu"),
        batch_size=2,
        img_size=(32, 32),
        precision="float32",
        channels_last=False,
        train=False,
        min_time=1e-3,
        variants=variants,
    )
    bench_models.bench_suite(names, names[0], how, lambda text: None, rows.extend, late=lambda: True)
    return rows


def test_all_kernels_and_their_peers_agree_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run of everything: what is compiled on GPUs is checked as it is."""
    assert main(["--kernels", *_QUICK, "--json", str(tmp_path / "rows.json")]) == 0
    rows = _rows(tmp_path / "rows.json")
    assert {row["operator"] for row in rows} == set(OPERATORS)
    assert all(row["correct"] for row in rows)
    assert {row["note"] for row in rows} == {None, "not compiled on a CPU"}
    assert all((row["p50_ms"] is None) == (row["note"] is not None) for row in rows)
    for case in {row["case"] for row in rows}:
        assert {(r["implementation"], r["pass"]) for r in rows if r["case"] == case} >= {
            ("vitrail", "forward"),
            ("vitrail", "forward+backward"),
        }
    assert all(row["floor_ms"] > 0 and row["matmul_flops_per_s"] > 0 for row in rows)
    (flops,) = {r["flops"] for r in rows if r["case"] == "B2 8x8x32 h2 w4 s1" and r["pass"] == "forward"}
    assert flops == 2 * (2 * 2 * 8 * 8) * 4 * 4 * 32  # of q k^T and of the weighted values
    assert "computing in float64" in capsys.readouterr().err


def test_cases_are_chosen_by_text_name_and_part() -> None:
    def chosen(*arguments: Any) -> list[str]:
        return [f"{case.operator} {case.name}" for case in choose_cases(*arguments)]

    plain = "B64 56x56x64 h2 k7"
    assert chosen(["neighborhood_attention"], "gpu", [plain]) == [f"neighborhood_attention {plain}"]
    assert len(chosen(["neighborhood_attention"], "gpu", [plain[:-1]])) == 4
    either = chosen([], "gpu", ["retention B64 56x56", "k7 GELU"])
    assert len(either) == 1 + 4
    assert chosen([], "gpu", ["retention B64 56x56", "k7 GELU"], "2/2") == either[1::2]
    everything = chosen([], "gpu")
    halves = [chosen([], "gpu", [], part) for part in ("1/2", "2/2")]
    assert sorted(halves[0] + halves[1]) == sorted(everything)


@pytest.mark.parametrize(
    "arguments",
    [
        (["attention"], "cpu"),
        ([], "cpu", ["no such text"]),
        ([], "cpu", [], "3/2"),
        ([], "cpu", [], "half"),
        (["linear_attention"], "cpu", [], "2/2"),
    ],
)
def test_cases_that_do_not_exist_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        choose_cases(*arguments)


def test_processes_prepare_together_and_measure_one_by_one(tmp_path: Path) -> None:
    """Processes of a GPU, here threads with files of their own; each has two rounds."""
    events: list[tuple[str, int]] = []
    together = threading.Barrier(3)

    def process(number: int) -> None:
        with Turns(tmp_path / "turns") as turns:
            for _ in range(2):
                turns.prepare()
                events.append(("prepares", number))
                together.wait(10)
                time.sleep(0.02 * number)
                with turns.measuring() as alone:
                    assert alone
                    events.append(("begins", number))
                    time.sleep(0.01)
                    events.append(("ends", number))

    threads = [threading.Thread(target=process, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(events) == 18
    for start in (0, 9):
        assert [what for what, _ in events[start : start + 9]] == ["prepares"] * 3 + ["begins", "ends"] * 3
        assert all(events[start + k][1] == events[start + k + 1][1] for k in (3, 5, 7))


def test_patience_with_a_slow_process_ends(tmp_path: Path) -> None:
    with Turns(tmp_path / "turns") as slow, Turns(tmp_path / "turns", patience=0.1) as ready:
        slow.prepare()
        with ready.measuring() as alone:
            assert not alone
        with slow.measuring() as alone:
            assert alone


def test_peers_can_be_left_out(tmp_path: Path) -> None:
    shown = {}
    for peers in ("none", "fast"):
        arguments = ["--kernels", "linear_attention", *_QUICK, "--peers", peers, "--json", str(tmp_path / peers)]
        assert main(arguments) == 0
        shown[peers] = {row["implementation"] for row in _rows(tmp_path / peers)}
    assert shown["none"] == {"vitrail", "vitrail packed"}
    assert shown["fast"] == {"vitrail", "vitrail packed", "eager", "products in half"}


def test_peers_that_come_too_late_are_named(tmp_path: Path) -> None:
    arguments = [
        "--kernels",
        "linear_attention",
        *_QUICK,
        "--time-limit",
        "1e-9",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert main(arguments) == 0
    rows = _rows(tmp_path / "rows.json")
    assert all((row["p50_ms"] is None) != row["implementation"].startswith("vitrail") for row in rows)
    assert {row["note"] for row in rows} == {None, "skipped: time limit"}


@pytest.mark.parametrize("trouble", ["memory", "defect"])
def test_a_peer_in_trouble_has_a_row_that_says_so(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("too large") if trouble == "memory" else RuntimeError("no kernel\nand more")

    def fails(*inputs: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(channel_attention, "_timm", fails)
    assert main(["--kernels", "channel_attention", *_QUICK, "--json", str(tmp_path / "rows.json")]) == 0
    notes = {row["implementation"]: row["note"] for row in _rows(tmp_path / "rows.json")}
    assert notes["timm"] == ("out of memory" if trouble == "memory" else "failed: RuntimeError: no kernel")
    assert notes["vitrail"] is None


def test_trouble_of_one_pass_leaves_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_kernels._run_on

    def fails_with_backward(one: Any, kind: str, inputs: Any) -> Any:
        if one.plain is None and one.run is strip_gate._eager and kind != "forward":
            raise torch.OutOfMemoryError("too large")
        return right(one, kind, inputs)

    monkeypatch.setattr(bench_kernels, "_run_on", fails_with_backward)
    assert main(["--kernels", "strip_gate", *_QUICK, "--json", str(tmp_path / "rows.json")]) == 0
    rows = [row for row in _rows(tmp_path / "rows.json") if row["implementation"] == "eager"]
    assert {(row["pass"], row["note"], row["p50_ms"] is None) for row in rows} == {
        ("forward", None, False),
        ("forward+backward", "out of memory", True),
    }


def test_without_a_truth_nothing_is_timed_and_the_next_case_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*inputs: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too large")

    cases = OPERATORS["strip_gate"]("cpu")
    cases[0] = dataclasses.replace(cases[0], reference=too_large)
    monkeypatch.setitem(OPERATORS, "strip_gate", lambda suite: cases)
    assert main(["--kernels", "strip_gate", *_QUICK, "--json", str(tmp_path / "rows.json")]) == 1
    notes = {row["case"]: row["note"] for row in _rows(tmp_path / "rows.json") if row["implementation"] == "vitrail"}
    assert notes == {cases[0].name: "not checked: the reference: out of memory", cases[1].name: None}


@pytest.mark.gpu
def test_kernels_are_graphs_on_a_gpu_unless_they_wait(tmp_path: Path) -> None:
    arguments = ["--cases", "N50000", "--precision", "bf16", "--peers", "fast", "--min-time", "0.01"]
    assert main(["--kernels", "scattered_linear_attention", *arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = _rows(tmp_path / "rows.json")
    assert all(row["p50_ms"] > 0 and row["peak_memory_bytes"] > 0 for row in rows)
    assert all(row["cuda_graph"] == (row["implementation"] != "eager") for row in rows)


@pytest.mark.gpu
def test_models_run_in_all_ways_on_a_gpu(tmp_path: Path) -> None:
    sizes = ["--batch-size", "4", "--img-size", "32", "--min-time", "0.01", "--precision", "bf16", "--peers", "fast"]
    arguments = ["--models", "biformer_n", "timm/test_resnet", *sizes, "--json", str(tmp_path / "rows.json")]
    assert main(arguments) == 0
    rows = _rows(tmp_path / "rows.json")
    assert len(rows) == 8
    assert all(row["note"] is None and row["peak_memory_bytes"] > 0 for row in rows)
    assert {(row["model"], row["mode"], row["cuda_graph"]) for row in rows} == {
        (model, mode, graph)
        for model in ("biformer_n", "timm/test_resnet")
        for mode in ("infer", "train")
        for graph in (False, True)
    }


def test_what_is_cut_off_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = len(OPERATORS["linear_attention"]("cpu"))

    def interrupted(suite: str) -> list[KernelCase]:
        (case,) = OPERATORS["linear_attention"](suite)

        def stop(*inputs: Tensor) -> Tensor:
            raise KeyboardInterrupt

        return [case, dataclasses.replace(case, name="second", reference=stop)]

    monkeypatch.setitem(OPERATORS, "retention", interrupted)
    arguments = ["--kernels", "retention", *_QUICK, "--json", str(tmp_path / "rows.json")]
    assert main(arguments) == 130
    assert len({row["case"] for row in _rows(tmp_path / "rows.json")}) == done


def test_a_wrong_kernel_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = window_attention.window_attention

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) * (1.1 if kwargs["backend"] == "auto" else 1)

    monkeypatch.setattr(window_attention, "window_attention", wrong)
    arguments = ["--kernels", "window_attention", *_QUICK, "--json", str(tmp_path / "rows.json")]
    assert main(arguments) == 1
    assert "(wrong)" in capsys.readouterr().err
    rows = [row for row in _rows(tmp_path / "rows.json") if row["implementation"] == "vitrail"]
    assert all(row["correct"] is False and row["p50_ms"] is None for row in rows)


@pytest.mark.parametrize("image", [0, 5])
def test_the_check_sees_errors_of_any_kind(image: int) -> None:
    """In the output of a checked image, and in the gradient of one that gets none."""
    case = _scaled(8)
    inputs = make_inputs(case, torch.device("cpu"), torch.float32, 0)
    check = Check(case, inputs)
    assert check.images is not None
    assert check.images.tolist() == [0, 2, 5, 7]
    assert max(check.errors(case.reference)) < 1e-6

    def wrong_output(x: Tensor, scale: Tensor) -> Tensor:
        return case.reference(x, scale) + 0.1 * (torch.arange(8) == image)[:, None]

    assert check.errors(wrong_output)[0] > 0.01

    def leaking(x: Tensor, scale: Tensor) -> Tensor:
        return case.reference(x + 0.1 * (x.roll(1, 0) - x.roll(1, 0).detach()), scale)

    assert check.errors(leaking)[0] < 1e-6
    assert check.errors(leaking)[1] > 0.01


def _scaled(batch: int) -> KernelCase:
    return KernelCase("scale", "", (normal(batch, 3), parameter(3)), torch.mul, {})


def test_block_masks_are_those_of_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    shapes = [
        neighborhood_attention.NeighborhoodShape(1, 15, 20, 1, 16, kernel=3, tile=(5, 4)),
        neighborhood_attention.NeighborhoodShape(1, 18, 20, 1, 16, kernel=3, dilation=4, stride=2),
    ]
    masks = [(neighborhood_attention.neighborhood_mask(shape, torch.device("cpu")), 1) for shape in shapes]
    routed = routing_attention.RoutingShape(2, 20, 20, 1, 16, 4, 2)
    routes = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)).topk(2).indices
    masks.append((routing_attention.region_mask(routes, routed), 2))
    whole = routing_attention.RoutingShape(1, 32, 32, 1, 16, 2, 2)  # regions of 256 tokens: whole blocks
    masks.append((routing_attention.region_mask(torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0]]]), whole), 1))
    for mask, batch in masks:
        n_tokens = mask.seq_lengths[0]
        want = create_block_mask(mask.mask_mod, batch, None, n_tokens, n_tokens, device="cpu")
        assert torch.equal(mask.to_dense(), want.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, want.full_kv_num_blocks)
        assert torch.equal(mask.q_num_blocks, want.q_num_blocks)
    assert masks[-1][0].full_kv_num_blocks.min() == 4


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_cases_of_every_operator(suite: str) -> None:
    for name, make in OPERATORS.items():
        found = make(suite)
        assert {case.operator for case in found} == {name}
        assert len({case.name for case in found}) == len(found) > 0
        assert all(case.ours in case.implementations for case in found)


def test_host_times(tmp_path: Path) -> None:
    arguments = ["--kernels", "strip_gate", "--host", "--peers", "none", *_QUICK, "--json", str(tmp_path / "rows.json")]
    assert main([*arguments, "--turns", str(tmp_path / "turns")]) == 0
    assert (tmp_path / "turns.measuring").exists()
    rows = _rows(tmp_path / "rows.json")
    assert all(row["host_time"] and row["p50_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--models", "biformer_x"],
        ["--models", "biformer_n", "--kernels"],
        ["--models", "--compile"],
        ["--models", "timm/test_resnet", "--peers", "none"],
        ["biformer_n", "--host"],
        ["--kernels", "attention"],
        ["biformer_x"],
        ["biformer_n", "--precision", "int3"],
        ["accelerated/test_resnet"],
        ["biformer_n:n_wim=3"],
        ["biformer_n", "--part", "1/2"],
        ["mine/test_resnet"],
        [],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([*arguments, "--device", "cpu"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert capsys.readouterr().err


def _rows(path: Path) -> list[dict]:
    loaded = json.loads(path.read_text())
    return loaded if isinstance(loaded, list) else loaded["rows"]
