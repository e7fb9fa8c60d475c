"""Catches a wrong address of a cluster that is asked for minutes, and a right one that is refused."""

import socket

import pytest

from distill_pipe.errors import ClusterError
from distill_pipe.produce.ray_address import require_answer


def test_an_address_where_somebody_listens_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        require_answer(f"127.0.0.1:{port}")
        require_answer(f"ray://127.0.0.1:{port}")


def test_an_address_where_nobody_listens_is_refused_by_name() -> None:
    with socket.socket() as taken:
        # Bound and not listening: nobody else can come to listen there meanwhile.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=rf"^Ray cannot be reached at {address}: .*; give the address"):
            require_answer(address)


def test_a_port_that_cannot_be_is_refused() -> None:
    with pytest.raises(ClusterError, match="give the address of the cluster's head"):
        require_answer("127.0.0.1:99999")


@pytest.mark.parametrize("address", ["auto", "local", "http://head", ""])
def test_what_is_no_host_and_port_is_left_to_ray(address: str) -> None:
    require_answer(address)
