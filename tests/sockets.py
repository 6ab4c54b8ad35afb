"""What tests that speak over bare sockets share."""

import contextlib
import socket
from collections.abc import Iterator


def receive(connection: socket.socket, most: int = 65_536) -> bytes:
    """Some bytes, at least one; ConnectionError where the other side has hung up (a loop over b"" would never end)."""
    received = connection.recv(most)
    if not received:
        raise ConnectionError("the other side has hung up")
    return received


@contextlib.contextmanager
def dead_port() -> Iterator[int]:
    """Hold a port on which nobody listens: connections are refused, and no other process can take it meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
