"""A stand-in for the Hub: the part of its HTTP API that a dataset repository needs, in memory, with faults on demand.

Parquet goes through LFS as on the Hub; everything else is part of the commit. Every stored upload is counted.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 7


@dataclass
class Fault:
    """The next `times` requests of this method whose path matches end in `status`; the work is done first where
    `committed` is set. Status 0 drops the connection."""

    method: str
    path: str
    status: int
    times: int = 1
    committed: bool = False


@dataclass
class Repo:
    """A repository: its trees by commit, oldest first. A tree maps names to the sha256 of their content."""

    private: bool
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    trees: list[dict[str, str]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=list)

    def tree(self, revision: str) -> dict[str, str] | None:
        if revision == "main":
            return self.trees[-1]
        return self.trees[self.commits.index(revision)] if revision in self.commits else None

    def add(self, tree: dict[str, str], message: str) -> str:
        """A new commit with this tree."""
        self.trees.append(tree)
        self.messages.append(message)
        self.commits.append(_git(json.dumps([len(self.trees), tree]).encode()))
        return self.commits[-1]


class Hub:
    """What the server holds, for the tests to look at."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lock = threading.Lock()
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.stored: Counter[str] = Counter()
        self.fetched: Counter[str] = Counter()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.seconds_per_upload = 0.0
        self.busy = 0

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def settle(self) -> None:
        """Wait until nothing is in the works any more: a client that was killed may have sent all of a request."""
        while self.busy:
            time.sleep(0.01)

    def content(self, repo: str, name: str) -> bytes:
        return self.blobs[self.repos[repo].trees[-1][name]]

    def hold(self, repo: str, folder: Path) -> str:
        """Hold the files of a folder as the newest commit of a repository; says which commit that is."""
        tree = {str(path.relative_to(folder)): self.keep(path.read_bytes()) for path in folder.rglob("*")
                if path.is_file()}
        return self.repos.setdefault(repo, Repo(private=False)).add(tree, str(folder))

    def keep(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        with self.lock:
            self.blobs[digest] = data
        return digest


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A server on a free port of this machine."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_DATASET = r"/api/datasets/(?P<repo>[^/]+/[^/]+)"
_FILE = r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
_ROUTES = [
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"{_DATASET}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{_DATASET}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", rf"{_DATASET}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"{_DATASET}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{_DATASET}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/datasets/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET", _FILE, "resolve"),
    ("HEAD", _FILE, "resolve"),
]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - a name of the standard library
        """Nothing on the tests' stderr."""

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        with self.hub.lock:
            self.hub.busy += 1
        try:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.hub.requests.append(f"{self.command} {path}")
            fault = self.hub.fault(self.command, path)
            if fault is not None and not fault.committed:
                self._fail(fault.status)
                return
            for method, pattern, name in _ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    status, answer, headers = getattr(self, f"_{name}")(**found.groupdict())
                    break
            else:
                status, answer, headers = 404, {"error": "no such route"}, {}
            if fault is not None:
                self._fail(fault.status)
                return
            self._answer(status, answer, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.hub.lock:
                self.hub.busy -= 1

    def _fail(self, status: int) -> None:
        if status == 0:
            self.close_connection = True
            return
        self._answer(status, {"error": f"fault {status}"}, {"Retry-After": "0"} if status == 429 else {})

    def _answer(self, status: int, answer: object, headers: dict[str, str]) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repo(self, repo: str) -> Repo | None:
        return self.hub.repos.get(repo)

    def _create_repo(self) -> tuple[int, object, dict[str, str]]:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = {"url": f"{self.hub.url}/datasets/{name}", "name": name}
        with self.hub.lock:
            if name in self.hub.repos:
                return 409, url | {"error": "You already created this dataset repo"}, {}
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, url, {}

    def _validate(self) -> tuple[int, object, dict[str, str]]:
        return 200, {"errors": [], "warnings": []}, {}

    def _info(self, repo: str, revision: str | None) -> tuple[int, object, dict[str, str]]:
        held = self._repo(repo)
        if held is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        sha = held.commits[-1] if revision in (None, "main") else revision
        tree = held.tree(sha or "")
        if tree is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        return 200, {"id": repo, "sha": sha, "private": held.private, "tags": [], "downloads": 0, "likes": 0,
                     "gated": False, "disabled": False, "siblings": [{"rfilename": name} for name in tree]}, {}

    def _entry(self, name: str, digest: str) -> dict[str, object]:
        data = self.hub.blobs[digest]
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
        if _is_large(name):
            entry |= {"oid": _git(f"pointer to {digest}".encode()),
                      "lfs": {"oid": digest, "size": len(data), "pointerSize": 130}}
        return entry

    def _tree(self, repo: str, revision: str, folder: str | None) -> tuple[int, object, dict[str, str]]:
        held = self._repo(repo)
        tree = None if held is None else held.tree(revision)
        if tree is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, object]] = {}
        for name, digest in sorted(tree.items()):
            if not name.startswith(prefix):
                continue
            inner = name[len(prefix):]
            parents = inner.split("/")[:-1]
            recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                path = prefix + "/".join(parents[:depth])
                entries.setdefault(path, {"type": "directory", "path": path, "oid": _git(path.encode()), "size": 0})
            if recursive or not parents:
                entries[name] = self._entry(name, digest)
        if prefix and not entries:
            return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
        first = int(self.query.get("cursor", ["0"])[0])
        page = list(entries.values())[first:first + PAGE]
        headers = {}
        if first + PAGE < len(entries):
            recursively = self.query.get("recursive", ["false"])[0]
            headers["Link"] = (f'<{self.hub.url}{urlsplit(self.path).path}?recursive={recursively}&cursor='
                               f'{first + PAGE}>; rel="next"')
        return 200, page, headers

    def _paths_info(self, repo: str, revision: str) -> tuple[int, object, dict[str, str]]:
        held = self._repo(repo)
        tree = None if held is None else held.tree(revision)
        if tree is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        form = parse_qs(self.body.decode())
        paths = json.loads(self.body)["paths"] if self.body.startswith(b"{") else form.get("paths", [])
        found = []
        for path in paths:
            if path in tree:
                found.append(self._entry(path, tree[path]))
            elif any(name.startswith(f"{path}/") for name in tree):
                found.append({"type": "directory", "path": path, "oid": _git(path.encode()), "size": 0})
        return 200, found, {}

    def _preupload(self, repo: str, **_: str) -> tuple[int, object, dict[str, str]]:
        held = self._repo(repo)
        if held is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = []
        for file in json.loads(self.body)["files"]:
            answer = {"path": file["path"], "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                      "shouldIgnore": False}
            if (digest := held.trees[-1].get(file["path"])) is not None:
                answer["oid"] = digest if _is_large(file["path"]) else _git(self.hub.blobs[digest])
            files.append(answer)
        return 200, {"files": files}, {}

    def _lfs_batch(self, **_: str) -> tuple[int, object, dict[str, str]]:
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _upload(self, oid: str) -> tuple[int, object, dict[str, str]]:
        time.sleep(self.hub.seconds_per_upload)
        if self.hub.keep(self.body) != oid:
            return 400, {"error": "not what its name says"}, {}
        with self.hub.lock:
            self.hub.stored[oid] += 1
        return 200, {}, {}

    def _commit(self, repo: str, **_: str) -> tuple[int, object, dict[str, str]]:
        lines = [json.loads(line) for line in self.body.splitlines()]
        changed = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return 400, {"error": f"{value['path']} was never uploaded"}, {}
                changed[value["path"]] = value["oid"]
        with self.hub.lock:
            held = self.hub.repos[repo]
            commit = held.add(held.trees[-1] | changed, lines[0]["value"]["summary"])
        return 200, {"success": True, "commitOid": commit,
                     "commitUrl": f"{self.hub.url}/datasets/{repo}/commit/{commit}"}, {}

    def _resolve(self, repo: str, revision: str, name: str) -> tuple[int, object, dict[str, str]]:
        held = self._repo(repo)
        tree = None if held is None else held.tree(revision)
        if held is None or tree is None or name not in tree:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        data = self.hub.blobs[tree[name]]
        commit = held.commits[-1] if revision == "main" else revision
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tree[name] if _is_large(name) else _git(data)}"',
                   "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, data[first:last + 1], headers
        if self.command == "GET":
            with self.hub.lock:
                self.hub.fetched[name] += 1
        return 200, data, headers


def _is_large(name: str) -> bool:
    return name.endswith(".parquet")


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()
