"""What tests that speak over bare sockets, or wait for other threads and processes, share."""

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import IO


def receive(connection: socket.socket, most: int = 65_536) -> bytes:
    """Some bytes, at least one; ConnectionError where the other side has hung up (a loop over b"" would never end)."""
    received = connection.recv(most)
    if not received:
        raise ConnectionError("the other side has hung up")
    return received


@contextlib.contextmanager
def dead_port() -> Iterator[int]:
    """Hold a port on which nobody listens: connections are refused, and no other process is given it meanwhile.

    A server that names it may listen there, and another one after that.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def read_line(stream: IO[bytes], *, seconds: float = 60.0) -> bytes:
    """Return the first line that another process prints; an AssertionError if there is none in time."""
    ready, _, _ = select.select([stream], [], [], seconds)
    assert ready, f"nothing was printed within {seconds:g} s"
    return stream.readline()


def wait_until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Wait until a condition holds; an AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds:g} s"
        time.sleep(0.005)
