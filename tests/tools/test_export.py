"""Files for other runtimes compute what the model computes, at several sizes; the command notices where they do not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vitrail
from vitrail.layers.routing import RoutingAttention
from vitrail.tools._common import export, export_table
from vitrail.tools._common.entry_points import image_models
from vitrail.tools.export import main

_SHORT = {"depths": (1, 1, 1, 1)}  # PyTorch's exporters take time for every node
_TINY = {**_SHORT, "dims": (32, 64, 96, 128)}
_FAMILIES: dict[str, dict[str, Any]] = {
    "biformer_n": _SHORT,
    "biformer_stl": _TINY,
    "davit_t": {**_TINY, "num_heads": (1, 2, 3, 4)},
    "gated_swinrmt_retention_n": _SHORT,
    "gated_swinrmt_swat_n": _SHORT,
    "l2vit_n": {"depths": (2, 2), "dims": (48, 96), "num_heads": (2, 4)},  # a window and a linear block each
    "mobilenetv2_ela_b": {},
    "resnet18_ela_t": {"layers": (1, 1, 1, 1)},
    "rmt_n": _SHORT,
    "swin_t": {**_TINY, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 4)},  # the second block of a stage shifts
    "vsa_swin_n": _SHORT,
    "vsa_vitae_s": _SHORT,
    "dinat_n": {},
}
_needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")), reason="needs the extra 'onnx'"
)


def _model(name: str) -> nn.Module:
    model = timm.create_model(name, **_FAMILIES[name]).eval()
    export.wake_idle_parts(model)
    return model


def _check(model: nn.Module, path: Path, export_format: str, size: tuple[int, int, int], dynamic: bool) -> None:
    export.write_model(model, path, export_format, size, dynamic)
    shapes = export.shapes_to_try(model, export_format, size, dynamic, 2)
    assert len({shape[0] for shape in shapes}) == len({shape[2:] for shape in shapes}) == (2 if dynamic else 1)
    for check in export.verify_file(model, path, export_format, shapes):
        assert check.relative <= export.TOLERANCE, check


@pytest.mark.parametrize("name", _FAMILIES)
def test_no_part_of_a_model_is_idle(name: str) -> None:
    """What images change in the output is as large as the output: errors of any part would be seen."""
    model = _model(name)
    images = export._make_images((2, 3, 64, 64), torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = model(images)
    assert (first - second).abs().max() > 0.1 * first.abs().max()
    assert not any(module.training for module in model.modules())


@_needs_onnx
@pytest.mark.parametrize("name", _FAMILIES)
def test_onnx_of_any_size(name: str, tmp_path: Path) -> None:
    # 72 pixels leave something to pad in every stage of every family with windows of 7 or 8.
    _check(_model(name), tmp_path / "model.onnx", "onnx", (3, 72, 72), dynamic=True)


@_needs_onnx
def test_onnx_of_one_size_has_fixed_shapes(tmp_path: Path) -> None:
    import onnx

    _check(_model("davit_t"), tmp_path / "model.onnx", "onnx", (3, 64, 96), dynamic=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [2, 3, 64, 96]
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("name", ["biformer_n", "rmt_n", "vsa_swin_n"])
def test_torchscript_of_any_size(name: str, tmp_path: Path) -> None:
    _check(_model(name), tmp_path / "model.pt", "torchscript", (3, 72, 72), dynamic=True)


def test_torchscript_needs_no_vitrail(tmp_path: Path) -> None:
    export.write_model(_model("l2vit_n"), tmp_path / "model.pt", "torchscript", (3, 32, 32), dynamic=True)
    code = (
        f"import torch, sys; y = torch.jit.load({str(tmp_path / 'model.pt')!r})(torch.zeros(1, 3, 40, 48)); "
        "assert y.isfinite().all() and 'vitrail' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("resnet18_ela_t", True), pytest.param("l2vit_n", True, marks=pytest.mark.slow), ("biformer_n", False)],
)
def test_exported_program(name: str, dynamic: bool, tmp_path: Path) -> None:
    _check(_model(name), tmp_path / "model.pt2", "exported-program", (3, 64, 64), dynamic)


def test_a_different_file_is_noticed(tmp_path: Path) -> None:
    model = _model("l2vit_n")
    export.write_model(model, tmp_path / "model.pt", "torchscript", (3, 32, 32), dynamic=False)
    with torch.no_grad():
        model.head.fc.bias += 0.01
    (check,) = export.verify_file(model, tmp_path / "model.pt", "torchscript", [(2, 3, 32, 32)])
    assert check.error == pytest.approx(0.01, rel=1e-3)
    assert check.relative > export.TOLERANCE


class _Routed(nn.Sequential):
    """A layer with routes in place of a model; its images are maps (B, H, W, C)."""

    def __init__(self, topk: int) -> None:
        torch.manual_seed(0)
        layer = RoutingAttention(16, 1, n_win=2, topk=topk)
        nn.init.normal_(layer.qkv.bias)
        super().__init__(layer)


@pytest.mark.parametrize(
    ("height", "topk", "alike", "tied"),
    [
        (4, 1, False, False),
        (4, 3, True, True),  # of two regions that hold almost the same one is not chosen
        (1, 1, False, False),
        (1, 3, False, False),  # nor here, of two of padding alone: it does not matter which
    ],
)
def test_routes_that_tie_are_found(height: int, topk: int, alike: bool, tied: bool) -> None:
    images = torch.randn(4, height, 4, 16, generator=torch.Generator().manual_seed(2))
    if alike:
        images[:, 2:, 2:] = images[:, :2, 2:] + 1e-7
    found = export.find_tied_routes(_Routed(topk), images)
    assert found.startswith("routes of 0 tie within rounding") if tied else found == ""


@pytest.mark.parametrize("tied", ["routes of a layer tie", ""])
@pytest.mark.parametrize("wrong_calls", [1, 2])
def test_other_images_where_routes_tie(
    tied: str, wrong_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties excuse one batch of images, not a file that is wrong on others."""
    model, calls = _model("l2vit_n"), []

    def run(image: Tensor) -> Tensor:
        calls.append(image)
        return model(image) * (1.01 if len(calls) <= wrong_calls else 1)

    monkeypatch.setattr(export, "_read_torchscript", lambda path: run)
    monkeypatch.setattr(export, "find_tied_routes", lambda model, image: tied)
    (check,) = export.verify_file(model, tmp_path, "torchscript", [(1, 3, 32, 32)])
    assert len(calls) == (2 if tied else 1)
    assert not tied or not torch.equal(*calls)
    assert (check.relative > export.TOLERANCE) == (wrong_calls == 2 or not tied)
    assert check.note.startswith("input reseeded: routes of a layer tie, and the file differs by") == bool(tied)


