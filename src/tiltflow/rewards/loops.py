"""An event loop in a thread of its own, so that waiting has an end and threads that wait need no loop themselves."""

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LoopClosedError(RuntimeError):
    """The loop has ended, and what it was waiting for with it."""


class LoopThread:
    """Runs coroutines for any number of threads, each of which waits for its own.

    A thread that has a running event loop of its own may wait too: it holds up its loop, and never this one. The
    loop's thread starts with the first coroutine, is a daemon, and ends when nobody has this object any longer.
    """

    def __init__(self, name: str, *, at_end: Callable[[], Coroutine[Any, Any, object]]):
        """Prepare; no thread is started yet.

        Args:
            name: Of the thread.
            at_end: Awaited in the loop when it ends, such as to close connections. It must not refer to this object.
        """
        self._name = name
        self._at_end = at_end
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what a coroutine returns, or raise what it raises; it is cancelled when its caller is interrupted.

        Raises:
            LoopClosedError: The loop was closed before or meanwhile.
            RuntimeError: It is called from within the loop, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{self._name}: a coroutine of this loop waits for another one of it")
        with self._lock:
            if self._closed:
                raise LoopClosedError(f"{self._name} is closed")
            if self._loop is None:
                self._loop = self._start()
            future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except CancelledError as error:  # nobody else has the future: the loop has ended
            raise LoopClosedError(f"{self._name} was closed meanwhile") from error
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop; who waits is told so."""
        with self._lock:
            self._closed = True
            loop = self._loop
        if loop is not None:
            _stop(loop, os.getpid())

    def _start(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_turn, args=(loop, self._at_end), name=self._name, daemon=True)
        self._thread.start()
        weakref.finalize(self, _stop, loop, os.getpid())
        return loop


def _turn(loop: asyncio.AbstractEventLoop, at_end: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run a loop until it is stopped, and end everything that is still going on in it."""
    try:
        loop.run_forever()
        loop.run_until_complete(_finish(at_end))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _finish(at_end: Callable[[], Coroutine[Any, Any, object]]) -> None:
    unfinished = asyncio.all_tasks() - {asyncio.current_task()}
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    await at_end()


def _stop(loop: asyncio.AbstractEventLoop, process: int) -> None:
    if process != os.getpid():  # a fork has the loop, but not its thread
        return
    with contextlib.suppress(RuntimeError):  # it has ended already
        loop.call_soon_threadsafe(loop.stop)


class PerProcess(Generic[T]):
    """Something that every process makes for itself, as what has threads, locks or connections does not survive a fork.

    A copy of the parent's is kept in a fork and never touched: it shares the parent's connections.
    """

    def __init__(self, make: Callable[[], T]):
        """Make it for this process.

        Args:
            make: Makes it; called again in a fork that needs it.
        """
        self._make = make
        self._made = {os.getpid(): make()}

    def get(self) -> T:
        """Return this process's."""
        found = self._made.get(os.getpid())
        if found is None:
            found = self._made.setdefault(os.getpid(), self._make())  # of threads that come at once the first wins
        return found
