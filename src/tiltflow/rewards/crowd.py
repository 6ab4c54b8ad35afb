"""The same work on many things at once, where one that fails does not fail the others."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


@dataclass
class Done(Generic[T]):
    """What became of each item.

    Example: of three items the second failed: `Done([0.3, None, 0.9], {1: RewardError(...)})`.
    """

    results: list[T | None]  # one per item; None where it failed
    failures: dict[int, Exception] = field(default_factory=dict[int, Exception])  # place -> why


def do_all(work: Callable[[S], T], items: Sequence[S], *, at_once: int) -> Done[T]:
    """Work on items in threads, and wait for all of them.

    The threads live as long as the call, so that it may be made from any thread and inside a running event loop (which
    it holds up until it returns). They are daemons: when the caller is interrupted, no new item is begun, and those
    that are being worked on do not keep the process from ending.

    Args:
        work: Called with one item; may raise.
        items: What to work on.
        at_once: How many threads at most.
    """
    done: Done[T] = Done([None] * len(items))
    places = iter(range(len(items)))
    lock = threading.Lock()
    stopped = threading.Event()

    def run() -> None:
        failure: Exception
        while not stopped.is_set():
            with lock:
                place = next(places, None)
            if place is None:
                return
            try:
                done.results[place] = work(items[place])
            except Exception as error:  # a failure is a value: it is kept for the item it belongs to
                failure = error
            except BaseException as error:
                # Such as a library's sys.exit: it would end the thread, and nobody would know.
                failure = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
            else:
                continue
            with lock:
                done.failures[place] = failure

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(at_once, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stopped.set()
    return done
