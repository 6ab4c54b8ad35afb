"""One exchange with a reward server over HTTP, and what it means when that fails."""

import contextlib
import importlib
import json
import os
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

import tiltflow
from tiltflow.errors import RewardError
from tiltflow.rewards.endpoints import Verdict
from tiltflow.rewards.payload import Parcel
from tiltflow.rewards.tries import asked_pause
from tiltflow.serving import wire

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS: Final = 5.0
KEEPALIVE_SECONDS: Final = 3.0  # less than servers keep idle connections (5 s), so that none is closed while it is used
REPLY_BYTES: Final = 2**20  # of a whole reply, and for every item
ITEM_REPLY_BYTES: Final = 2**16
TOLD: Final = 400  # characters of a server's message that are shown
TRUE_ANYWHERE: Final = (501, 505)  # what one server of its kind does not implement, none does


@dataclass(frozen=True)
class ServerSettings:
    """Where the servers of one reward answer, and what opens them."""

    reward: str  # its name
    urls: tuple[str, ...]
    token: SecretStr | None = None
    token_env: str | None = None  # the environment variable that holds the token

    def secret(self) -> str | None:
        """Return the token, or None where there is none.

        Raises:
            RewardError: The environment variable is not set, or what was given cannot be a token.
        """
        if self.token_env is not None:
            text, source = os.environ.get(self.token_env, "").strip(), f"token_env={self.token_env!r}"
            if not text:
                raise RewardError(f"reward {self.reward!r}: {source}: this environment variable is not set or empty")
        elif self.token is not None:
            text, source = self.token.get_secret_value(), "token"
        else:
            return None
        if not (text.isascii() and text.isprintable()) or " " in text or not text:
            raise RewardError(
                f"reward {self.reward!r}: {source}: a token is ASCII letters, digits and signs, no spaces"
            )
        return text


class AttemptError(RewardError):
    """One try of one request failed."""

    def __init__(
        self,
        message: str,
        *,
        verdict: Verdict,
        retryable: bool,
        counts: bool = True,
        pause: float | None = None,
    ):
        """Keep what follows from it.

        Args:
            message: For people; names the server.
            verdict: What it says about the server.
            retryable: Another try may succeed.
            counts: The server may have worked on the request; if not, the try is not one of those that are limited.
            pause: Seconds for which the server asked to be left alone.
        """
        super().__init__(message)
        self.verdict: Verdict = verdict
        self.retryable = retryable
        self.counts = counts
        self.pause = pause


