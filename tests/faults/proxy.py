"""A proxy in front of an S3 server that can go wrong on purpose, request by request.

A test gives it a rule: a function that looks at a request's head and names a fault, or None. The proxy speaks HTTP/1.1
with one request per connection, which every client accepts, and never changes what it is not told to.
"""

import random
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Fault = Literal["throttle", "error", "conflict", "expire", "reset", "lose answer", "cut answer", "flip", "strip",
                "stop"]
_ANSWERS: Final[dict[str, tuple[int, str]]] = {
    "throttle": (503, "SlowDown"), "error": (500, "InternalError"), "conflict": (409, "ConditionalRequestConflict"),
    "expire": (400, "ExpiredToken")}
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Head:
    """The head of a request: method, path with query, headers (names in lower case), and the length of its body."""

    method: str
    target: str
    headers: dict[str, str]

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", 0))

    @property
    def creates(self) -> bool:
        """A PUT that must not write over anything."""
        return self.method == "PUT" and ("if-none-match" in self.headers
                                         or self.headers.get("x-goog-if-generation-match") == "0")


class Proxy:
    """Listens on a free port. `rule` may be set at any time; `faults` counts what was done by its name.

    Faults: `throttle`, `error`, `conflict` and `expire` answer for the server, which sees nothing; `reset` ends the
    connection in the middle of the body; `lose answer` lets the server do its work and drops the answer; `cut answer`
    drops it in the middle; `flip` changes a bit of the body; `strip` removes the condition of a create; `stop` calls
    `on_stop` when a random part of the body has reached the server, and ends the connection.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.rule: Callable[[Head], Fault | None] = lambda _: None
        self.on_stop: Callable[[], None] = lambda: None
        self.faults: dict[str, int] = {}
        self.requests = 0
        self.random = random.Random(0)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        # `accept` sleeps on; only a shutdown wakes it.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        client.settimeout(60)
        with client:
            try:
                self._answer(client)
            except OSError:
                return

    def _answer(self, client: socket.socket) -> None:
        received = _until_blank_line(client)
        if not received:
            return
        raw, _, body = received.partition(b"\r\n\r\n")
        head = _parsed(raw)
        with self._lock:
            self.requests += 1
            fault = self.rule(head)
            if fault is not None:
                self.faults[fault] = self.faults.get(fault, 0) + 1
        if "100-continue" in head.headers.get("expect", ""):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        wanted = head.length
        if fault == "reset":
            wanted //= 2
        body = _rest_of_body(client, body, wanted)
        if fault == "reset":
            _reset(client)
        elif fault in _ANSWERS:
            client.sendall(_error(*_ANSWERS[fault]))
        else:
            self._forward(client, raw, body, fault)

    def _forward(self, client: socket.socket, raw: bytes, body: bytes, fault: Fault | None) -> None:
        if fault == "flip" and body:
            at = self.random.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1:]
        if fault == "strip":
            raw = re.sub(rb"\r\nif-none-match:[^\r]*", b"", raw, flags=re.IGNORECASE)
        raw = re.sub(rb"\r\nexpect:[^\r]*", b"", raw, flags=re.IGNORECASE)
        with socket.create_connection(("127.0.0.1", self._server_port), timeout=60) as server:
            sent = self.random.randrange(len(body) + 1) if fault == "stop" else len(body)
            server.sendall(raw + b"\r\nconnection: close\r\n\r\n" + body[:sent])
            if fault == "stop":
                self.on_stop()
                return
            answer = _until_closed(server)
        if fault == "lose answer":
            _reset(client)
        elif fault == "cut answer":
            client.sendall(answer[:len(answer) - len(answer.partition(b"\r\n\r\n")[2]) // 2 - 1])
            _reset(client)
        else:
            client.sendall(answer)


def _until_blank_line(client: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        block = client.recv(_BLOCK)
        if not block:
            return b""
        received += block
    return received


def _rest_of_body(client: socket.socket, body: bytes, length: int) -> bytes:
    held = bytearray(body)
    while len(held) < length:
        block = client.recv(_BLOCK)
        if not block:
            raise ConnectionError
        held += block
    return bytes(held[:length])


def _until_closed(server: socket.socket) -> bytes:
    received = bytearray()
    while block := server.recv(_BLOCK):
        received += block
    return bytes(received)


def _parsed(raw: bytes) -> Head:
    first, *lines = raw.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Head(method, target, headers)


def _error(status: int, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test wants</Message></Error>".encode()
    head = (f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


def _reset(client: socket.socket) -> None:
    """Close with RST, as a broken network does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
