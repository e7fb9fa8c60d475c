"""A real Azure Blob server for tests: Microsoft's Azurite from its npm package, on a free port, all in memory.

It is not among the developer's tools (it needs node): tests that want it are skipped unless `azurite-blob` is on PATH.
"""

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

import pytest

from faults.reach import reach
from faults.seaweed import START_SECONDS, STARTS, free_ports

ACCOUNT, KEY, CONTAINER = "tester", base64.b64encode(b"a key for tests").decode(), "tests"


@dataclass
class Azurite:
    """A running server. `environment` is what a user would export to reach it."""

    program: str
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        [self.port] = free_ports(1)
        line = [self.program, "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--inMemoryPersistence",
                "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
                                            env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"})
        self._wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables by which a user reaches this server, or a proxy in front of it."""
        return {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY,
                "AZURE_STORAGE_ENDPOINT": f"{endpoint or self.endpoint}/{ACCOUNT}", "AZURE_ALLOW_HTTP": "true"}

    def new_folder(self) -> str:
        """An address that nothing is at."""
        return f"az://{CONTAINER}/{uuid.uuid4().hex}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _wait(self) -> None:
        """Until there is a container."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._make_container()
                return
            except (urllib.error.URLError, ConnectionError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log = (self.folder / "log").read_text(errors="replace")[-5000:]
                    self.close()
                    raise RuntimeError(f"no Azure server: {error}\n{log}") from error
                time.sleep(0.2)

    def _make_container(self) -> None:
        """The one thing that obstore cannot do: a request signed with the account's key."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
        said = "".join(f"{name}:{value}\n" for name, value in headers.items())
        signed = f"PUT{12 * chr(10)}{said}/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        where = f"{self.endpoint}/{ACCOUNT}/{CONTAINER}?restype=container"
        with urllib.request.urlopen(urllib.request.Request(where, method="PUT", headers=headers)):  # noqa: S310
            return


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """The session's Azure server."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not on PATH (npm install --global azurite)")
    folder = tmp_path_factory.mktemp("azurite")
    for i in range(STARTS):
        try:
            server = Azurite(program, folder / str(i))
            break
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error) or i == STARTS - 1:
                raise
    yield server
    server.close()


@pytest.fixture
def az_folder(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """`az://...` of an empty folder, reachable by what is in the environment."""
    reach(azurite, monkeypatch)
    return azurite.new_folder()
