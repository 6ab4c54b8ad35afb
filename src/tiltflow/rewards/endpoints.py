"""Which server a request goes to: the least loaded of those that are up. One that fails is left alone for a while.

A server's circuit breaker is closed as long as it answers. It opens when it cannot be reached, says that it is not
ready, or fails several times in a row; then nothing is sent to it for a pause, after which one single request tries
whether it is back (the breaker is half-open): that closes it, or begins a pause twice as long.
"""

import bisect
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tiltflow.errors import RewardError

THRESHOLD: Final = 5  # failures in a row that open a breaker
FIRST_PAUSE: Final = 0.5  # seconds that a breaker stays open
LONGEST_PAUSE: Final = 5.0  # unless told otherwise
RETRY_SHARE: Final = 0.1  # of the requests of a window
RETRY_FLOOR: Final = 10  # retries per window however few requests there are
RETRY_WINDOW: Final = 10.0  # seconds

# What an exchange says about the server. alive: it works; faulty: it failed this time; down: it is not there or not
# ready; unknown: the exchange was interrupted on this side.
Verdict = Literal["alive", "faulty", "down", "unknown"]

_log = logging.getLogger(__name__)


class NoServerError(RewardError):
    """No server could take a request before its deadline."""


@dataclass
class Endpoint:
    """One server, and what is known about its health."""

    url: str
    in_flight: int = 0
    last_used: int = 0  # number of the request
    failures: int = 0  # in a row
    reason: str = ""  # of the last of them
    openings: int = 0  # of its breaker, in a row
    open_until: float | None = None  # None: the breaker is closed
    probing: bool = False  # a request is trying whether it is back
    resume_at: float = 0.0  # it asked to be left alone until then

    def ready_at(self, now: float) -> float:
        """Return when it may be sent to: now, later, or infinity while its breaker waits for the outcome of a probe."""
        if self.open_until is None:
            return max(now, self.resume_at)
        return math.inf if self.probing else max(now, self.resume_at, self.open_until)


@dataclass(frozen=True)
class Lease:
    """The right to send one request to a server."""

    endpoint: Endpoint
    probe: bool  # the request tries whether the server is back

    @property
    def url(self) -> str:
        """Where the server answers."""
        return self.endpoint.url


