"""Runs timm's own model tests on this package's models: `python tests/contract/run.py [MODEL ...]`.

The tests are `tests/test_models.py` of the source distribution of the timm version that is installed; wheels lack it,
so that it is downloaded once into `.cache/` (or taken from the file that VITRAIL_TIMM_TESTS names).
Without network they are skipped with a message, unless VITRAIL_REQUIRE_CONTRACT=1, as CI sets it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

from vitrail.tools._common.entry_points import image_models

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "timm_tests"


class TestsUnavailable(RuntimeError):
    """timm's test file could neither be found nor downloaded."""

    __test__ = False


def find_timm_tests() -> Path:
    """Path of timm's `test_models.py` of the installed version, downloaded if need be.

    Raises:
        TestsUnavailable: It cannot be had; the message says why.
    """
    given = os.environ.get("VITRAIL_TIMM_TESTS")
    path = Path(given) if given else CACHE / timm.__version__ / "test_models.py"
    if path.is_file():
        return path
    if given:
        raise TestsUnavailable(f"VITRAIL_TIMM_TESTS is {given}, where no file is")
    _download(path)
    return path


def _download(path: Path) -> None:
    """Puts the test file alone at `path`: beside the rest of the distribution it would import timm from there."""
    wanted = f"timm-{timm.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", "timm", "--dest", folder, f"timm=={timm.__version__}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TestsUnavailable(f"pip could not download the source distribution of {wanted}: {reason}")
        with tarfile.open(Path(folder) / f"{wanted}.tar.gz") as archive:
            member = archive.extractfile(f"{wanted}/tests/test_models.py")
            assert member is not None
            source = member.read()
    path.parent.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(source)
    partial.replace(path)


def smallest_of_each_family() -> list[str]:
    """The model with the fewest parameters of every module of `vitrail.models`."""
    smallest: dict[str, tuple[int, str]] = {}
    for name in image_models():
        family = timm.models.model_entrypoint(name).__module__
        size = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return [name for _, name in smallest.values()]


def run(
    models: list[str], extra: list[str] | None = None, capture_output: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs the tests of `models` in a process of their own and returns it.

    Args:
        models: Names that `timm.create_model` knows after `import vitrail`.
        extra: More arguments for pytest.
        capture_output: Keep what it prints in the result in place of showing it.

    Raises:
        TestsUnavailable: timm's test file cannot be had.
    """
    tests = find_timm_tests()
    # The test file leaves tests out on GitHub's runners for lack of memory, which is no reason for our sizes.
    # Nor do users interpret kernels, which is slow, as other tests of this package do.
    left_out = ("GITHUB_ACTIONS", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment["VITRAIL_CONTRACT_MODELS"] = " ".join(models)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tests.parent), "-p", "plugin"]
    command += ["-q", "--no-header", "--disable-warnings", "-p", "no:cacheprovider", *(extra or []), str(tests)]
    return subprocess.run(
        command, env=environment, capture_output=capture_output, text=True, check=False, cwd=tests.parent
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Runs timm's own model tests on models of this package.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models to test (default: all of this package)")
    parser.add_argument("--smallest", action="store_true", help="only the smallest model of each family")
    options = parser.parse_args(argv)
    models = options.models or (smallest_of_each_family() if options.smallest else image_models())
    try:
        return run(models, capture_output=False).returncode
    except TestsUnavailable as error:
        required = os.environ.get("VITRAIL_REQUIRE_CONTRACT") == "1"
        print(f"{'ERROR' if required else 'SKIPPED'}: timm's model tests did not run: {error}", file=sys.stderr)
        return int(required)


if __name__ == "__main__":
    sys.exit(main())
