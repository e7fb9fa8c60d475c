"""A real S3 server for tests: SeaweedFS from its pip package, on free ports, in a folder that is gone afterwards.

A server takes about ten seconds to start and 120 MB, so a test session has one, with one bucket (each takes the server
several volumes), and every test a folder of its own.
"""

import json
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import obstore
import obstore.exceptions
import pytest
from obstore.store import S3Store

from faults.proxy import Proxy
from faults.reach import reach

START_SECONDS, STARTS = 120, 5
KEY, SECRET, BUCKET = "tester", "tester-secret", "tests"
_IDENTITIES = {"identities": [{"name": "tester", "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                               "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
                              # For a proxy that changes requests, which no signature survives.
                              {"name": "anonymous", "actions": ["Read", "Write", "List"]}]}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the system hands out to connections."""
    held: list[socket.socket] = []
    while len(held) < count:
        try:
            held.append(socket.create_server(("127.0.0.1", random.randrange(10_000, 32_000))))
        except OSError:
            continue
    ports: list[int] = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@dataclass
class Seaweed:
    """A running server. `environment` is what a user would export to reach it."""

    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "s3.json").write_text(json.dumps(_IDENTITIES))
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
                 "s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "iam.port")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.port = ports["s3.port"]
        weed = Path(sys.executable).with_name("weed")
        line = [str(weed), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder}", "-filer", "-s3",
                f"-s3.config={self.folder}/s3.json", "-s3.ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64",
                "-volume.max=100", "-volume.preStopSeconds=0", "-master.telemetry=false",
                *(f"-{name}={port}" for name, port in ports.items())]
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        self._wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables by which a user reaches this server, or a proxy in front of it."""
        return {"AWS_ENDPOINT_URL": endpoint or self.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}

    def store(self, folder: str = "") -> S3Store:
        """The bucket, or a folder of it, past everything of ours."""
        prefix = folder.removeprefix(f"s3://{BUCKET}/") or None
        return S3Store(BUCKET, prefix=prefix, endpoint=self.endpoint, access_key_id=KEY, secret_access_key=SECRET,
                       region="us-east-1", client_options={"allow_http": True})

    def new_folder(self) -> str:
        """An address that nothing is at. The server makes the bucket when something is put there."""
        obstore.put(self.store(), "first", b"1")
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self) -> None:
        """Until an object can be written: the port answers seconds before that."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.new_folder()
                return
            except obstore.exceptions.BaseError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log = (self.folder / "log").read_text(errors="replace")[-5000:]
                    self.close()
                    raise RuntimeError(f"no S3 server: {error}\n{log}") from error
                time.sleep(0.2)


def started_server(folder: Path) -> Seaweed:
    """A server; tried again where another process took one of its ports first."""
    for i in range(STARTS):
        try:
            return Seaweed(folder / str(i))
        except RuntimeError as error:
            if "address already in use" not in str(error):
                raise
    raise RuntimeError("no free ports for an S3 server")


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """The session's S3 server."""
    server = started_server(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.close()


@pytest.fixture
def proxy(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server; what is in the environment leads to it."""
    between = Proxy(seaweed.port)
    reach(seaweed, monkeypatch, between.endpoint)
    yield between
    between.close()


@pytest.fixture
def s3_folder(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://...` of an empty folder, reachable by what is in the environment."""
    reach(seaweed, monkeypatch)
    return seaweed.new_folder()