def test_the_command_uses_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = timm.create_model("l2vit_n", num_classes=7).eval()
    nn.init.constant_(trained.head.fc.bias, 3.0)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    files = ["--checkpoint", str(tmp_path / "weights.pth"), "-o", str(tmp_path / "out.pt")]
    assert main(["l2vit_n", "--format", "torchscript", "--dynamic", "--num-classes", "7", *files]) == 0
    assert "relative" in capsys.readouterr().out
    image = torch.rand(2, 3, 48, 56)
    with torch.no_grad():
        assert torch.allclose(torch.jit.load(str(tmp_path / "out.pt"))(image), trained(image), atol=1e-5)


def test_the_command_notes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.json"
    command = ["l2vit_n", "--format", "torchscript", "-o", str(tmp_path / "out.pt"), "--json", str(notes)]
    assert main(command) == main([*command, "--img-size", "32", "40"]) == 0
    (row,) = export_table.read_rows(notes)  # the second in place of the first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out.pt", notes.name])  # no lock is left
    assert (row["model"], row["format"], row["dynamic"], row["weights"]) == ("l2vit_n", "torchscript", False, "random")
    assert [check["shape"] for check in row["checks"]] == [[1, 3, 32, 40]]
    assert row["bytes"] == (tmp_path / "out.pt").stat().st_size
    assert row["torch"] == torch.__version__
    notes.write_text('{"score": 1}')
    assert main(command) == 1
    assert "no file of vitrail.tools.export --json" in capsys.readouterr().err


