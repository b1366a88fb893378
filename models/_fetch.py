"""Downloads a file so that its name holds the whole, verified content or nothing.

A download that was cut goes on where it stopped, in the same call or in a later one; two processes that want the same
file fetch it once; what arrives is checked against a SHA-256 where one is known, and for being a weights file at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

_CHUNK = 1 << 20
_ATTEMPTS = 5
_MAX_HEADER = 100_000_000  # bytes of a safetensors header, as its own library allows
_AGENT = "vitrail"
_WEB_PAGE = "is a web page, not weights: the address may want a login or a click in a browser"
Progress = Callable[[int, "int | None"], None]


class WeightsError(ValueError, RuntimeError):
    """Weights cannot be had or used; the message names the place and the reason.

    A `RuntimeError` as well, which is what timm raises for a model without weights.
    """


class NotServedError(WeightsError):
    """The server answers, and has no such file for us: HTTP 4xx, or a web page in place of it.

    Attributes:
        code: The answer's HTTP status.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def fetch(
    url: str,
    folder: str | os.PathLike[str],
    *,
    filename: str | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
    timeout: float = 30.0,
    check: Callable[[Path, str], str | None] | None = None,
) -> Path:
    """Returns the path of a URL's content in `folder`, which is downloaded unless it is there.

    Args:
        url: http or https; may end in "#sha256=..." as pip's do.
        folder: Where the file goes; made if it does not exist.
        filename: Its name there; default: the last part of the URL's path.
        sha256: Hexadecimal digest, or its first digits (8 at least). Default: that of the URL's fragment, else the
            digits at the end of the file's name ("name-0123abcd.pth").
        progress: Called with (bytes so far, bytes in all or None).
        timeout: Seconds without an answer after which an attempt has failed.
        check: Tells from (path, ending of the final name) what is wrong with the content, or None; default: looks for
            the structure of a weights file.

    Raises:
        WeightsError: The server has no such file, sends something else, or the content is damaged.
        OSError: No room or no permission in `folder`.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise WeightsError(f"url is {url!r}; allowed: http:// and https:// addresses")
    filename = filename or urllib.parse.unquote(parts.path).rpartition("/")[2]
    if not filename or filename != Path(filename).name:
        raise WeightsError(f"url {url} does not end in the name of a file")
    sha256 = _checked_digest(sha256 or dict(urllib.parse.parse_qsl(parts.fragment)).get("sha256"))
    target = Path(folder) / filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{filename}.lock")):  # another process may just be fetching it
        if not target.exists():
            digest = sha256 or digest_in_name(filename)
            _Download(url.partition("#")[0], target, digest, progress, timeout, check or _damage).run()
    return target


def digest_in_name(filename: str) -> str | None:
    """The first digits of the SHA-256 that torch's and timm's files carry in their name ("name-0123abcd.pth")."""
    match = re.search(r"-([0-9a-f]{8,64})\.[a-z.]+$", filename)
    return match[1] if match else None


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: str | os.PathLike[str], sha256: str | None = None) -> None:
    """Checks that a file holds weights from end to end and, where a digest is known, that it is the right file.

    Raises:
        WeightsError: It does not.
    """
    path = Path(path)
    if problem := _damage(path, path.suffix):
        raise WeightsError(f"{path} {problem}")
    if sha256 is not None:
        wanted, found = _checked_digest(sha256) or "", file_digest(path)
        if not found.startswith(wanted):
            raise WeightsError(f"{path} has SHA-256 {found}, expected {wanted}: it is damaged or another file")


def _checked_digest(sha256: str | None) -> str | None:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise WeightsError(f"sha256 is {sha256!r}; allowed: 8 to 64 hexadecimal digits")
    return sha256.lower() if sha256 else None


def _damage(path: Path, suffix: str) -> str | None:
    """What is wrong with a file by its structure alone, or None; `suffix` tells the format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return _WEB_PAGE
    if suffix == ".safetensors":
        return _safetensors_damage(path, size)
    if start.startswith(b"PK"):
        return None if zipfile.is_zipfile(path) else "is cut off: the index at its end is missing"
    if not start.startswith(b"\x80"):
        return "is not a checkpoint of PyTorch"
    # The oldest format: a pickle stream without an index or a length.
    return None


def _safetensors_damage(path: Path, size: int) -> str | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= _MAX_HEADER or 8 + length > size:
            return "is not a whole safetensors file"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is not a safetensors file: its header cannot be read"
    wanted = 8 + length + max(ends, default=0)
    return None if size == wanted else f"has {size:,} bytes, its header says {wanted:,}: it is cut off or damaged"


def probe(url: str, timeout: float = 10.0) -> int | None:
    """Asks a server for a file without fetching it; returns the file's bytes where the server tells them.

    Raises:
        NotServedError: The server answers, and has no such file for us.
        WeightsError: No server answers.
    """
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT, "Accept-Encoding": "identity"}, method="HEAD")
    try:
        with _open(request, timeout) as answer:
            if _is_web_page(answer):
                raise NotServedError(f"{url} {_WEB_PAGE}", answer.status)
            length = answer.headers.get("Content-Length")
            return None if length is None else int(length)
    except urllib.error.HTTPError as error:
        raise NotServedError(f"{url} cannot be fetched: HTTP {error.code} {error.reason}", error.code) from error
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise WeightsError(f"{url} cannot be reached: {getattr(reason, 'strerror', None) or reason}") from error


