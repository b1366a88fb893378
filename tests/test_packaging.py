"""The wheel and the source distribution hold every source file once, under `vitrail/`, and no tests; wheels work."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("kernels", "layers", "models", "tools", "configs")


@pytest.fixture(scope="module")
def wheels(root_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two wheels: built from a copy of the checkout, and from that copy's source distribution."""
    try:
        setuptools = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        setuptools = "0"
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip(f"building without isolation needs setuptools >= 77, version {setuptools} is installed")
    folder = tmp_path_factory.mktemp("packages")
    checkout = folder / "checkout"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "work_dirs", "*.egg-info", "__pycache__")
    shutil.copytree(root_dir, checkout, symlinks=True, ignore=unwanted)
    _build("wheel", checkout, folder / "from_checkout")
    _build("sdist", checkout, folder / "sdist")
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not before Python 3.11.4 and 3.10.12
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", **filters)
    (unpacked,) = (folder / "unpacked").iterdir()
    _build("wheel", unpacked, folder / "from_sdist")
    return [next((folder / place).glob("*.whl")) for place in ("from_checkout", "from_sdist")]


@pytest.mark.slow
def test_wheel_holds_every_source_file_once(wheels: list[Path], root_dir: Path) -> None:
    expected = {
        f"vitrail/{path.relative_to(root_dir).as_posix()}"
        for folder in FOLDERS
        for path in root_dir.glob(f"{folder}/**/*.py")
    }
    expected |= {f"vitrail/model_cards/{path.name}" for path in root_dir.glob("model_cards/*.*")}
    expected |= {f"vitrail/weights/{path.name}" for path in root_dir.glob("weights/*.*")}
    expected |= {"vitrail/__init__.py", "vitrail/_version.py", "vitrail/py.typed"}
    for names in map(_names, wheels):
        assert len(names) == len(set(names)), "a file is in the wheel twice"
        package = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
        assert expected <= package, f"missing from the wheel: {sorted(expected - package)}"
        assert all(name.startswith("vitrail/") for name in package), "the wheel installs other top-level packages"
        assert not [name for name in package if "/tests/" in name or "/test_" in name], "the wheel holds tests"


@pytest.mark.slow
def test_source_distribution_builds_the_same_wheel(wheels: list[Path]) -> None:
    from_checkout, from_sdist = map(_names, wheels)
    assert sorted(from_checkout) == sorted(from_sdist)


@pytest.mark.slow
def test_an_unpacked_wheel_loads_the_weights_that_it_brings(wheels: list[Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels[1]) as archive:
        archive.extractall(tmp_path)
    code = (
        "import timm, vitrail\n"
        "model = timm.create_model('biformer_n.digits', pretrained=True)\n"
        "print(vitrail.__file__, model.num_classes, vitrail.models._weights.SHIPPED)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "VITRAIL_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [f"{tmp_path}/vitrail/__init__.py", "10", f"{tmp_path}/vitrail/weights"]


def _build(kind: str, source: Path, target: Path) -> None:
    """Calls the build backend in `source`, as pip does without build isolation."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    target.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()
