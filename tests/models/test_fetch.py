"""The downloader against a real server that breaks off, lies and misbehaves."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from _weights_server import Site, serve

from vitrail.models import _fetch
from vitrail.models._fetch import WeightsError, digest_in_name, fetch, file_digest, verify
from vitrail.models._weights import read_checkpoint

NAME = "model.safetensors"
WEIGHTS = safetensors.torch.save({"weight": torch.arange(60_000, dtype=torch.float32)})
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fetch.time, "sleep", lambda seconds: None)


def left_in(folder: Path) -> list[str]:
    """Files other than locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_is_fetched_once_with_progress(tmp_path: Path) -> None:
    site, seen = Site({f"/{NAME}": WEIGHTS}), []
    with serve(site) as url:
        for _ in range(2):
            path = fetch(f"{url}/{NAME}", tmp_path, sha256=DIGEST, progress=lambda *state: seen.append(state))
    assert path.read_bytes() == WEIGHTS
    assert len(site.requests) == 1
    assert seen[0] == (0, len(WEIGHTS))
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert left_in(tmp_path) == [NAME]


def test_a_cut_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    site = Site({f"/{NAME}": WEIGHTS}, cut_after=[100_000, 50_000])
    with serve(site) as url:
        assert fetch(f"{url}/{NAME}", tmp_path, sha256=DIGEST).read_bytes() == WEIGHTS
    assert [headers.get("range") for _, headers in site.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_goes_on_where_an_earlier_gave_up(tmp_path: Path) -> None:
    site = Site({f"/{NAME}": WEIGHTS}, cut_after=[100_000] + [0] * 5)
    with serve(site) as url:
        with pytest.raises(WeightsError, match=r"broke off after 100,000 bytes.*the next call goes on"):
            fetch(f"{url}/{NAME}", tmp_path)
        assert NAME not in left_in(tmp_path)
        site.cut_after.clear()
        site.requests.clear()
        assert fetch(f"{url}/{NAME}", tmp_path).read_bytes() == WEIGHTS
    assert [headers.get("range") for _, headers in site.requests] == ["bytes=100000-"]


@pytest.mark.parametrize("ranges", [True, False], ids=["changed", "no-ranges"])
def test_a_part_of_another_version_is_not_continued(tmp_path: Path, ranges: bool) -> None:
    old = WEIGHTS[:-4] + b"\1\2\3\4"
    site = Site({f"/{NAME}": old}, cut_after=[100_000] + [0] * 5, ranges=ranges)
    with serve(site) as url:
        with pytest.raises(WeightsError, match="broke off" if ranges else "nothing came from"):
            fetch(f"{url}/{NAME}", tmp_path)
        site.cut_after.clear()
        site.files[f"/{NAME}"] = WEIGHTS
        assert fetch(f"{url}/{NAME}", tmp_path).read_bytes() == WEIGHTS


@pytest.mark.parametrize("where", ["argument", "fragment", "name"])
def test_a_wrong_hash_leaves_nothing(tmp_path: Path, where: str) -> None:
    wrong = "0" * 64
    name = "model-00000000.safetensors" if where == "name" else NAME
    with serve(Site({f"/{name}": WEIGHTS})) as url:
        address = f"{url}/{name}" + (f"#sha256={wrong}" if where == "fragment" else "")
        with pytest.raises(WeightsError, match=f"has SHA-256 {DIGEST}, expected 0000"):
            fetch(address, tmp_path, sha256=wrong if where == "argument" else None)
    assert left_in(tmp_path) == []


def test_the_right_hash_in_the_name_passes(tmp_path: Path) -> None:
    name = f"model-{DIGEST[:8]}.safetensors"
    with serve(Site({f"/{name}": WEIGHTS})) as url:
        assert fetch(f"{url}/{name}", tmp_path).name == name
    assert digest_in_name(name) == DIGEST[:8]
    assert digest_in_name("L2ViT-Tiny-checkpoint-best-ema.pth") is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_refused_even_without_a_length(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    weights = {"weight": torch.zeros(1000)}
    if suffix == ".pth":
        torch.save(weights, whole)
    else:
        safetensors.torch.save_file(weights, whole)
    content = whole.read_bytes()
    site = Site({f"/cut{suffix}": content[:-100], f"/good{suffix}": content}, with_length=False)
    with serve(site) as url:
        with pytest.raises(WeightsError, match="cut off"):
            fetch(f"{url}/cut{suffix}", tmp_path / "cache")
        assert left_in(tmp_path / "cache") == []
        assert fetch(f"{url}/good{suffix}", tmp_path / "cache").read_bytes() == content


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
@pytest.mark.parametrize("name", [NAME, "model.pth"])
def test_a_web_page_is_not_taken_for_weights(tmp_path: Path, content_type: str, name: str) -> None:
    page = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"
    with (
        serve(Site({f"/{name}": page}, types={f"/{name}": content_type})) as url,
        pytest.raises(WeightsError, match="is a web page, not weights"),
    ):
        fetch(f"{url}/{name}", tmp_path)
    assert left_in(tmp_path) == []


def test_redirects_are_followed_and_missing_files_named(tmp_path: Path) -> None:
    site = Site({"/storage/blob": WEIGHTS}, redirects={f"/{NAME}": "/storage/blob"})
    with serve(site) as url:
        assert fetch(f"{url}/{NAME}", tmp_path).name == NAME
        with pytest.raises(WeightsError, match=r"other\.pth cannot be fetched: HTTP 404"):
            fetch(f"{url}/other.pth", tmp_path)
    assert len(site.requests) == 3


def test_redirects_do_not_leave_https() -> None:
    request = _fetch.urllib.request.Request("https://example.org/a.pth")
    with pytest.raises(WeightsError, match="not https"):
        _fetch._SafeRedirects().redirect_request(request, None, 302, "Found", {}, "http://example.org/a.pth")


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with serve(Site({})) as url:
        pass
    with pytest.raises(WeightsError, match=r"nothing came from http.*refused"):
        fetch(f"{url}/{NAME}", tmp_path)


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_fetch.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with serve(Site({f"/{NAME}": WEIGHTS})) as url, pytest.raises(OSError, match="No space left") as caught:
        fetch(f"{url}/{NAME}", tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / NAME)
    assert left_in(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_disk_that_fills_up_is_not_left_full(tmp_path: Path) -> None:
    with serve(Site({f"/{NAME}": WEIGHTS})) as url:
        (tmp_path / f".{NAME}.partial").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as caught:
            fetch(f"{url}/{NAME}", tmp_path)
    assert caught.value.filename == str(tmp_path / NAME)
    assert left_in(tmp_path) == []


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "executed"
    source = tmp_path / "source.pth"
    torch.save({"model": Malicious(trap)}, source, _use_new_zipfile_serialization=zipped)
    with serve(Site({"/evil.pth": source.read_bytes()})) as url:
        path = fetch(f"{url}/evil.pth", tmp_path / "cache")
    with pytest.raises(WeightsError, match="could run code"):
        read_checkpoint(path)
    assert not trap.exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(WeightsError):
        read_checkpoint(tmp_path / "plain.pth")
    assert not trap.exists()


def _fetch_in_process(url: str, folder: str) -> None:
    fetch(url, folder, sha256=DIGEST)


def test_two_processes_fetch_a_file_once(tmp_path: Path) -> None:
    site = Site({f"/{NAME}": WEIGHTS}, delay=0.15)
    context = multiprocessing.get_context("fork")
    with serve(site) as url:
        processes = [context.Process(target=_fetch_in_process, args=(f"{url}/{NAME}", tmp_path)) for _ in range(2)]
        for process in processes:
            process.start()
        seen_whole = []
        deadline = time.monotonic() + 20
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if (tmp_path / NAME).exists():
                seen_whole.append(file_digest(tmp_path / NAME) == DIGEST)
        for process in processes:
            process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(site.requests) == 1
    assert all(seen_whole)
    assert left_in(tmp_path) == [NAME]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.pth", "a.pth", "https://host/"])
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(WeightsError, match=r"allowed: http|does not end in the name"):
        fetch(url, tmp_path)


def test_verify_names_the_damage(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(WEIGHTS)
    verify(path, DIGEST)
    verify(path, DIGEST[:8].upper())
    with pytest.raises(WeightsError, match=f"has SHA-256 {DIGEST}, expected"):
        verify(path, "1" * 64)
    with pytest.raises(WeightsError, match="sha256 is 'xyz'"):
        verify(path, "xyz")
    for cut in (0, 4, 20, len(WEIGHTS) - 1):
        path.write_bytes(WEIGHTS[:cut])
        with pytest.raises(WeightsError, match=r"safetensors|cut off"):
            verify(path)
