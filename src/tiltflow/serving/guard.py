"""What a request must pass before its body is read, and while it is: the token, the sizes, the time.

A body is received in one piece, at the moment when the application first asks for it. So the application may still
refuse a request by its headers, and nothing beyond the limits is ever held.
"""

import asyncio
import itertools
import re
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiltflow.runtime.malloc import return_memory
from tiltflow.serving.prometheus import HttpMetrics
from tiltflow.serving.rendering import error_response
from tiltflow.serving.wire import ID_HEADER, Limits, WireError

OPEN_PATHS: Final = ("/livez", "/readyz", "/health")  # for probes, which have no token
KNOWN_PATHS: Final = (*OPEN_PATHS, "/v1/score", "/v1/models", "/metrics", "/compute", "/get_reward", "/openapi.json")
RETRY_MS: Final = 1000
LINGER_SECONDS: Final = 1.0  # for a client that still sends what was refused
LINGER_BYTES: Final = 16 * 2**20
SENT: Final = "sent"  # of a request's state: the bytes of its reply so far
UNWATCHED_SECONDS: Final = 0.02  # most requests are answered by then, and need nobody to watch their connection
_ID: Final = ID_HEADER.lower().encode()
_LENGTH_DIGITS: Final = 18
_PLAIN_ID: Final = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class ClientGone(Exception):
    """The client closed the connection."""


class ByteBudget:
    """Bytes that all requests hold at one time: their bodies, and the pixels of their pictures. Threads share it."""

    def __init__(self, size: int):
        """Allow `size` bytes."""
        self._size = size
        self._lock = threading.Lock()
        self.used = 0

    def take(self, count: int) -> None:
        """Use some.

        Raises:
            WireError: `overloaded`.
        """
        with self._lock:
            if self.used + count > self._size:
                message = f"requests hold {self.used} bytes, and {count} more would be over the {self._size} allowed"
                raise WireError("overloaded", message, retry_after_ms=RETRY_MS)
            self.used += count

    def give(self, count: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self.used -= count


class Body:
    """The `receive` of one request: the whole body at once, within its limits."""

    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, *, limits: Limits, budget: ByteBudget):
        """Take a request's connection; nothing is read."""
        self._headers = headers
        self._receive = receive
        self._limits = limits
        self._budget = budget
        self._declared = 0
        self._held = 0
        self._released = False
        self._lock = threading.Lock()
        declared = headers.get(b"content-length")
        self._chunked = declared is None and b"transfer-encoding" in headers
        self.finished = not self._chunked and declared in (None, b"0")  # nothing more comes

    def admit(self) -> None:
        """Check what the headers declare.

        Raises:
            WireError: `payload_too_large`, `overloaded`, `unsupported_media`, or `invalid_request`.
        """
        if b"content-length" in self._headers and b"transfer-encoding" in self._headers:
            message = "Content-Length and Transfer-Encoding contradict each other; send one of them"
            raise WireError("invalid_request", message, param="Content-Length")
        encoding = self._headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            message = f"Content-Encoding is {encoding.decode('latin-1')!r}; send bodies as they are"
            raise WireError("unsupported_media", message, param="Content-Encoding")
        declared = self._headers.get(b"content-length", b"0").decode("latin-1")
        if not declared.isascii() or not declared.isdigit():
            raise WireError("invalid_request", f"Content-Length is {declared!r}", param="Content-Length")
        if len(declared) > _LENGTH_DIGITS or int(declared) > self._limits.body_bytes:
            raise self._too_large(f"{declared} bytes are declared")
        self._declared = int(declared)
        self.hold(self._declared)

    async def __call__(self) -> Message:
        """Return the body, and after it what the connection tells."""
        if self.finished:
            return await self._receive()
        content = await self._all()
        return {"type": "http.request", "body": content, "more_body": False}

    def hold(self, count: int) -> None:
        """Count bytes that live as long as the request; a thread may do so. Nothing is counted after its end.

        Raises:
            WireError: `overloaded`: all requests together would hold too much.
        """
        with self._lock:
            if not self._released:
                self._budget.take(count)
                self._held += count

    def release(self) -> None:
        """Stop counting what the request holds."""
        with self._lock:
            self._released = True
            self._budget.give(self._held)
            self._held = 0

    async def discard(self) -> None:
        """Read a little of what still comes: a connection that is closed on a sender loses the answer."""
        left = LINGER_BYTES
        with anyio.move_on_after(LINGER_SECONDS):
            while not self.finished and left > 0:
                message = await self._receive()
                self.finished = message["type"] != "http.request" or not message.get("more_body", False)
                left -= len(message.get("body", b""))

    async def _all(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        start = anyio.current_time()
        with anyio.CancelScope(deadline=start + self._limits.seconds_for(self._declared)) as scope:
            while not self.finished:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > self._limits.body_bytes:
                    del chunks, chunk, message
                    return_memory()
                    raise self._too_large(f"more than {self._limits.body_bytes} bytes came")
                if self._chunked:
                    self.hold(len(chunk))
                    scope.deadline = start + self._limits.seconds_for(size)
                chunks.append(chunk)
                self.finished = not message.get("more_body", False)
        if scope.cancelled_caught:
            message = f"{size} bytes of the body came in {anyio.current_time() - start:.1f} s; send it sooner"
            raise WireError("body_timeout", message)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self, why: str) -> WireError:
        return WireError("payload_too_large", f"{why}; a body may have {self._limits.body_bytes}; send fewer items")


