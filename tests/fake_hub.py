"""A model hub on this machine: the routes of huggingface.co that a download uses, for one folder of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves `folder` as the model `owner/tiny`, and records requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []  # method and path
        self.tokens: dict[str, str | None] = {}  # by path
        self.claimed_size: int | None = None  # the size in every file's headers, instead of the real one

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    with FakeHub(folder) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        self.server.tokens[path] = self.headers.get("Authorization")
        files = f"/owner/tiny/resolve/{COMMIT}/"
        if path == "/api/models/owner/tiny/revision/main":
            self._json({"id": "owner/tiny", "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/owner/tiny/tree/{COMMIT}":
            self._json([self._entry(file) for file in sorted(self.server.folder.iterdir())])
        elif path.startswith(files):
            self._file(self.server.folder / path.removeprefix(files))
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}

    def _file(self, file: Path) -> None:
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT}
        if self.server.claimed_size is not None:
            headers |= {"X-Linked-Size": str(self.server.claimed_size), "X-Linked-Etag": f'"{_digest(file)}"'}
        self._send(200, file.read_bytes(), headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
