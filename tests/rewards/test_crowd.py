"""Work on many things at once: order, bounds, failures that stay alone, and callers that are interrupted."""

import threading
import time

import pytest

from tiltflow.rewards.crowd import do_all


def test_results_are_in_the_order_of_the_items() -> None:
    def work(item: float) -> float:
        time.sleep(item)
        return 2 * item

    done = do_all(work, [0.05, 0.0, 0.02], at_once=3)
    assert (done.results, done.failures) == ([0.1, 0.0, 0.04], {})


@pytest.mark.parametrize("at_once", [1, 3, 20])
def test_no_more_at_once_than_allowed(at_once: int) -> None:
    lock, now, most = threading.Lock(), 0, 0
    together = threading.Barrier(min(at_once, 10), timeout=20)

    def work(item: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if item < together.parties:
            together.wait()
        with lock:
            now -= 1
        return item

    assert do_all(work, range(10), at_once=at_once).results == list(range(10))
    assert most == min(at_once, 10)


def test_a_failure_stays_alone() -> None:
    done = do_all(lambda item: 1 / item, [1.0, 0.0, 4.0], at_once=2)
    assert done.results == [1.0, None, 0.25]
    assert list(done.failures) == [1]
    assert isinstance(done.failures[1], ZeroDivisionError)


@pytest.mark.parametrize("at_once", [1, 3])
def test_what_ends_a_thread_is_a_failure_too_and_the_others_are_worked_on(at_once: int) -> None:
    def work(item: int) -> int:
        if item == 1:
            raise SystemExit("a library's idea")
        return item

    done = do_all(work, range(4), at_once=at_once)
    assert done.results == [0, None, 2, 3]
    assert {place: str(error) for place, error in done.failures.items()} == {1: "SystemExit: a library's idea"}


def test_nothing_to_do_starts_no_thread() -> None:
    before = threading.active_count()
    assert do_all(lambda item: item, [], at_once=4).results == []
    assert threading.active_count() == before


def test_an_interrupted_caller_leaves_the_rest_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, released = list[int](), threading.Event()
    join, here, before = threading.Thread.join, threading.current_thread(), set(threading.enumerate())

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if threading.current_thread() is here:
            raise KeyboardInterrupt
        join(self, timeout)

    def work(item: int) -> None:
        begun.append(item)
        assert released.wait(20)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "join", interrupted)
        do_all(work, range(100), at_once=2)
    released.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert len(begun) <= 2
