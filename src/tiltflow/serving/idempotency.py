"""Requests that were sent twice: the second joins the first, or gets its reply."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tiltflow.serving.wire import KEY_HEADER, WireError

KEPT_ENTRIES: Final = 10_000
KEPT_SECONDS: Final = 600.0
KEPT_BYTES: Final = 64 * 2**20  # of all replies together


@dataclass(frozen=True)
class Reply:
    """What is sent for a request."""

    status: int
    body: bytes
    complete: bool = True  # no item failed in a way that may pass

    @property
    def final(self) -> bool:
        """Tell whether the same request would get the same reply again: not if it may just work next time."""
        return self.complete and self.status < 500 and self.status != 429


Work = Callable[[], Coroutine[Any, Any, Reply]]


@dataclass
class _Running:
    digest: bytes
    task: "asyncio.Future[Reply]"
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    digest: bytes
    reply: Reply
    expires: float  # on the monotonic clock


class Replies:
    """Runs each request's work once, for all that wait for it, and keeps the replies of those with a key."""

    def __init__(self, *, entries: int = KEPT_ENTRIES, seconds: float = KEPT_SECONDS, size: int = KEPT_BYTES):
        """Keep at most so many replies, for so long, of so many bytes in all."""
        self._most = entries
        self._seconds = seconds
        self._room = size
        self._running: dict[str, _Running] = {}
        self._done: OrderedDict[str, _Kept] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._running) + len(self._done)

    @contextmanager
    def join(self, key: str | None, digest: bytes, work: Work) -> "Iterator[asyncio.Future[Reply]]":
        """Start the work, or join what was started for the same key.

        On leaving, the work is cancelled if it is not done and nobody else waits for it.

        Args:
            key: The client's name of the request; None keeps nothing.
            digest: Of the request's body.
            work: Makes the reply.

        Raises:
            WireError: `idempotency_conflict`: the key was used for another body.
        """
        self._expire()
        known = self._running.get(key) or self._done.get(key) if key is not None else None
        if known is not None and known.digest != digest:
            message = f"{KEY_HEADER} {key!r} was used for another body; use a new key for a new request"
            raise WireError("idempotency_conflict", message, param=KEY_HEADER)
        if isinstance(known, _Kept):
            done: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            done.set_result(known.reply)
            yield done
            return
        entry = known or self._begin(key, digest, work)
        entry.waiting += 1
        try:
            yield entry.task
        finally:
            entry.waiting -= 1
            if not entry.waiting and not entry.task.done():
                if key is not None:  # whoever comes next with this key must not join what is ending
                    self._running.pop(key, None)
                entry.task.cancel()

    def _begin(self, key: str | None, digest: bytes, work: Work) -> _Running:
        entry = _Running(digest, asyncio.ensure_future(work()))
        if key is None:
            return entry
        self._running[key] = entry

        def finished(task: "asyncio.Future[Reply]") -> None:
            if self._running.get(key) is not entry:
                return
            del self._running[key]
            if not task.cancelled() and task.exception() is None and task.result().final:
                reply = task.result()
                self._room -= len(reply.body)
                self._done[key] = _Kept(digest, reply, time.monotonic() + self._seconds)

        entry.task.add_done_callback(finished)
        return entry

    def _expire(self) -> None:
        """Drop what is too old, and the oldest of what is too much."""
        while self._done:
            key, entry = next(iter(self._done.items()))
            if entry.expires > time.monotonic() and len(self._done) <= self._most and self._room >= 0:
                return
            del self._done[key]
            self._room += len(entry.reply.body)
