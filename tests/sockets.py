"""What tests that speak over bare sockets share."""

import socket


def receive(connection: socket.socket, most: int = 65_536) -> bytes:
    """Some bytes, at least one; ConnectionError where the other side has hung up (a loop over b"" would never end)."""
    received = connection.recv(most)
    if not received:
        raise ConnectionError("the other side has hung up")
    return received
