"""`import vitrail` needs neither a GPU nor Triton nor OpenMMLab packages, and stays within its own names and layers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

OPENMMLAB = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")
SOURCE_FOLDERS = ("kernels", "layers", "models", "tools", "configs")
# What a folder may not import; models/mm is the bridge to OpenMMLab and free to do so.
FORBIDDEN = {
    "kernels": ("timm", "vitrail.layers", "vitrail.models", "vitrail.tools", *OPENMMLAB),
    "layers": ("vitrail.models", "vitrail.tools", *OPENMMLAB),
    "models": ("vitrail.tools", *OPENMMLAB),
    "tools": (),
    "configs": (),
}

# Hides packages as if they were not installed: finders answer None, which `importlib.util.find_spec` passes on.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""

RUN_MODEL = """
import torch, timm, vitrail
model = timm.create_model("biformer_n", num_classes=3).eval()
out = model(torch.zeros(2, 3, 32, 32))
assert out.shape == (2, 3) and out.isfinite().all()
out.sum().backward()
"""

NO_SIDE_EFFECTS = f"""
import sys, timm
before = set(sys.modules)
import vitrail
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
unwanted = tops & {{"triton", *{OPENMMLAB!r}, "models", "layers", "kernels", "tools"}}
assert not unwanted, f"import vitrail also imports {{sorted(unwanted)}}"
"""

NAMES_ARE_FREE = """
import timm
before = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
import vitrail
ours = vitrail.list_models()
assert ours, "no model was registered"
assert not set(ours) & set(before), f"timm's own names: {sorted(set(ours) & set(before))}"
assert set(timm.list_models()) == set(ours) | set(before)
replaced = [name for name, function in before.items() if timm.models.model_entrypoint(name) is not function]
assert not replaced, f"entry points of timm that were replaced: {replaced}"
"""


def run_python(code: str, **environment: str) -> None:
    """Runs code in a new interpreter and fails the test with its output unless it ends well."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("hidden", [("triton",), OPENMMLAB], ids=["triton", "openmmlab"])
def test_works_without_a_package(hidden: tuple[str, ...]) -> None:
    check = f"\nfor name in {hidden!r}:\n    assert name not in sys.modules\n"
    run_python(HIDE.format(hidden=hidden) + RUN_MODEL + check)


def test_works_without_a_gpu() -> None:
    run_python("import torch\nassert not torch.cuda.is_available()\n" + RUN_MODEL, CUDA_VISIBLE_DEVICES="")


def test_import_loads_neither_triton_nor_openmmlab() -> None:
    run_python(NO_SIDE_EFFECTS)


def test_model_names_do_not_collide_with_timms() -> None:
    run_python(NAMES_ARE_FREE)


def test_hiding_hides() -> None:
    hidden = "\nimport importlib.util\nassert importlib.util.find_spec('timm') is None\n"
    run_python(
        HIDE.format(hidden=("timm",))
        + hidden
        + "try:\n    import timm\nexcept ImportError:\n    sys.exit(0)\nsys.exit(1)"
    )


@pytest.mark.parametrize("folder", SOURCE_FOLDERS)
def test_imports_follow_the_layers(folder: str, root_dir: Path) -> None:
    """Root folders are imported as `vitrail.<folder>` only, and lower layers import none above them."""
    broken = [
        f"{path.relative_to(root_dir)} imports {name}"
        for path in sorted((root_dir / folder).rglob("*.py"))
        for name in _imported(path)
        if name.partition(".")[0] in SOURCE_FOLDERS
        or (
            any(name == banned or name.startswith(f"{banned}.") for banned in FORBIDDEN[folder])
            and (root_dir / "models" / "mm") not in path.parents
        )
    ]
    assert not broken


def _imported(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names
