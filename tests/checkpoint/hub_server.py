# SPDX-License-Identifier: Apache-2.0
"""A server that speaks as much of the Hugging Face hub's API as its own client asks for."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_INFO = re.compile(r"/api/models/(owner/[\w.-]+)/(revision|tree)/(main|[0-9a-f]{40})")
_FILE = re.compile(r"/(owner/[\w.-]+)/resolve/(?:main|[0-9a-f]{40})/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves the folders below ``root`` as the models ``owner/FOLDER``.

    ``requests`` holds (file, first byte, last byte) of every GET of a file; bytes are None where
    the whole was asked for. With ``ignores_ranges`` it sends the whole whatever was asked for.
    """

    def __init__(self, root: Path, ignores_ranges: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.ignores_ranges = ignores_ranges
        self.requests: list[tuple[str, int | None, int | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def whole(self) -> list[str]:
        """Shards that were downloaded, as ``FOLDER/FILE``."""
        asked = {name for name, first, _ in self.requests if first is None}
        return sorted(name for name in asked if name.endswith(".safetensors"))

    def ranged_bytes(self) -> int:
        """Bytes that were asked for by range."""
        return sum(
            last - first + 1
            for _, first, last in self.requests
            if first is not None and last is not None
        )


@contextmanager
def serve(root: Path, ignores_ranges: bool = False) -> Iterator[Hub]:
    """Run a hub over the folders below ``root``."""
    hub = Hub(root, ignores_ranges)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        if info := _INFO.fullmatch(path):
            self._send_info(self.server.root / Path(info[1]).name, info[1], info[2])
        elif file := _FILE.fullmatch(path):
            self._send_file(f"{Path(file[1]).name}/{file[2]}", with_body)
        else:
            self._send(404, b"{}", {})

    def _send_info(self, folder: Path, repo_id: str, what: str) -> None:
        if not folder.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(file for file in folder.iterdir() if file.is_file())
        content: Any = {
            "id": repo_id,
            "sha": COMMIT,
            "siblings": [{"rfilename": file.name} for file in files],
        }
        if what == "tree":
            content = [
                {
                    "type": "file",
                    "path": file.name,
                    "size": file.stat().st_size,
                    "oid": sha1(file.name.encode()).hexdigest(),
                }
                for file in files
            ]
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, with_body: bool) -> None:
        file = self.server.root / name
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {
            "ETag": f'"{sha1(name.encode()).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if with_body:
            span = (int(asked[1]), int(asked[2])) if asked else (None, None)
            self.server.requests.append((name, *span))
        if asked and with_body and not self.server.ignores_ranges:
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers, with_body)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(content)
