"""A dataset on the Hub, read through a stand-in that answers the five requests that reading takes.

Catches a read that is not of the resolved commit, a missing file that is an error, and an attempt to write.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from runs import command
from tiny_datasets import make_dataset

from distill_pipe.errors import UsageError
from distill_pipe.store.finalize import finalize
from distill_pipe.store.manifest import fragment_name
from distill_pipe.store.root import LocalRoot, open_root

COMMIT, REPO, PROMPTS = "c" * 40, "owner/name", 6
ADDRESS = f"hf://datasets/{REPO}"


class Hub(BaseHTTPRequestHandler):
    """One dataset repository at one commit: the files of `folder`."""

    folder: Path

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        if path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/main"):
            return self._json({"id": REPO, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0})
        tree = f"/api/datasets/{REPO}/tree/{COMMIT}/"
        if path.startswith(tree):
            base = self.folder / path.removeprefix(tree)
            if not base.is_dir():
                return self._missing()
            return self._json([self._info(p) for p in sorted(base.rglob("*")) if p.is_file()])
        return self._file(path, with_body=True)

    def do_HEAD(self) -> None:
        self._file(urlparse(self.path).path, with_body=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert self.path == f"/api/datasets/{REPO}/paths-info/{COMMIT}"
        asked = [self.folder / path for path in parse_qs(body)["paths"]]
        self._json([self._info(p) for p in asked if p.is_file()])

    def log_message(self, *_: Any) -> None: ...

    def _file(self, path: str, with_body: bool) -> None:
        file = self.folder / path.removeprefix(f"/datasets/{REPO}/resolve/{COMMIT}/")
        if not (path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/") and file.is_file()):
            return self._missing()
        data = file.read_bytes()
        self.send_response(200)
        for name, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{hash(data) & 0xFFFFFFFF:040x}"'),
                            ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)
        return None

    def _info(self, path: Path) -> dict[str, object]:
        name, size = str(path.relative_to(self.folder)), path.stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": "0" * 40}

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _missing(self) -> None:
        self.send_response(404)
        known = f"datasets/{REPO}" in self.path
        self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A dataset on a stand-in for the Hub, and the variables that lead there."""
    make_dataset(tmp_path / "root", PROMPTS)
    finalize(LocalRoot(tmp_path / "root"))
    (tmp_path / "root" / fragment_name(1)).unlink()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"folder": tmp_path / "root"}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
           "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_dataset_on_the_hub_is_read_verified_and_not_written(environment: dict[str, str]) -> None:
    done = command("verify", ADDRESS, "--deep", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["traces"], report["problems"], report["orphans"]) == (PROMPTS, [], [])
    done = command("status", f"{ADDRESS}@main", "--json", env=environment)
    assert (json.loads(done.stdout)["shards_done"], done.returncode) == (2, 0), done.stderr
    done = command("verify", ADDRESS, "--repair", env=environment)
    assert done.returncode == 8
    assert "can only be read" in done.stdout.replace("\n", "").replace("  ", "")


def test_a_dataset_that_is_not_there_is_one_line(environment: dict[str, str]) -> None:
    done = command("status", "hf://datasets/owner/other", env=environment)
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("error: hf://datasets/owner/other: there is no such dataset, or your login")
    done = command("status", ADDRESS, env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("address", ["hf://owner/name", "hf://datasets/name", "hf://datasets/a/b/c", "hf://models/a/b"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="write hf://datasets/owner/name"):
        open_root(address)
