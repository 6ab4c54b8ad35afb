"""Worker threads of one asynchronous reward: its own lanes, so that a slow reward cannot hold up another."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from tiltflow.errors import exit_is_error

T = TypeVar("T")


@dataclass
class Call(Generic[T]):
    """One call of a reward on its way through a lane."""

    work: Callable[[], T]
    done: threading.Event = field(default_factory=threading.Event)
    began: float | None = None  # of the monotonic clock
    ended: float | None = None
    given_up: bool = False
    result: T | None = None
    error: Exception | None = None
    _settled: bool = False  # its thread has gone on
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Do the work, keeping its result or its exception."""
        self.began = time.monotonic()
        try:
            self.result = self.work()
        except Exception as error:  # kept for whoever waits for this call
            self.error = error
        except BaseException as error:  # such as a library's sys.exit: it would end the thread, and nobody would know
            self.error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
        finally:
            self.ended = time.monotonic()
            self.done.set()

    def settle(self) -> bool:
        """Tell, once it is done, whether its thread goes on: not if another one has taken its lane."""
        with self._lock:
            self._settled = True
            return not self.given_up

    def give_up(self) -> bool:
        """Wait for it no longer, and tell whether its lane needs another thread: not if its own has just gone on."""
        with self._lock:
            self.given_up = True
            return not self._settled

    def answer(self) -> T:
        """Return what the work returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.result  # pyright: ignore[reportReturnType]  # T may itself be None


class Runner(Protocol[T]):
    """Where calls are made."""

    def submit(self, work: Callable[[], T]) -> Call[T]:
        """Take a call; returns at once."""
        ...

    def wait(self, call: Call[T]) -> T:
        """Return the call's result, or raise what it raised."""
        ...

    def close(self) -> None:
        """Drop the calls that have not begun."""
        ...


class Inline(Generic[T]):
    """Makes each call when its result is asked for, in the thread that asks."""

    def submit(self, work: Callable[[], T]) -> Call[T]:
        """Keep a call for later."""
        return Call(work)

    def wait(self, call: Call[T]) -> T:
        """Make the call and return its result, or raise what it raised; a library's sys.exit becomes a RuntimeError."""
        with exit_is_error():
            return call.work()

    def close(self) -> None:
        """There is nothing to end."""


class Lanes(Generic[T]):
    """A fixed number of threads that work off calls in order.

    The threads are daemons: a call that hangs in a library is given up, another thread takes its lane, and neither
    keeps the process from ending.
    """

    def __init__(self, count: int, *, name: str, timeout: float | None):
        """Start the threads.

        Args:
            count: How many calls run at a time.
            name: Of the threads.
            timeout: Seconds that one call may take, from its start; None waits for ever.
        """
        self._queue: SimpleQueue[Call[T] | None] = SimpleQueue()
        self._name = name
        self._timeout = timeout
        self._calls: list[Call[T]] = []  # not yet done
        self._lock = threading.Lock()
        for _ in range(count):
            self._start()

    def submit(self, work: Callable[[], T]) -> Call[T]:
        """Queue a call; returns at once."""
        call = Call(work)
        with self._lock:
            self._calls.append(call)
        self._queue.put(call)
        self._replace_late()
        return call

    def wait(self, call: Call[T]) -> T:
        """Return a call's result.

        Raises:
            TimeoutError: It took longer than the timeout.
            Exception: What the call raised.
        """
        while not call.done.wait(self._patience(call)):
            self._replace_late()
            if call.given_up:
                break
        if call.given_up or self._is_late(call):
            raise TimeoutError(f"no answer within {self._timeout:g} s")
        return call.answer()

    def close(self) -> None:
        """Let the threads end when they have nothing left to do; calls that wait are dropped."""
        try:
            while True:
                waiting = self._queue.get_nowait()  # a lane may take the last one meanwhile
                if waiting is not None:
                    waiting.given_up = True
        except Empty:
            self._queue.put(None)

    def _start(self) -> None:
        threading.Thread(target=_work, args=(self._queue,), name=self._name, daemon=True).start()

    def _replace_late(self) -> None:
        """Give up the calls that take too long, and start a thread in place of each of theirs."""
        if self._timeout is None:
            return
        with self._lock:
            self._calls = [call for call in self._calls if not call.done.is_set()]
            for call in self._calls:
                if self._is_late(call) and not call.given_up and call.give_up():
                    self._start()

    def _patience(self, call: Call[T]) -> float | None:
        """Return how long to sleep before looking again: to a running call's deadline, briefly for a queued one."""
        if self._timeout is None:
            return None
        return 0.02 if call.began is None else max(0.0, call.began + self._timeout - time.monotonic()) + 1e-3

    def _is_late(self, call: Call[T]) -> bool:
        if self._timeout is None or call.began is None:
            return False
        return (call.ended or time.monotonic()) - call.began >= self._timeout


def _work(queue: "SimpleQueue[Call[T] | None]") -> None:
    """Work off calls until told to end, or until another thread has taken the lane of a call that took too long."""
    while (call := queue.get()) is not None:
        if not call.given_up:
            call.run()
            if not call.settle():
                return
    queue.put(None)  # for the next thread