def _open(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    return urllib.request.build_opener(_SafeRedirects).open(request, timeout=timeout)


def _is_web_page(answer: http.client.HTTPResponse) -> bool:
    return answer.headers.get_content_type() in ("text/html", "application/xhtml+xml")


class _Interrupted(Exception):
    """The connection broke; what has arrived stays."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to something that anybody on the way can change."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise WeightsError(f"{req.full_url} leads to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Download:
    """One file on its way; `run` is called with the file's lock held."""

    def __init__(
        self,
        url: str,
        target: Path,
        sha256: str | None,
        progress: Progress | None,
        timeout: float,
        check: Callable[[Path, str], str | None],
    ) -> None:
        self.url = url
        self.target = target
        self.sha256 = sha256
        self.progress = progress or (lambda done, total: None)
        self.timeout = timeout
        self.check = check
        self.partial = target.with_name(f".{target.name}.partial")
        self.validator = target.with_name(f".{target.name}.partial.tag")  # the version that the partial file is of

    def run(self) -> None:
        self._receive()
        if problem := self.check(self.partial, self.target.suffix):
            self._discard()
            raise WeightsError(f"{self.url} {problem}")
        if self.sha256 and not (found := file_digest(self.partial)).startswith(self.sha256):
            self._discard()
            raise WeightsError(f"{self.url} has SHA-256 {found}, expected {self.sha256}: it is damaged or another file")
        os.replace(self.partial, self.target)
        self.validator.unlink(missing_ok=True)

    def _receive(self) -> None:
        failures, stalled_at = 0, -1
        while True:
            try:
                return self._attempt()
            except _Interrupted as error:
                arrived = self._arrived()
                failures = failures + 1 if arrived == stalled_at else 1  # progress earns new attempts
                stalled_at = arrived
                if failures >= _ATTEMPTS:
                    raise WeightsError(self._describe_failure(arrived, error)) from error
                time.sleep(min(0.1 * 2**failures, 5.0))

    def _describe_failure(self, arrived: int, error: _Interrupted) -> str:
        if not arrived:
            return f"nothing came from {self.url}: {error} ({_ATTEMPTS} attempts)"
        return f"{self.url} broke off after {arrived:,} bytes ({error}); the next call goes on from there"

    def _arrived(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _attempt(self) -> None:
        request = urllib.request.Request(self.url, headers={"User-Agent": _AGENT, "Accept-Encoding": "identity"})
        start = self._arrived() if self.validator.exists() else 0
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", self.validator.read_text())
        with self._answer(request) as answer:
            resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if answer.status == 206 and not resumed:
                self._discard()
                raise _Interrupted("the server sent another part than was asked for")
            self._store(answer, start if resumed else 0)

    @contextlib.contextmanager
    def _answer(self, request: urllib.request.Request) -> Iterator[http.client.HTTPResponse]:
        """The server's answer; what goes wrong on the way becomes one of two kinds of error."""
        try:
            with _open(request, self.timeout) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the file has changed or is complete already
                self._discard()
                raise _Interrupted("the server refused to go on from there") from error
            if error.code >= 500 or error.code == 429:
                raise _Interrupted(f"HTTP {error.code} {error.reason}") from error
            message = f"{self.url} cannot be fetched: HTTP {error.code} {error.reason}"
            raise NotServedError(message, error.code) from error
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise _Interrupted(str(error) or type(error).__name__) from error
        except urllib.error.URLError as error:
            raise _Interrupted(str(error.reason)) from error

    def _store(self, answer: http.client.HTTPResponse, start: int) -> None:
        if _is_web_page(answer):
            self._discard()
            raise NotServedError(f"{self.url} {_WEB_PAGE}", answer.status)
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        try:
            if total is not None and total - start > shutil.disk_usage(self.target.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._remember_version(answer)
            with self.partial.open("r+b" if start else "wb") as file:
                file.seek(start)
                self._copy(answer, file, start, total)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._discard()  # a full disk is not left full
            error.filename = str(self.target)
            raise

    def _remember_version(self, answer: http.client.HTTPResponse) -> None:
        """Keeps what tells the server's versions apart; without it a later call starts afresh."""
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):
            self.validator.write_text(tag)
        else:
            self.validator.unlink(missing_ok=True)

    def _copy(self, answer: http.client.HTTPResponse, file: IO[bytes], start: int, total: int | None) -> None:
        done = start
        self.progress(done, total)
        while chunk := answer.read1(_CHUNK):
            file.write(chunk)
            done += len(chunk)
            self.progress(done, total)
        file.flush()
        os.fsync(file.fileno())
        if total is not None and done < total:
            raise _Interrupted(f"{total - done:,} bytes are missing")

    def _discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.validator.unlink(missing_ok=True)
