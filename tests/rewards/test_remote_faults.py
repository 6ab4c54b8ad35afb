"""What a remote reward makes of errors, as a server in a process of its own sees it, which counts its requests."""

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.rewards.reward_server import Process
from tests.rewards.samples import entry
from tiltflow.rewards import build_reward_model
from tiltflow.rewards.endpoints import FIRST_PAUSE, THRESHOLD, RetryBudget
from tiltflow.rewards.retries import FIRST_BACKOFF, RemoteRewardError, RemoteTimeoutError
from tiltflow.serving import wire

LATE = 2.0  # seconds by which a busy machine may be late


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process("length", tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.fixture
def server(process: Process) -> Process:
    """Return the server, well behaved and asked nothing yet."""
    process.behave()
    return process


def build(server: Process, *, timeout: float = 30.0, num_workers: int = 1, **options: Any) -> Any:
    given = {"server_url": server.url, "required_fields": ["prompt"], **options}
    arguments = entry(
        "far", "RemotePointwiseRewardModel", options=given, timeout=timeout, num_workers=num_workers, async_reward=True
    )
    return build_reward_model(arguments)


def in_threads(work: Any, count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


# --- a storm of errors ------------------------------------------------------------------------------------------------


def test_pauses_between_tries_are_random_and_grow(server: Process) -> None:
    """Each reward is alone, and makes fewer tries than open its breaker: only the backoff is seen."""
    server.behave(always="html:500")
    rewards = [build(server, retry_attempts=THRESHOLD - 1) for _ in range(8)]

    def ask(index: int) -> None:
        with pytest.raises(RemoteRewardError, match=rf"HTTP 500.* \(tried {THRESHOLD - 1} times in "):
            rewards[index](prompt=["a"])

    in_threads(ask, len(rewards))
    moments: dict[str, list[float]] = {}
    for seen in server.seen():
        moments.setdefault(seen["key"], []).append(seen["at"])
    assert [len(each) for each in moments.values()] == [THRESHOLD - 1] * len(rewards)
    for turn in range(THRESHOLD - 2):
        pauses = [each[turn + 1] - each[turn] for each in moments.values()]
        longest = FIRST_BACKOFF * 2**turn
        assert max(pauses) < longest + LATE
        assert max(pauses) - min(pauses) > longest / 10  # eight uniform ones are closer once in 10^6
    spans = [each[-1] - each[0] for each in moments.values()]
    assert max(spans) > FIRST_BACKOFF  # more than the first pause alone can be


def test_a_storm_is_answered_with_a_trickle_and_ends_at_the_deadline(server: Process) -> None:
    reward = build(server, timeout=5.0, num_workers=8, retry_attempts=1000)
    reward._client._budget = RetryBudget(window=3600)  # the share alone, however slow the machine
    calm = 160
    for _ in range(calm):
        assert reward(prompt=["abc"]).rewards.tolist() == [3.0]
    server.behave(always="html:500")
    ends: list[tuple[float, RemoteRewardError]] = []

    def ask(_: int) -> None:
        began = time.monotonic()
        try:
            reward(prompt=["abc"])
        except RemoteRewardError as error:
            ends.append((time.monotonic() - began, error))

    in_threads(ask, 8)
    assert len(ends) == 8
    for took, error in ends:
        assert isinstance(error, RemoteTimeoutError)
        assert "no answer can be had within 5 s" in str(error) and "HTTP 500" in str(error)
        assert took < 5.0 + LATE
    longest_pause = 5.0 / 5
    assert max(took for took, _ in ends) > 5.0 - 1.25 * longest_pause - 0.1  # the last pause would have outlasted it

    seen = server.seen()
    retries = len(seen) - len({each["key"] for each in seen})
    assert 1 <= retries <= 0.1 * (calm + 8)
    assert len({each["key"] for each in seen}) <= 8

    bursts = separated([each["at"] for each in seen], by=0.7 * FIRST_PAUSE)
    assert len(bursts[0]) >= THRESHOLD  # before the breaker opened
    assert [len(burst) for burst in bursts[1:]] == [1] * (len(bursts) - 1)  # then one at a time
    gaps = [later[0] - earlier[-1] for earlier, later in pairwise(bursts)]
    assert 3 <= len(gaps) <= 7
    assert gaps[0] >= 0.7 * FIRST_PAUSE  # 0.75 of it, from when the fifth failure was read
    assert all(gap >= 0.7 * longest_pause for gap in gaps[1:])

    server.behave()
    end = time.monotonic() + 30
    while True:  # a request may be begun while its server is still left alone
        try:
            assert reward(prompt=["abc"]).rewards.tolist() == [3.0]
            break
        except RemoteRewardError:
            assert time.monotonic() < end


def separated(moments: list[float], *, by: float) -> list[list[float]]:
    """Return moments in bursts between which there is a longer pause."""
    bursts: list[list[float]] = [[]]
    for moment in sorted(moments):
        if bursts[-1] and moment - bursts[-1][-1] > by:
            bursts.append([])
        bursts[-1].append(moment)
    return bursts


# --- refusals and patience --------------------------------------------------------------------------------------------

REFUSALS = [f"code:{code}" for code, (status, _) in wire.CODES.items() if 400 <= status < 500 and status != 429]


@pytest.mark.parametrize("fault", [*REFUSALS, "html:403", "html:404", "html:418"])
def test_what_is_refused_is_tried_exactly_once(server: Process, fault: str) -> None:
    reward = build(server, retry_attempts=5)
    server.behave(always=fault)
    began = time.monotonic()
    with pytest.raises(RemoteRewardError, match=f"{server.url} answered HTTP 4"):
        reward(prompt=["abc"])
    assert time.monotonic() - began < LATE
    time.sleep(0.05)
    assert len(server.seen()) == 1


def test_retry_after_is_honoured_and_is_no_try(server: Process) -> None:
    reward = build(server, retry_attempts=1)
    server.behave(faults=["patience:1", "patience_ms:600", "patience:1"])
    assert reward(prompt=["abc"]).rewards.tolist() == [3.0]
    seen = server.seen()
    assert len(seen) == 4 and len({each["key"] for each in seen}) == 1
    gaps = [later["at"] - earlier["at"] for earlier, later in pairwise(seen)]
    for gap, asked in zip(gaps, (1.0, 0.6, 1.0), strict=True):
        assert asked <= gap < asked + FIRST_BACKOFF * 2**2 + LATE
    left = [each["left_ms"] for each in seen]
    assert all(later < earlier - 550 for earlier, later in pairwise(left))  # one deadline for all


def test_retry_after_beyond_the_deadline_ends_the_request(server: Process) -> None:
    reward = build(server, timeout=20.0)
    server.behave(always="patience:60")
    began = time.monotonic()
    with pytest.raises(RemoteTimeoutError, match=r"no answer can be had within 20 s; last: .* HTTP 429 overloaded"):
        reward(prompt=["abc"])
    assert time.monotonic() - began < LATE
    assert len(server.seen()) == 1
