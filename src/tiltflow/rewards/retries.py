"""Requests that reach one of several servers before a deadline, tried again as often as that makes sense and no more.

A server that cannot be reached, or says that it is not ready (503), is waited for or passed over for another one; that
is no try. One that asks for patience (429 and Retry-After) gets it. What may have been bad luck (other 5xx, a timeout,
a reply that was cut or makes no sense) is tried a limited number of times, elsewhere at once or here after a growing
random pause, and within a budget that all requests share. What cannot succeed (4xx, an error that says so) is tried
once.

A reply may also say of single samples that another try may succeed, where what the reward itself asks was out. They are
sent once more, as a new request that has only the time and the tries which the first one left.
"""

import importlib
import logging
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tiltflow.errors import RewardError
from tiltflow.rewards.endpoints import LONGEST_PAUSE, RETRY_FLOOR, Balancer, Lease, NoServerError, RetryBudget, Verdict
from tiltflow.rewards.payload import Parcel
from tiltflow.rewards.transport import AttemptError, ServerSettings, Transport
from tiltflow.serving import wire

if TYPE_CHECKING:
    import httpx2

FIRST_BACKOFF: Final = 0.25  # seconds: the longest pause before the second try; it doubles with every further one
LONGEST_BACKOFF: Final = 5.0
ITEM_PAUSE: Final = 1.0  # seconds, at least, until single samples are sent again: what a reward asks may be back then
NO_TIME: Final = 0.01  # of a request's time: with less left, it is used up


class RemoteRewardError(RewardError):
    """A reward server did not score: one sample, or a whole request."""

    def __init__(self, message: str, *, for_all: bool = False):
        """Keep what follows from it.

        Args:
            message: For people.
            for_all: The request's time is used up, or no server can be had: another request would fare no better.
        """
        super().__init__(message)
        self.for_all = for_all


class RemoteTimeoutError(RemoteRewardError, TimeoutError):
    """No server answered before the deadline."""


@dataclass(frozen=True)
class Patience:
    """How long and how often a request is tried."""

    timeout: float  # seconds that a request may take, all its tries and pauses included
    attempts: int  # tries that a server may have worked on
    lanes: int = 1  # requests under way at a time

    @property
    def retry_floor(self) -> int:
        """Retries per window that are always allowed: enough for every lane when a server dies under all of them."""
        return max(RETRY_FLOOR, 2 * self.lanes)


@dataclass
class Progress:
    """What has become of one request so far, and of what was sent again of it."""

    began: float
    deadline: float
    made: int = 0  # tries that a server may have worked on
    replies: int = 0
    pauses: int = 0
    tried: set[str] = field(default_factory=set[str])  # servers that failed it
    last: AttemptError | None = None