class Balancer:
    """Hands out servers to the lanes of one reward."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        longest_pause: float = LONGEST_PAUSE,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Take all servers for healthy.

        Args:
            urls: Where they answer.
            longest_pause: Seconds that a breaker stays open.
            clock: Seconds; tests bring their own.
        """
        self.endpoints = tuple(Endpoint(url) for url in urls)
        self._longest_pause = longest_pause
        self._clock = clock
        self._random = random.Random()  # of its own: pauses must not disturb a run's randomness
        self._count = 0
        self._changed = threading.Condition()

    def acquire(self, deadline: float, *, avoid: Collection[str] = ()) -> Lease:
        """Return a server that may be sent to, waiting until there is one; give it back with `release`.

        Args:
            deadline: Of the clock.
            avoid: URLs that are taken only if no other one is ready.

        Raises:
            NoServerError: None is ready before the deadline.
        """
        with self._changed:
            while True:
                now = self._clock()
                ready = [each for each in self.endpoints if each.ready_at(now) <= now]
                if ready and now < deadline:
                    return self._take(min(ready, key=lambda each: (each.url in avoid, each.in_flight, each.last_used)))
                soonest = min(each.ready_at(now) for each in self.endpoints)
                if now >= deadline or deadline < soonest < math.inf:
                    raise NoServerError(self._why_none(now))
                self._changed.wait(min(soonest, deadline) - now)

    def release(self, lease: Lease, verdict: Verdict, *, pause: float | None = None, reason: str = "") -> None:
        """Give a server back and note how it did.

        Args:
            lease: From `acquire`.
            verdict: How it did.
            pause: Seconds for which it asked to be left alone.
            reason: What went wrong, for the log and for the errors of whoever waits for the server in vain.
        """
        endpoint = lease.endpoint
        with self._changed:
            now = self._clock()
            endpoint.in_flight -= 1
            if lease.probe:
                endpoint.probing = False
            if pause is not None:
                endpoint.resume_at = max(endpoint.resume_at, now + pause)
            if verdict == "alive":
                if endpoint.open_until is not None:
                    _log.warning("reward server %s answers again", endpoint.url)
                endpoint.failures = endpoint.openings = 0
                endpoint.open_until = None
            elif verdict != "unknown":
                endpoint.failures += 1
                endpoint.reason = reason
                if verdict == "down" or lease.probe or endpoint.failures >= THRESHOLD:
                    self._open(endpoint, now, probe=lease.probe, reason=reason)
            self._changed.notify_all()

    def another_is_ready(self, tried: Collection[str]) -> bool:
        """Tell whether a server that was not tried could be sent to at once."""
        with self._changed:
            now = self._clock()
            return any(each.url not in tried and each.ready_at(now) <= now for each in self.endpoints)

    def _take(self, endpoint: Endpoint) -> Lease:
        self._count += 1
        endpoint.last_used = self._count
        endpoint.in_flight += 1
        endpoint.probing = probe = endpoint.open_until is not None
        return Lease(endpoint, probe)

    def _open(self, endpoint: Endpoint, now: float, *, probe: bool, reason: str) -> None:
        if endpoint.open_until is None:
            _log.warning("reward server %s is left alone for a while: %s", endpoint.url, reason)
        elif not probe:
            return  # a request from before it opened: nothing new
        pause = min(self._longest_pause, FIRST_PAUSE * 2.0**endpoint.openings)
        endpoint.openings += 1
        # Jitter, so that the processes of a large run do not come back at the same moment.
        endpoint.open_until = now + pause * self._random.uniform(0.75, 1.25)

    def _why_none(self, now: float) -> str:
        states = []
        for each in self.endpoints:
            if each.open_until is not None:
                states.append(f"{each.url} has not answered {each.failures} requests in a row ({each.reason})")
            elif each.resume_at > now:
                states.append(f"{each.url} asks to be left alone for another {each.resume_at - now:.3g} s")
            else:
                states.append(f"{each.url} was not asked in time")
        return "; ".join(states)


class RetryBudget:
    """Keeps retries to a share of the requests of a sliding window, with a few allowed however few requests there are.

    A retry that has no room now is booked for the moment when it has, so that a storm of failures becomes a trickle.
    """

    def __init__(
        self,
        *,
        share: float = RETRY_SHARE,
        floor: int = RETRY_FLOOR,
        window: float = RETRY_WINDOW,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Begin with an empty window.

        Args:
            share: Retries per request.
            floor: Retries per window that are always allowed.
            window: Seconds.
            clock: Seconds; tests bring their own.
        """
        self._share, self._floor, self._window, self._clock = share, floor, window, clock
        self._requests: list[float] = []  # when, in order
        self._retries: list[float] = []  # when, in order; some may lie ahead
        self._lock = threading.Lock()

    def request(self) -> None:
        """Count a request, once however often it is tried."""
        with self._lock:
            self._requests.append(self._clock())
            self._forget()

    def book(self, earliest: float, *, latest: float) -> float | None:
        """Book a retry.

        Args:
            earliest: Of the clock.
            latest: Of the clock.

        Returns:
            When it may be made, or None if that is not before `latest`; nothing is booked then.
        """
        with self._lock:
            self._forget()
            allowed = max(self._floor, int(self._share * len(self._requests)))
            moment = earliest
            if len(self._retries) >= allowed:
                moment = max(moment, self._retries[-allowed] + self._window)
            if moment >= latest:
                return None
            bisect.insort(self._retries, moment)
            return moment

    def _forget(self) -> None:
        start = self._clock() - self._window
        del self._requests[: bisect.bisect_right(self._requests, start)]
        del self._retries[: bisect.bisect_right(self._retries, start)]
