"""Connections that keep to the deadline of their exchange, whatever the other side does.

The timeouts of HTTP clients hold for single operations: a server that sends or takes a byte now and then outlasts any
of them. Here every connect, read and write gets what is left of the time of its exchange, which `until` sets. Only the
look-up of a server's name cannot be cut short; a name that is found too late is not connected to any more.

This module needs the packages of `tiltflow[remote]`; whoever uses it imports it where it is used.
"""

import importlib.util
import math
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import httpcore2
import httpx2

_CLIENT_ERRORS: Final[dict[type[Exception], type[httpx2.TransportError]]] = {
    httpcore2.TimeoutException: httpx2.TimeoutException,
    httpcore2.ConnectTimeout: httpx2.ConnectTimeout,
    httpcore2.ReadTimeout: httpx2.ReadTimeout,
    httpcore2.WriteTimeout: httpx2.WriteTimeout,
    httpcore2.PoolTimeout: httpx2.PoolTimeout,
    httpcore2.NetworkError: httpx2.NetworkError,
    httpcore2.ConnectError: httpx2.ConnectError,
    httpcore2.ReadError: httpx2.ReadError,
    httpcore2.WriteError: httpx2.WriteError,
    httpcore2.ProxyError: httpx2.ProxyError,
    httpcore2.UnsupportedProtocol: httpx2.UnsupportedProtocol,
    httpcore2.ProtocolError: httpx2.ProtocolError,
    httpcore2.LocalProtocolError: httpx2.LocalProtocolError,
    httpcore2.RemoteProtocolError: httpx2.RemoteProtocolError,
}

# Of this thread's exchange, on the monotonic clock.
_END: Final[ContextVar[float]] = ContextVar("end", default=math.inf)


@contextmanager
def until(end: float) -> Iterator[None]:
    """Give what this thread does in the block until `end`, on the monotonic clock."""
    token = _END.set(end)
    try:
        yield
    finally:
        _END.reset(token)