class RewardClient:
    """Asks the servers of one reward; its lanes share it. Pickled as its settings, without connections."""

    def __init__(
        self, settings: ServerSettings, patience: Patience, *, transport: "httpx2.BaseTransport | None" = None
    ):
        """Prepare; nothing is sent yet.

        Args:
            settings: Of the servers.
            patience: Of every request.
            transport: Takes the place of the network in tests.
        """
        self.settings = settings
        self.patience = patience
        self.transport = Transport(settings, transport=transport)
        # However short a request's time, it sees a server that is back.
        self.balancer = Balancer(settings.urls, longest_pause=min(LONGEST_PAUSE, patience.timeout / 5))
        self._budget = RetryBudget(floor=patience.retry_floor)
        self._random = random.Random()  # of its own: pauses must not disturb a run's randomness
        # Every retry is logged there; programs that set up no logging are not to see a line for each.
        logger = logging.getLogger("stamina")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())

    def __reduce__(self) -> "tuple[type[RewardClient], tuple[ServerSettings, Patience]]":
        return RewardClient, (self.settings, self.patience)

    def check(self) -> None:
        """Raise a RewardError if a package or the token is missing, before anything is sent."""
        self.transport.check()
        _stamina(self.settings.reward)

    def close(self) -> None:
        """Close all connections; new ones are made if they are needed after all."""
        self.transport.close()

    def begin(self) -> Progress:
        """Return the time and the tries of one request, which begin now."""
        now = time.monotonic()
        return Progress(began=now, deadline=now + self.patience.timeout)

    def send(self, parcel: Parcel, progress: Progress) -> wire.ScoreReply:
        """Return the reply to a request from whichever server gives one first.

        Args:
            parcel: The request.
            progress: From `begin`; another request with the same one has what the first one left.

        Raises:
            RemoteTimeoutError: None did before the deadline.
            RemoteRewardError: A server refused it, or too many tries failed.
        """
        if not progress.replies:
            self._budget.request()
        stamina = _stamina(self.settings.reward)
        try:
            # How long to wait, and when to stop, is decided in one place: only there is everything known.
            for attempt in stamina.retry_context(
                on=lambda error: self._wait(error, progress), attempts=None, timeout=None
            ):
                with attempt:
                    reply = self._try(parcel, progress)
                    progress.made += 1
                    progress.replies += 1
                    return reply
        except (AttemptError, NoServerError) as error:
            raise self._final(error, progress) from error
        raise AssertionError("retry_context ends with a reply or an exception")

    def wait_for_items(self, progress: Progress, errors: Iterable[wire.ErrorBody]) -> bool:
        """Wait until samples that failed in passing may be sent again.

        Args:
            progress: Of the request that they were in.
            errors: Theirs, as the reply tells them.

        Returns:
            Whether they may: there are tries, time and room in the budget for it. If not, nothing was waited for.
        """
        if progress.made >= self.patience.attempts:
            return False
        asked = max((error.retry_after_ms or 0 for error in errors), default=0) / 1000
        now = time.monotonic()
        wait = max(asked, ITEM_PAUSE) * self._random.uniform(1.0, 1.5)
        booked = self._budget.book(now + wait, latest=progress.deadline)
        if booked is None:
            return False
        time.sleep(max(0.0, booked - now))
        return True

    def _try(self, parcel: Parcel, progress: Progress) -> wire.ScoreReply:
        lease = self.balancer.acquire(progress.deadline, avoid=progress.tried)
        verdict: Verdict = "unknown"
        pause, reason = None, ""
        try:
            left = progress.deadline - time.monotonic()
            reply = self.transport.score(lease.url, parcel, timeout=self._share(left, lease, progress), time_left=left)
            verdict = "alive"
            return reply
        except AttemptError as error:
            verdict, pause, reason = error.verdict, error.pause, str(error)
            progress.last = error
            progress.tried.add(lease.url)
            progress.made += error.counts
            raise
        finally:
            self.balancer.release(lease, verdict, pause=pause, reason=reason)

    def _share(self, left: float, lease: Lease, progress: Progress) -> float:
        """Return how much of the time that is left one try may take: half of it if another server could be asked."""
        last = progress.made + 1 >= self.patience.attempts or not self.balancer.another_is_ready({lease.url})
        return max(left if last else left / 2, 1e-3)

    def _wait(self, error: Exception, progress: Progress) -> bool | float:
        """Return after how many seconds to try again, or False for never."""
        if not isinstance(error, AttemptError) or not error.retryable or progress.made >= self.patience.attempts:
            return False
        if error.verdict == "down":
            return 0.0  # the balancer waits until there is a server
        elsewhere = self.balancer.another_is_ready(progress.tried)
        wait = 0.0 if elsewhere else (error.pause or 0.0) + self._backoff(progress)
        now = time.monotonic()
        booked = self._budget.book(now + wait, latest=progress.deadline)
        return False if booked is None else max(0.0, booked - now)

    def _backoff(self, progress: Progress) -> float:
        longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0**progress.pauses)
        progress.pauses += 1
        return self._random.uniform(0.0, longest)

    def _final(self, error: AttemptError | NoServerError, progress: Progress) -> RemoteRewardError:
        """Return the one exception that a request ends with."""
        now = time.monotonic()
        for_all = isinstance(error, NoServerError) or progress.deadline - now < NO_TIME * self.patience.timeout
        message = str(error) if progress.last is None else str(progress.last)
        if progress.last is not None and not progress.last.retryable:
            return RemoteRewardError(message)
        if isinstance(error, AttemptError) and progress.made >= self.patience.attempts:
            tried = f"tried {progress.made} times in {now - progress.began:.3g} s"
            return RemoteRewardError(f"{message} ({tried})", for_all=for_all)
        because = f"; {error}" if isinstance(error, NoServerError) and progress.last is not None else ""
        return RemoteTimeoutError(
            f"no answer can be had within {self.patience.timeout:g} s; last: {message}{because}", for_all=for_all
        )


def _stamina(reward: str) -> Any:
    try:
        return importlib.import_module("stamina")
    except ImportError as error:
        raise RewardError(f"reward {reward!r} needs the package stamina: pip install 'tiltflow[remote]'") from error
