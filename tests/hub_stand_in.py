"""A dataset on a model hub, in a folder: the few answers of the hub's API that reading a corpus asks for.

The client is huggingface_hub's own. Files are served in ranges, and what was asked for is kept.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves `folder` as the dataset `repo` (one commit), large files by LFS and small ones without."""

    daemon_threads = True

    def __init__(self, folder: Path, repo: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.repo = folder, repo
        self.asked: list[str] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[dict[str, object]]:
        return [self._listed(path) for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def _listed(self, path: Path) -> dict[str, object]:
        data = path.read_bytes()
        entry: dict[str, object] = {"type": "file", "path": str(path.relative_to(self.folder)), "size": len(data),
                                    "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324 - as Git names blobs
        if path.suffix == ".parquet":
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length) or b"{}")
        wanted = asked.get("paths", [])
        self._json([entry for entry in self.server.files() if entry["path"] in wanted], body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        repo = self.server.repo
        if re.fullmatch(rf"/api/datasets/{repo}(/revision/\w+)?", path):
            self._json({"id": repo, "sha": COMMIT, "siblings": [], "private": False, "tags": []}, body)
        elif path.startswith(f"/api/datasets/{repo}/tree/{COMMIT}"):
            self._json(self.server.files(), body)
        elif path.startswith(f"/datasets/{repo}/resolve/{COMMIT}/"):
            self._file(self.server.folder / path.partition(COMMIT + "/")[2], body)
        else:
            self._send(404, b'{"error": "not found"}', body, {"X-Error-Code": "RepoNotFound"})

    def _json(self, answer: object, body: bool) -> None:
        self._send(200, json.dumps(answer).encode(), body, {"Content-Type": "application/json"})

    def _file(self, path: Path, body: bool) -> None:
        data = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, data, body, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        self._send(206, data[first:last + 1], body, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.server.sent += len(data)
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Tests read what was asked from `asked`."""


@contextmanager
def serve(folder: Path, repo: str) -> Iterator[Hub]:
    """A hub that is gone afterwards."""
    with Hub(folder, repo) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