class Network(httpx2.BaseTransport):
    """Takes requests to their servers, through the proxies that the environment names (HTTP_PROXY, NO_PROXY)."""

    def __init__(self, *, keepalive_seconds: float):
        """Prepare; connections are made when they are needed, as many as there are requests at a time.

        Args:
            keepalive_seconds: How long an idle connection is kept.
        """
        self._keepalive_seconds = keepalive_seconds
        self._ssl = httpx2.create_ssl_context()
        self._pools: dict[str | None, httpcore2.ConnectionPool] = {}  # by proxy; None: without one
        self._proxies: dict[tuple[str, str, int | None], str | None] = {}  # by server: scheme, host and port
        self._lock = threading.Lock()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and return its response, whose body is not read yet.

        Raises:
            httpx2.TransportError: There is none.
        """
        url = request.url
        address = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = httpcore2.Request(
            request.method,
            address,
            headers=request.headers.raw,
            content=request.stream,  # pyright: ignore[reportArgumentType]  # a synchronous one, as always in a Client
            extensions=request.extensions,
        )
        with _translated():
            response = self._pool(url).handle_request(sent)
        body = _Body(response)
        return httpx2.Response(response.status, headers=response.headers, stream=body, extensions=response.extensions)

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.close()

    def _pool(self, url: httpx2.URL) -> httpcore2.ConnectionPool:
        with self._lock:
            server = (url.scheme, url.host, url.port)
            if server not in self._proxies:
                self._proxies[server] = _proxy_for(*server)
            proxy = self._proxies[server]
            if proxy not in self._pools:
                self._pools[proxy] = httpcore2.ConnectionPool(
                    ssl_context=self._ssl,
                    proxy=None if proxy is None else _described(proxy, self._ssl),
                    max_connections=None,  # as many as there are lanes that ask: nothing waits for another request
                    keepalive_expiry=self._keepalive_seconds,
                    network_backend=_Backend(),
                )
            return self._pools[proxy]


class _Body(httpx2.SyncByteStream):
    """The body of a response on its way; its connection is free, or closed, when it is closed."""

    def __init__(self, response: httpcore2.Response):
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _translated():
            yield from self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


class _Backend(httpcore2.NetworkBackend):
    """Connects within the time of the exchange."""

    def __init__(self) -> None:
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> "_Stream":
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(str(error)) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for place, address in enumerate(addresses):
            # One that does not answer must leave time for the next: a name may stand for one of IPv6 and one of IPv4.
            left = _left(end - time.monotonic(), httpcore2.ConnectTimeout)
            share = None if left is None else left / (len(addresses) - place)
            try:
                return _Stream(self._sockets.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class _Stream(httpcore2.NetworkStream):
    """A connection of which every operation ends with its exchange."""

    def __init__(self, stream: httpcore2.NetworkStream, *, layers: int = 0):
        """Wrap a connection.

        Args:
            stream: The connection.
            layers: Of TLS in it.
        """
        self._stream = stream
        self._layers = layers

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._layers > 1:  # TLS to a proxy and TLS through it: not spoken by the socket, and timed as a whole only
            self._stream.write(buffer, _left(timeout, httpcore2.WriteTimeout))
            return
        # The stream itself would grant the timeout again for every piece that the other side takes.
        connection: socket.socket = self._stream.get_extra_info("socket")
        rest = memoryview(buffer)
        while rest:
            connection.settimeout(_left(timeout, httpcore2.WriteTimeout))
            try:
                rest = rest[connection.send(rest) :]
            except TimeoutError as error:
                raise httpcore2.WriteTimeout(str(error)) from error
            except OSError as error:
                raise httpcore2.WriteError(str(error)) from error

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Stream":
        try:
            left = _left(timeout, httpcore2.ConnectTimeout)
        except httpcore2.ConnectTimeout:
            self.close()  # nobody else knows of it yet
            raise
        secure = self._stream.start_tls(ssl_context, server_hostname, left)
        return _Stream(secure, layers=self._layers + 1)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(timeout: float | None, kind: type[Exception]) -> float | None:
    """Return the seconds that an operation may take; None: for ever.

    Raises:
        httpcore2.TimeoutException: Of the kind, if there are none.
    """
    seconds = min(math.inf if timeout is None else timeout, _END.get() - time.monotonic())
    if seconds <= 0:
        raise kind("timed out")
    return None if math.isinf(seconds) else seconds


def _proxy_for(scheme: str, host: str, port: int | None) -> str | None:
    """Return the address of the proxy that the environment names for a server."""
    names = (host, host if port is None else f"{host}:{port}")
    if any(urllib.request.proxy_bypass(name) for name in names):
        return None
    proxies = urllib.request.getproxies()
    found = proxies.get(scheme) or proxies.get("all")
    return found if found is None or "://" in found else f"http://{found}"


def _described(address: str, ssl_context: ssl.SSLContext) -> httpcore2.Proxy:
    scheme = address.partition("://")[0]
    if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise httpx2.UnsupportedProtocol("the environment names a SOCKS proxy, which needs the package socksio")
    try:
        proxy = httpx2.Proxy(address)
    except (ValueError, httpx2.InvalidURL) as error:  # without the address: there may be a password in it
        raise httpx2.UnsupportedProtocol(f"the environment names a proxy that is none, of scheme {scheme!r}") from error
    url = httpcore2.URL(scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=b"/")
    secure = ssl_context if proxy.url.scheme == "https" else None
    return httpcore2.Proxy(url, auth=proxy.raw_auth, headers=proxy.headers.raw, ssl_context=secure)


@contextmanager
def _translated() -> Iterator[None]:
    """Raise the exceptions of the connections as those of the client."""
    try:
        yield
    except tuple(_CLIENT_ERRORS) as error:
        kind = next(_CLIENT_ERRORS[each] for each in type(error).__mro__ if each in _CLIENT_ERRORS)
        raise kind(str(error)) from error
