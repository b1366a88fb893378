"""A web server on the loopback interface that serves one file and can misbehave as real ones do."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What a server has and how it behaves.

    Attributes:
        files: Content by path.
        cut_after: Bytes of the body after which the next answers break off, one entry an answer.
        redirects: Path to send elsewhere.
        failing: Status by path of answers without a file.
        types: Content type by path.
        delay: Seconds between two pieces of a body.
        ranges: Whether a part of a file can be asked for.
        headers: Those of every answered request, lower case.
    """

    files: dict[str, bytes]
    cut_after: list[int] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    failing: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    ranges: bool = True
    with_length: bool = True
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(site: Site) -> Iterator[str]:
    """Runs a server for a site; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            site.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            if self.path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif self.path in site.failing:
                self.send_error(site.failing[self.path])
            elif self.path in site.files:
                self._send(site.files[self.path])
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def _send(self, content: bytes) -> None:
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            start = 0
            if site.ranges and "Range" in self.headers and self.headers.get("If-Range") == tag:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", tag)
            self.send_header("Content-Type", site.types.get(self.path, "application/octet-stream"))
            if site.with_length:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = b"" if self.command == "HEAD" else content[start:]
            if site.cut_after:
                body = body[: site.cut_after.pop(0)]
            step = max(len(body) // 8, 1)
            for offset in range(0, len(body), step):
                self.wfile.write(body[offset : offset + step])
                self.wfile.flush()
                if site.delay:
                    threading.Event().wait(site.delay)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site.url
    finally:
        server.shutdown()
        server.server_close()
