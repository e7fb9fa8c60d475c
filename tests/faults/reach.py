"""How a test gets to a server of its own: by the environment, as users do."""

from typing import Protocol

import pytest


class Server(Protocol):
    """A server of some vendor's kind."""

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables by which a user reaches it, or a proxy in front of it."""


def reach(server: Server, monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
    """Put them into the environment until the test ends."""
    for name, value in server.environment(endpoint).items():
        monkeypatch.setenv(name, value)