class Guard:
    """The outermost application."""

    def __init__(self, app: ASGIApp, *, limits: Limits, token: str | None, metrics: HttpMetrics):
        """Wrap an application.

        Args:
            app: What answers requests that pass.
            limits: Of bodies.
            token: What every request but a probe must bear; None asks for none.
            metrics: Told of every request.
        """
        self._app = app
        self._limits = limits
        self._token = None if token is None else token.encode()
        self._metrics = metrics
        self._budget = ByteBudget(limits.inflight_bytes)
        metrics.watch_inflight(lambda: float(self._budget.used))
        prefix = secrets.token_hex(8)
        self._ids = (f"{prefix}-{count}" for count in itertools.count())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection of the ASGI server."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        told = headers.get(_ID, b"").decode("latin-1")
        state = scope.setdefault("state", {})
        state["request_id"] = told if _PLAIN_ID.fullmatch(told) else next(self._ids)
        state["start"] = time.monotonic()
        state[SENT] = 0
        body = Body(headers, receive, limits=self._limits, budget=self._budget)
        state["hold"] = body.hold

        async def answer(message: Message) -> None:
            await self._send(scope, body, send, message)

        try:
            self._check_token(scope["path"], headers)
            body.admit()
        except WireError as error:
            await error_response(error, state["request_id"])(scope, receive, answer)
            return
        try:
            await self._app(scope, body, answer)
        finally:
            body.release()

    async def _send(self, scope: Scope, body: Body, send: Send, message: Message) -> None:
        scope["state"][SENT] += len(message.get("body", b""))
        if message["type"] == "http.response.start":
            path = scope["path"]
            route = path if path in KNOWN_PATHS else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
            self._metrics.request(route, message["status"])
            message["headers"].append((_ID, scope["state"]["request_id"].encode()))
            if not body.finished:
                message["headers"].append((b"connection", b"close"))
        elif not body.finished and not message.get("more_body", False):
            await send({**message, "more_body": True})
            await body.discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    def _check_token(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        if self._token is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            raise WireError("unauthorized", "send the header Authorization: Bearer TOKEN", param="Authorization")
        if not secrets.compare_digest(given.strip(), self._token):
            raise WireError("unauthorized", "the token is another one", param="Authorization")


async def read_body(receive: Receive) -> bytes:
    """Return the body of a request that passed the guard, which gives it in one piece.

    Raises:
        ClientGone: The client left before its end.
        WireError: It is too large or too slow, or there are too many others.
    """
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b"")


async def gone(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def finish_or_gone(task: "asyncio.Future[Any]", receive: Receive, *, seconds: float) -> Any:
    """Return a task's result, unless the client leaves before.

    Raises:
        ClientGone: It did.
        WireError: `deadline_exceeded`: nothing came in time.
    """
    await asyncio.wait((task,), timeout=min(seconds, UNWATCHED_SECONDS))
    if task.done():
        return task.result()
    watch = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((task, watch), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
    if task.done():
        return task.result()
    if watch.done():
        raise ClientGone
    raise WireError("deadline_exceeded", "no answer came by the deadline")
