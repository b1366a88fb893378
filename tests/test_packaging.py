"""The wheel and the source distribution hold every source file once, under `vitrail/`, and no tests."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("kernels", "layers", "models", "tools", "configs")


@pytest.fixture(scope="module")
def wheels(root_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Names in two wheels: built from a copy of the checkout, and from that copy's source distribution."""
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
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    _build("wheel", unpacked, folder / "from_sdist")
    return [_names(folder / "from_checkout"), _names(folder / "from_sdist")]


@pytest.mark.slow
def test_wheel_holds_every_source_file_once(wheels: list[list[str]], root_dir: Path) -> None:
    expected = {
        f"vitrail/{path.relative_to(root_dir).as_posix()}"
        for folder in FOLDERS
        for path in root_dir.glob(f"{folder}/**/*.py")
    }
    expected |= {f"vitrail/model_cards/{path.name}" for path in root_dir.glob("model_cards/*.*")}
    expected |= {"vitrail/__init__.py", "vitrail/_version.py", "vitrail/py.typed"}
    for names in wheels:
        assert len(names) == len(set(names)), "a file is in the wheel twice"
        package = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
        assert expected <= package, f"missing from the wheel: {sorted(expected - package)}"
        assert all(name.startswith("vitrail/") for name in package), "the wheel installs other top-level packages"
        assert not [name for name in package if "/tests/" in name or "/test_" in name], "the wheel holds tests"


@pytest.mark.slow
def test_source_distribution_builds_the_same_wheel(wheels: list[list[str]]) -> None:
    from_checkout, from_sdist = wheels
    assert sorted(from_checkout) == sorted(from_sdist)


def _build(kind: str, source: Path, target: Path) -> None:
    """Calls the build backend in `source`, as pip does without build isolation."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    target.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def _names(folder: Path) -> list[str]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()
