"""Whether anybody answers where a cluster is said to be. Ray itself asks a wrong address for many minutes, and fills
the screen with that."""

import socket
from typing import Final

from distill_pipe.errors import ClusterError

_SECONDS: Final = 30.0


def require_answer(address: str) -> None:
    """Try the port of a `host:port` once. Addresses of other kinds, such as `auto`, are left to Ray.

    Raises:
        ClusterError: nobody answers.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"Ray cannot be reached at {address}: {error}; give the address of the cluster's head, for "
                           "example head:6379, or none to start a Ray here") from error
