"""Where a server listens, whom it answers, and how it ends."""

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from typing import Final

from tiltflow.errors import ConfigError
from tiltflow.serving.wire import Limits

TOKEN_ENV: Final = "TILTFLOW_SERVER_TOKEN"
BACKLOG: Final = 1024  # connections that wait to be accepted


@dataclass(frozen=True)
class ServerSettings:
    """The settings of one server.

    Raises:
        ConfigError: One of them is wrong, or other machines can reach a server that asks for no token.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one, told in the first line that the server prints
    token: str | None = field(default=None, repr=False)  # None: that of the environment, or none
    insecure: bool = False  # answer anyone who can reach it
    limits: Limits = field(default_factory=Limits)
    drain_seconds: float = 30.0  # after SIGTERM, for what is in flight

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port}: use 1 to 65535, or 0 for any free one")
        if self.drain_seconds < 0:
            raise ConfigError(f"drain_seconds={self.drain_seconds}: use 0 or more")
        for name, value in self.limits:
            if value <= 0:
                raise ConfigError(f"limits: {name}={value}; use a number above 0")
        token = os.environ.get(TOKEN_ENV) if self.token is None else self.token
        if token is not None and (not token.isascii() or not token.isprintable() or not token.strip()):
            raise ConfigError(f"token: it is empty or has characters that no header can carry; set {TOKEN_ENV} anew")
        object.__setattr__(self, "token", token)
        if token is None and not self.insecure and not _is_loopback(self.host):
            raise ConfigError(
                f"host={self.host!r} can be reached from other machines, and there is no token: set one (token=..., "
                f"--token or the environment variable {TOKEN_ENV}), or say insecure=True (--insecure) to answer "
                "anyone, or listen on host='127.0.0.1'"
            )


def listen(settings: ServerSettings) -> socket.socket:
    """Return a socket that already queues connections, so that its address can be told.

    Raises:
        ConfigError: The address is taken or none of this machine's.
    """
    address = f"host={settings.host!r}, port={settings.port}"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{address}: no address of this machine: {error}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(target)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(f"{address}: cannot listen there ({error}); use another port, or 0 for a free one") from error
    return found


def address_of(found: socket.socket) -> str:
    """Return the URL of a socket that listens."""
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whatever it stands for may change
        return False
