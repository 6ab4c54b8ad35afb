"""One request to a judge, tried again as long as that makes sense, and over at a deadline that no peer can outlast."""

import asyncio
import email.utils
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from tiltflow.errors import JudgeError, JudgeTimeoutError

T = TypeVar("T")

CONNECT_TIMEOUT: Final = 5.0  # seconds: a server that is there accepts at once
FIRST_PAUSE: Final = 0.5  # seconds before the second try; it doubles with every further one
LONGEST_PAUSE: Final = 8.0
PASSING: Final = (408, 409, 429)  # besides 5xx: HTTP errors that another try may not meet
TOLD: Final = 400  # characters of an error that are shown


class Tries:
    """Sends the requests of one judge: so many at once, each so often and so long."""

    def __init__(
        self,
        openai: Any,
        name: str,
        *,
        seconds: float,
        retries: int,
        at_once: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        """Keep the limits.

        Args:
            openai: The package, whose exceptions tell what happened.
            name: Of the judge, for messages.
            seconds: That one request may take from its turn on, all its tries and pauses included.
            retries: Tries after the first.
            at_once: Requests under way at a time; the others wait for their turn.
            sleep: Waits for so many seconds.
        """
        self._openai = openai
        self._name = name
        self._seconds = seconds
        self._retries = retries
        self._turns = asyncio.Semaphore(at_once)
        self._sleep = sleep
        self._random = random.Random()  # of its own: pauses must not disturb a run's randomness

    async def send(
        self, request: Callable[[Any], Awaitable[T]], *, seconds: float = math.inf, retries: int | None = None
    ) -> T:
        """Return what the first try that succeeds returns.

        Connection errors, timeouts of a connection, the statuses 408, 409, 429 and 5xx are tried again: after a pause
        that doubles from 0.5 to 8 s, less up to a quarter by chance, or after what `Retry-After` says. Another error is
        final, and so is any after which there is no time for the pause. A try may take all the time that is left, and
        is cancelled then, whatever its peer is doing: connecting, reading slowly or answering byte by byte.

        Args:
            request: Makes one try, given the openai client's limits of single operations.
            seconds: Less than usual for this request.
            retries: Another number for this request.

        Raises:
            JudgeTimeoutError: There was no answer in time.
            JudgeError: The last try failed; its cause is the openai client's exception.
        """
        retries = self._retries if retries is None else retries
        async with self._turns:
            return await self._until(request, min(seconds, self._seconds), retries)

    async def _until(self, request: Callable[[Any], Awaitable[T]], seconds: float, retries: int) -> T:
        began = time.monotonic()
        deadline = began + seconds
        made = 0
        last: Any = None
        while True:
            left = deadline - time.monotonic()
            limits = self._openai.Timeout(max(left, 1e-3), connect=max(min(left, CONNECT_TIMEOUT), 1e-3))
            try:
                return await asyncio.wait_for(request(limits), left)
            except asyncio.TimeoutError as error:
                raise JudgeTimeoutError(self._late(seconds, made, last)) from (last or error)
            except self._openai.OpenAIError as error:
                last = error
            made += 1
            pause = self._pause(last, made) if made <= retries else None
            late = time.monotonic() + (pause or 0.0) >= deadline
            if late and (pause is not None or isinstance(last, self._openai.APITimeoutError)):
                raise JudgeTimeoutError(self._late(seconds, made, last)) from last
            if pause is None:
                tried = f" (tried {made} times in {time.monotonic() - began:.3g} s)" if made > 1 else ""
                raise JudgeError(f"{self._name} failed: {causes(last)}{tried}") from last
            await self._sleep(pause)

    def _late(self, seconds: float, made: int, last: Any) -> str:
        if last is None or isinstance(last, self._openai.APITimeoutError):
            return f"{self._name} gave no answer within {seconds:g} s"
        times = "once" if made == 1 else f"{made} times"
        return f"{self._name} gave no answer within {seconds:g} s; it failed {times}, at last with {causes(last)}"

    def _pause(self, error: Any, made: int) -> float | None:
        """Return after how many seconds to try again, or None for never."""
        headers: Mapping[str, str] = {}
        if isinstance(error, self._openai.APIStatusError):
            headers = error.response.headers
            says = headers.get("x-should-retry")
            passing = error.status_code in PASSING or error.status_code >= 500
            if says == "false" or (not passing and says != "true"):
                return None
        elif not isinstance(error, self._openai.APIConnectionError):
            return None
        own = min(FIRST_PAUSE * 2.0 ** min(made - 1, 10), LONGEST_PAUSE) * self._random.uniform(0.75, 1.0)
        return asked_pause(headers) or own


def causes(error: BaseException) -> str:
    """Return an error with what is behind it, on one line: the client says only "Connection error."."""
    cause = error.__cause__
    behind = f" ({type(cause).__name__}: {cause})" if cause is not None else ""
    line = " ".join(f"{type(error).__name__}: {error}{behind}".split())
    return line if len(line) <= TOLD else f"{line[:TOLD]}..."


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """Return for how many seconds a server asks to be left alone, or None."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, OverflowError):
                continue  # neither form of the header: it asks for nothing that could be honoured
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
