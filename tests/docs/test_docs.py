"""The documentation: every code block of a page runs, top to bottom, as a reader would paste it; nothing is left out.

A block with a title is a file and is written; other Python runs in one namespace a page; a shell block holds commands
of this package (called in this process, which saves their start), of pip, or of pytest.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in [*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md")])
NEEDS = {"tutorials/backbone.md": ["mmseg", "mmdet"], "tutorials/export.md": ["onnx", "onnxscript", "onnxruntime"]}
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    title: str
    code: str


def blocks(page: str) -> Iterator[Block]:
    """A page's blocks that are to be run."""
    for block in _BLOCK.findall((DOCS / page).read_text()):
        if block[0] != "text":
            yield Block(*block)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_pasted(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(page, []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, page, "exec"), scope)
        else:
            assert block.language == "sh", f"{page}: a block of {block.language}"
            for line in block.code.replace("\\\n", " ").splitlines():
                run(shlex.split(line, comments=True))


def run(words: list[str]) -> None:
    """Runs a command line of a page."""
    match words:
        case []:
            pass
        case ["pip", "install", "-e", what]:
            assert set(what.strip(".[]").split(",")) <= set(extras())
        case ["python", "-m", "pytest", *arguments]:
            run_with_own_operators(arguments)
        case ["python", "-m", module, *arguments] if module.startswith("vitrail.tools."):
            assert importlib.import_module(module).main(arguments) == 0
        case _:
            pytest.fail(f"a page has a command that cannot be tried: {shlex.join(words)}")


def extras() -> list[str]:
    """The package's extras."""
    config = ConfigParser()
    config.read(DOCS.parent / "setup.cfg")
    return list(config["options.extras_require"])


def run_with_own_operators(arguments: list[str]) -> None:
    """Runs tests of operators that the page wrote below `kernels`; in a process of its own, since operators stay."""
    code = (
        "import sys, pytest, vitrail.kernels\nvitrail.kernels.__path__.append('kernels')\n"
        f"sys.exit(pytest.main(['--import-mode=importlib', '-p', 'no:cacheprovider', *{arguments!r}]))"
    )
    path = os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in [*DOCS.glob("*.md"), *DOCS.glob("*/*.md")]}
    listed = set(re.findall(r": ([\w/-]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.M))
    cards = {page for page in pages if page.startswith("model_cards/")}
    assert listed == pages - cards | {"model_cards/README.md", "model_cards/benchmarks/README.md"}
    for page in listed:
        for link in re.findall(r"\]\(([^):#]+\.md)\)", (DOCS / page).read_text()):
            assert (DOCS / page).parent.joinpath(link).is_file(), f"{page} links to {link}"


def test_the_reference_names_what_exists_and_all_of_it() -> None:
    named = {name for path in DOCS.glob("api/*.md") for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M)}
    for name in named - {"vitrail"}:
        parent, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(parent), last) or importlib.import_module(name), name
    root = DOCS.parent
    public = {f"vitrail.layers.{path.stem}" for path in root.glob("layers/[a-z]*.py") if path.stem != "explain"}
    public |= {f"vitrail.kernels.{path.parent.name}" for path in root.glob("kernels/[a-z]*/__init__.py")}
    public |= {f"vitrail.models.{path.stem}" for path in root.glob("models/[a-z]*.py") if path.stem != "accelerate"}
    config = ConfigParser()
    config.read(root / "setup.cfg")
    commands = re.findall(r"= (vitrail\.tools\.\w+):main", config["options.entry_points"]["console_scripts"])
    assert public | set(commands) <= named


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/api/kernels.html").read_text()
    assert "<math" in page
    assert ":math:" not in page
    assert ".. math::" not in page
    page = (tmp_path / "site/tutorials/export.html").read_text()
    assert "<td>l2vit_n</td>" in page  # a row for every model, from the figures


def test_the_configuration_is_plain_yaml() -> None:
    config = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
