"""Control messages between the HTTP process and a worker: a length of 4 bytes, then JSON.

Nothing here can run code that it reads, unlike a pickle; pixels travel beside it in shared memory.
"""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

LENGTH = struct.Struct("!I")


def frame(message: Mapping[str, Any]) -> bytes:
    """Return a message as it stands on the wire."""
    content = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(content)) + content


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        """Start with nothing received."""
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages that are complete with these bytes."""
        rest = self._rest
        rest += data
        messages: list[dict[str, Any]] = []
        while len(rest) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(rest)[0]
            if len(rest) < end:
                break
            messages.append(json.loads(rest[LENGTH.size : end]))
            del rest[:end]
        return messages


class Channel:
    """The worker's end: reads and writes whole messages and waits for them."""

    def __init__(self, connection: socket.socket):
        """Take over a stream socket."""
        self._connection = connection
        self._frames = Frames()
        self._ready: list[dict[str, Any]] = []

    def read(self) -> dict[str, Any] | None:
        """Wait for a message; None when the other end is closed."""
        while not self._ready:
            data = self._connection.recv(65536)
            if not data:
                return None
            self._ready = self._frames.feed(data)
        return self._ready.pop(0)

    def write(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
            OSError: The other end is closed.
        """
        self._connection.sendall(frame(message))