def test_notes_stand_below_the_table() -> None:
    checks = [export.Check((1, 3, 32, 40), 1e-7, 1e-7), export.Check((3, 3, 32, 40), 1e-7, 1e-7, "input reseeded")]
    row = export_table.make_row("biformer_n", "onnx", True, checks, bytes=1)
    assert ["note" in check for check in row["checks"]] == [False, True]
    assert export_table.render([row]).endswith("|\n\nbiformer_n, 3 x 3 x 32 x 40: input reseeded.\n")


def test_the_figures_of_the_documentation_are_good_ones() -> None:
    rows = [row for row in export_table.read_rows() if row["format"] == "onnx" and row["dynamic"]]
    assert {row["model"] for row in rows} <= set(image_models())
    for row in rows:
        shapes = [check["shape"] for check in row["checks"]]
        assert len({shape[0] for shape in shapes}) == len({tuple(shape[2:]) for shape in shapes}) == 2, row["model"]
        assert max(check["relative"] for check in row["checks"]) <= export.TOLERANCE, row["model"]
    count, _, *lines = export_table.render(rows).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert count.startswith(f"{len(rows)} of ")
    assert len(table) == len(rows) + 2
    assert {line.count("|") for line in table} == {9}


def test_the_command_fails_where_the_file_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def altered(path: Path) -> export.Runner:
        def run(image: Tensor) -> Tensor:
            return torch.jit.load(str(path))(image) * 1.001

        return run

    monkeypatch.setattr(export, "_read_torchscript", altered)
    assert main(["l2vit_n", "--format", "torchscript", "-o", str(tmp_path / "out.pt")]) == 1
    assert "differs from the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["davit_x"], "davit_t"),
        (["resnet50"], "unknown model"),
        (["l2vit_n.other"], "other"),
        (["scatterformer_kitti"], "takes points, not images"),
        (["biformer_n", "--img-size", "0"], "--img-size"),
        (["biformer_n", "--img-size", "1", "2", "3"], "--img-size"),
        (["biformer_n", "--batch-size", "0"], "--batch-size"),
        (["biformer_n", "--batch-size", "2", "--dynamic"], "--dynamic"),
        (["biformer_n", "--num-classes", "-1"], "--num-classes"),
        (["biformer_n", "--format", "tflite"], "tflite"),
        (["biformer_n", "-o", "."], "--output is ., a folder"),
        (["biformer_n", "--format", "torchscript", "-o", "no/such/folder/model.pt"], "does not exist"),
        (["gated_swinrmt_swat", "--format", "torchscript", "--dynamic", "--img-size", "64"], "from 225"),
    ],
)
def test_bad_usage(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["biformer_n"]) == 1
    assert "vitrail[onnx]" in capsys.readouterr().err


def test_an_image_that_the_model_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["biformer_stl", "--format", "torchscript", "--img-size", "16", "-o", str(tmp_path / "out.pt")]
    assert main(arguments) == 1
    assert "at least 32" in capsys.readouterr().err


def test_settings_are_restored(tmp_path: Path) -> None:
    before = vitrail.kernels._common.dispatch.settings.default_backend
    with pytest.raises(export.ToolError):
        export.write_model(_model("biformer_stl"), tmp_path / "x.pt", "torchscript", (3, 16, 16), dynamic=False)
    assert vitrail.kernels._common.dispatch.settings.default_backend == before
