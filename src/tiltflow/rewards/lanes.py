"""Worker threads of one asynchronous reward: its own lanes, so that a slow reward cannot hold up another."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Call(Generic[T]):
    """One call of a reward on its way through a lane."""

    work: Callable[[], T]
    done: threading.Event = field(default_factory=threading.Event)
    began: float | None = None  # of the monotonic clock
    given_up: bool = False
    result: T | None = None
    error: Exception | None = None

    def run(self) -> None:
        """Do the work, keeping its result or its exception."""
        self.began = time.monotonic()
        try:
            self.result = self.work()
        except Exception as error:  # kept for whoever waits for this call
            self.error = error
        self.done.set()


class Lanes(Generic[T]):
    """A fixed number of threads that work off calls in order.

    The threads are daemons: a call that hangs in a library is given up, and does not keep the process from ending.
    """

    def __init__(self, count: int, *, name: str, timeout: float | None):
        """Start the threads.

        Args:
            count: How many calls run at a time.
            name: Of the threads.
            timeout: Seconds that one call may take, from its start; None waits for ever.
        """
        self._queue: SimpleQueue[Call[T] | None] = SimpleQueue()
        self._count = count
        self._timeout = timeout
        self._late: list[Call[T]] = []
        for index in range(count):
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Call[T]:
        """Queue a call; returns at once."""
        call = Call(work)
        self._queue.put(call)
        return call

    def wait(self, call: Call[T]) -> T:
        """Return a call's result.

        Raises:
            TimeoutError: It took longer than the timeout, or all lanes are held by calls that did.
            Exception: What the call raised.
        """
        while not call.done.wait(self._patience(call)):
            if self._is_late(call):
                self._late.append(call)
                call.given_up = True
                raise TimeoutError(f"no answer within {self._timeout:g} s")
            if call.began is None and sum(not late.done.is_set() for late in self._late) >= self._count:
                call.given_up = True
                raise TimeoutError(f"never began: all {self._count} workers are held by calls without an answer")
        if call.error is not None:
            raise call.error
        return call.result  # pyright: ignore[reportReturnType]  # T may itself be None

    def close(self) -> None:
        """Let the threads end when they have nothing left to do; calls that wait are dropped."""
        while not self._queue.empty():
            waiting = self._queue.get()
            if waiting is not None:
                waiting.given_up = True
        for _ in range(self._count):
            self._queue.put(None)

    def _patience(self, call: Call[T]) -> float | None:
        """Return how long to sleep before looking again: to a running call's deadline, briefly for a queued one."""
        if self._timeout is None:
            return None
        return 0.02 if call.began is None else max(0.0, call.began + self._timeout - time.monotonic()) + 1e-3

    def _is_late(self, call: Call[T]) -> bool:
        return self._timeout is not None and call.began is not None and time.monotonic() - call.began >= self._timeout

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            if not call.given_up:
                call.run()
