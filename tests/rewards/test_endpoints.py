"""Which server a request goes to, when a breaker opens and closes, and how many retries there may be."""

import logging
import re
import threading
import time
from collections import Counter

import pytest

from tiltflow.rewards.endpoints import Balancer, NoServerError, RetryBudget

A, B = "http://a", "http://b"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- choice -----------------------------------------------------------------------------------------------------------


def test_the_least_loaded_server_is_chosen_and_equals_take_turns() -> None:
    balancer = Balancer([A, B])
    leases = [balancer.acquire(time.monotonic() + 1) for _ in range(6)]
    assert Counter(lease.url for lease in leases) == {A: 3, B: 3}
    for lease in leases:
        if lease.url == B:
            balancer.release(lease, "alive")
    assert [balancer.acquire(time.monotonic() + 1).url for _ in range(3)] == [B, B, B]


def test_a_server_that_failed_a_request_is_avoided_where_another_is_ready(clock: Clock) -> None:
    balancer = Balancer([A, B], clock=clock)
    busy = [balancer.acquire(clock.now + 1, avoid=[A]) for _ in range(3)]
    assert {lease.url for lease in busy} == {B}
    assert balancer.acquire(clock.now + 1, avoid=[A, B]).url == A
    assert balancer.another_is_ready([A])
    assert not balancer.another_is_ready([A, B])


# --- breaker ----------------------------------------------------------------------------------------------------------


def fail(balancer: Balancer, clock: Clock, verdict: str = "faulty") -> None:
    balancer.release(balancer.acquire(clock.now + 100), verdict, reason="told")  # pyright: ignore[reportArgumentType]


def is_open(balancer: Balancer) -> bool:
    return not balancer.another_is_ready(())


def test_a_breaker_opens_after_five_failures_in_a_row_and_not_before(clock: Clock) -> None:
    balancer = Balancer([A], clock=clock)
    for _ in range(4):
        fail(balancer, clock)
    fail(balancer, clock, "alive")
    for _ in range(4):
        fail(balancer, clock)
    assert not is_open(balancer)
    fail(balancer, clock)
    assert is_open(balancer)


def test_a_server_that_is_down_is_left_alone_at_once_for_longer_and_longer(clock: Clock) -> None:
    balancer = Balancer([A], clock=clock)
    pauses: list[float] = []
    for _ in range(6):
        fail(balancer, clock, "down")
        (endpoint,) = balancer.endpoints
        assert endpoint.open_until is not None
        pauses.append(endpoint.open_until - clock.now)
        assert is_open(balancer)
        clock.now = endpoint.open_until
    for pause, expected in zip(pauses, (0.5, 1.0, 2.0, 4.0, 5.0, 5.0), strict=True):
        assert 0.75 * expected <= pause <= 1.25 * expected
    assert len(set(pauses)) > 4  # jitter


def test_one_request_alone_tries_whether_a_server_is_back(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    balancer = Balancer([A], clock=clock)
    with caplog.at_level(logging.WARNING):
        fail(balancer, clock, "down")
        clock.now += 1
        probe = balancer.acquire(clock.now + 1)
        assert probe.probe
        assert is_open(balancer)
        balancer.release(probe, "alive")
    assert not is_open(balancer)
    assert not balancer.acquire(clock.now + 1).probe
    assert caplog.messages == [
        "reward server http://a is left alone for a while: told",
        "reward server http://a answers again",
    ]


def test_a_late_failure_from_before_the_breaker_opened_changes_nothing(clock: Clock) -> None:
    balancer = Balancer([A], clock=clock)
    late = [balancer.acquire(clock.now + 1) for _ in range(3)]
    fail(balancer, clock, "down")
    (endpoint,) = balancer.endpoints
    before = endpoint.open_until, endpoint.openings
    for lease in late:
        balancer.release(lease, "down")
    assert (endpoint.open_until, endpoint.openings) == before
    assert endpoint.in_flight == 0


def test_an_interrupted_probe_lets_another_one_try(clock: Clock) -> None:
    balancer = Balancer([A], clock=clock)
    fail(balancer, clock, "down")
    clock.now += 1
    balancer.release(balancer.acquire(clock.now + 1), "unknown")
    assert balancer.acquire(clock.now + 1).probe


def test_a_server_that_asks_for_patience_gets_it_from_every_lane(clock: Clock) -> None:
    balancer = Balancer([A, B], clock=clock)
    lease = balancer.acquire(clock.now + 1)
    balancer.release(lease, "alive", pause=3.0)
    other = B if lease.url == A else A
    assert [balancer.acquire(clock.now + 1).url for _ in range(3)] == [other] * 3
    clock.now += 3
    assert balancer.acquire(clock.now + 1).url == lease.url


def test_patience_beyond_the_deadline_is_an_error_at_once(clock: Clock) -> None:
    balancer = Balancer([A], clock=clock)
    balancer.release(balancer.acquire(clock.now + 1), "alive", pause=30)
    with pytest.raises(NoServerError, match="http://a asks to be left alone for another 30 s"):
        balancer.acquire(clock.now + 10)


def test_a_waiting_lane_goes_on_as_soon_as_the_probe_succeeds() -> None:
    balancer = Balancer([A])
    balancer.release(balancer.acquire(time.monotonic() + 1), "down")
    probe = balancer.acquire(time.monotonic() + 5)
    got: list[float] = []

    def wait() -> None:
        balancer.acquire(time.monotonic() + 30)
        got.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    assert got == []
    balancer.release(probe, "alive")
    released = time.monotonic()
    thread.join(30)
    assert got[0] - released < 10


def test_a_lane_waits_no_longer_than_its_deadline_for_a_probe() -> None:
    balancer = Balancer([A])
    balancer.release(balancer.acquire(time.monotonic() + 1), "down", reason="HTTP 502")
    balancer.acquire(time.monotonic() + 5)
    began = time.monotonic()
    with pytest.raises(NoServerError, match=re.escape("http://a has not answered 1 requests in a row (HTTP 502)")):
        balancer.acquire(began + 0.2)
    assert 0.19 < time.monotonic() - began < 5


# --- budget -----------------------------------------------------------------------------------------------------------


def test_a_few_retries_are_always_allowed_and_more_are_put_off(clock: Clock) -> None:
    budget = RetryBudget(floor=3, window=10, clock=clock)
    budget.request()
    assert [budget.book(clock.now, latest=200) for _ in range(7)] == [100, 100, 100, 110, 110, 110, 120]
    assert budget.book(clock.now, latest=120) is None


def test_a_tenth_of_the_requests_of_the_window_may_be_tried_again(clock: Clock) -> None:
    budget = RetryBudget(floor=1, window=10, clock=clock)
    for _ in range(100):
        budget.request()
    booked = [budget.book(clock.now, latest=109.9) for _ in range(30)]
    assert booked == [100.0] * 10 + [None] * 20
    clock.now += 10.5  # the window has moved on: no requests in it
    assert [budget.book(clock.now, latest=115) for _ in range(2)] == [110.5, None]


def test_no_window_ever_holds_more_retries_than_it_may(clock: Clock) -> None:
    budget = RetryBudget(floor=4, window=10, clock=clock)
    made: list[float] = []
    for step in range(400):
        clock.now = 100 + step * 0.1
        booked = budget.book(clock.now + (step % 7) * 0.3, latest=clock.now + 20)
        made += [] if booked is None else [booked]
    made.sort()
    assert len(made) > 12
    assert all(later - first >= 10 - 1e-9 for first, later in zip(made, made[4:], strict=False))