@dataclass(frozen=True)
class _Answer:
    """An HTTP response that has been read."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """Connections to the servers of one reward, shared by its lanes; pickled as its settings alone."""

    def __init__(self, settings: ServerSettings, *, transport: "httpx2.BaseTransport | None" = None):
        """Prepare; connections are made when they are needed.

        Args:
            settings: Of the servers.
            transport: Takes the place of the network in tests.
        """
        self.settings = settings
        self._transport = transport
        self._lock = threading.Lock()
        self._client: httpx2.Client | None = None
        self._secret: str | None = None

    def __reduce__(self) -> "tuple[type[Transport], tuple[ServerSettings]]":
        return Transport, (self.settings,)

    def check(self) -> None:
        """Raise a RewardError if a package or the token is missing, before anything is sent."""
        self._open()

    def close(self) -> None:
        """Close all connections; new ones are made if they are needed after all."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def models(self, url: str, *, timeout: float) -> list[wire.ModelInfo]:
        """Ask a server what it serves.

        Raises:
            AttemptError: It does not tell.
        """
        answer = self._exchange("GET", url, wire.MODELS_PATH, timeout=timeout, most=REPLY_BYTES)
        if answer.status != 200:
            raise self._failure(url, answer)
        try:
            return wire.read_models(answer.body)
        except (ValueError, RecursionError) as error:
            raise AttemptError(
                f"{url} is no reward server: {self._clean(error)}", verdict="alive", retryable=False
            ) from error

    def score(self, url: str, parcel: Parcel, *, timeout: float, time_left: float) -> wire.ScoreReply:
        """Send a request and return its checked reply.

        Args:
            url: Of the server.
            parcel: The request.
            timeout: Seconds that this try may take.
            time_left: Seconds that the request may take in all, which the server is told: it keeps what a later try
                with the same key can still fetch.

        Raises:
            AttemptError: There is no reply, it is an error, or makes no sense.
        """
        headers = {
            "Content-Type": parcel.content_type,
            wire.KEY_HEADER: parcel.key,
            wire.DEADLINE_HEADER: str(max(1, int(time_left * 1000))),
        }
        most = REPLY_BYTES + ITEM_REPLY_BYTES * len(parcel.ids)
        answer = self._exchange(
            "POST", url, wire.SCORE_PATH, timeout=timeout, most=most, headers=headers, content=parcel.body
        )
        # An error reply that is about single samples lists the others' scores all the same.
        if answer.status != 200 and (parcel.whole or not _has_results(answer.body)):
            raise self._failure(url, answer)
        try:
            reply = wire.read_reply(answer.body, items=len(parcel.ids))
            parcel.check(reply)
        except (ValueError, RecursionError) as error:
            message = f"{url} answered with something that cannot be used: {self._clean(error)}"
            raise AttemptError(message, verdict="faulty", retryable=True) from error
        return reply

    def _exchange(
        self,
        method: str,
        url: str,
        path: str,
        *,
        timeout: float,
        most: int,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> _Answer:
        httpx = _package("httpx2", self.settings.reward)
        client = self._open()
        from tiltflow.rewards.network import until

        end = time.monotonic() + timeout
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        try:
            request = client.build_request(method, url + path, headers=headers, content=content, timeout=limits)
            with until(end), contextlib.closing(client.send(request, stream=True)) as response:
                return _Answer(response.status_code, response.headers, self._read(url, response, end=end, most=most))
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
            message = f"{url} cannot be reached: {type(error).__name__}: {self._clean(error)}"
            raise AttemptError(message, verdict="down", retryable=True, counts=False) from error
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            message = f"{url} cannot be asked: {type(error).__name__}: {self._clean(error)}"
            raise AttemptError(message, verdict="unknown", retryable=False) from error
        except httpx.TransportError as error:
            what = "hung up"
            if isinstance(error, httpx.TimeoutException):
                did = "take the request" if isinstance(error, httpx.WriteTimeout) else "answer"
                what = f"did not {did} within {timeout:.3g} s"
            message = f"{url} {what}: {type(error).__name__}: {self._clean(error)}"
            raise AttemptError(message, verdict="faulty", retryable=True) from error

    def _read(self, url: str, response: "httpx2.Response", *, end: float, most: int) -> bytes:
        """Return the body, as it was sent; one that is too long, packed or too slow is no answer."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise AttemptError(f"{url} answered in a packed form", verdict="faulty", retryable=False)
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > most:
                raise AttemptError(f"{url} answered with more than {most} bytes", verdict="faulty", retryable=False)
            if time.monotonic() > end:
                raise AttemptError(f"{url} did not finish its answer in time", verdict="faulty", retryable=True)
        return bytes(body)

    def _failure(self, url: str, answer: _Answer) -> AttemptError:
        """Return what an HTTP error means."""
        told = _error_of(answer.body)
        if told is None:
            text = f"HTTP {answer.status}: {self._clean(answer.body[: 4 * TOLD].decode('utf-8', 'replace'))}"
        else:
            text = f"HTTP {answer.status} {told.code}: {self._clean(told.message)}"
        message = f"{url} answered {text}{_remedy(answer.status)}"
        pause = _pause(answer, told)
        if answer.status == 429:
            return AttemptError(message, verdict="alive", retryable=True, counts=False, pause=pause)
        if answer.status == 503:
            # What will not come back here may well be there at another server.
            retryable = told is None or told.retryable or len(self.settings.urls) > 1
            # A worker that died, or a model that no longer starts, may have done so over this very request: it must not
            # go from server to server without end.
            worked = told is not None and told.code in ("worker_lost", "model_failed")
            verdict = "faulty" if worked else "down"
            return AttemptError(message, verdict=verdict, retryable=retryable, counts=worked, pause=pause)
        retryable = False
        if answer.status >= 500:
            retryable = told.retryable if told is not None else answer.status not in TRUE_ANYWHERE
        verdict: Verdict = "faulty" if retryable else "alive"
        return AttemptError(message, verdict=verdict, retryable=retryable, pause=pause)

    def _open(self) -> "httpx2.Client":
        httpx = _package("httpx2", self.settings.reward)
        with self._lock:
            if self._client is not None:
                return self._client
            headers = {"Accept-Encoding": "identity", "User-Agent": f"tiltflow/{tiltflow.__version__}"}
            self._secret = self.settings.secret()
            if self._secret is not None:
                headers["Authorization"] = f"Bearer {self._secret}"
            client = httpx.Client(headers=headers, transport=self._transport or _network())
            weakref.finalize(self, client.close)
            self._client = client
            return client

    def _clean(self, text: object) -> str:
        """Return what a server or library said as one short line without the token and without control characters."""
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
        line = line.replace(self._secret, "***") if self._secret else line
        return line if len(line) <= TOLD else f"{line[:TOLD]}..."


def _network() -> "httpx2.BaseTransport":
    from tiltflow.rewards.network import Network

    return Network(keepalive_seconds=KEEPALIVE_SECONDS)


def _package(name: str, reward: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RewardError(f"reward {reward!r} needs the package {name}: pip install 'tiltflow[remote]'") from error


def _has_results(body: bytes) -> bool:
    """Tell whether a body lists answers about items."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("results"), list)


def _error_of(body: bytes) -> wire.ErrorBody | None:
    """Return the error that a body tells, or None where it was not written by a reward server."""
    try:
        return wire.ErrorBody.model_validate(json.loads(body)["error"])
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _pause(answer: _Answer, told: wire.ErrorBody | None) -> float | None:
    """Return for how many seconds a server asks to be left alone."""
    if told is not None and told.retry_after_ms is not None:
        return max(0.0, told.retry_after_ms / 1000)
    return asked_pause(answer.headers)


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "; give the server's token with token_env (an environment variable) or token"
    if status == 404:
        return "; check server_url and model"
    if status == 408:
        return "; send less at a time (batch_size, pixels: uint8), or raise the server's limit body_seconds"
    if 300 <= status < 400:
        return "; redirects are not followed: give the address it points to as server_url"
    return ""
