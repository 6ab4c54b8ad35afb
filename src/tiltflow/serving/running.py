"""Runs the HTTP process: listens, serves until a signal, ends in order."""

import asyncio
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final
from weakref import WeakKeyDictionary

import uvicorn
from PIL import Image

from tiltflow.errors import ConfigError
from tiltflow.runtime.malloc import keep_memory
from tiltflow.serving.app import create_app
from tiltflow.serving.guard import SENT
from tiltflow.serving.jobs import ScorerSource
from tiltflow.serving.metrics import Metrics
from tiltflow.serving.models import LOAD_SECONDS, ServedModel
from tiltflow.serving.prometheus import make_metrics
from tiltflow.serving.settings import ServerSettings, address_of, listen
from tiltflow.serving.wire import Limits, WireError

HTTP: Final = "h11" if find_spec("httptools") is None else "httptools"
KEEP_ALIVE_SECONDS: Final = 30  # longer than clients keep idle connections, so that they are the ones to close them
HEADER_SECONDS: Final = 10.0  # for a request's headers to arrive, once a connection is open or has begun to send
TICK_SECONDS: Final = 0.5
LAST_SECONDS: Final = 5  # after the drain, for answers to be sent


@dataclass(frozen=True)
class ModelSpec:
    """One model to be served."""

    name: str
    source: ScorerSource
    replicas: int = 1
    batch_size: int | None = None  # None: the model's own
    batch_pixels: int | None = None
    batch_tokens: int | None = None
    batch_seconds: float = 60.0
    load_seconds: float = LOAD_SECONDS


def make_models(specs: Sequence[ModelSpec], *, limits: Limits, metrics: Metrics) -> dict[str, ServedModel]:
    """Return the models of one server, by name; none is started."""
    return {
        spec.name: ServedModel(
            spec.name,
            spec.source,
            replicas=spec.replicas,
            batch_size=spec.batch_size,
            batch_pixels=spec.batch_pixels,
            batch_tokens=spec.batch_tokens,
            batch_seconds=spec.batch_seconds,
            load_seconds=spec.load_seconds,
            limits=limits,
            metrics=metrics,
        )
        for spec in specs
    }


def run_server(specs: Sequence[ModelSpec], settings: ServerSettings, *, note: str = "") -> None:
    """Serve models until SIGTERM or SIGINT; the first line printed tells the address.

    Args:
        specs: The models.
        settings: Of the server.
        note: For whoever starts it, printed after the address.

    Raises:
        ConfigError: The address cannot be had, or no model could be made.
    """
    keep_memory()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked, from the header
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # on damaged EXIF entries, ever other texts
    with listen(settings) as found:
        server = _Server(specs, settings)
        print(f"tiltflow: listening on {address_of(found)} ({', '.join(server.models)})", flush=True)
        if note:
            print(f"tiltflow: {note}", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # what uvicorn leaves after an orderly end by Ctrl+C
            server.run(found)
    if server.failure is not None:
        raise ConfigError(server.failure)


class _Http(uvicorn.Server):
    """uvicorn, which also closes connections that never finish the headers of a request, or do not read their reply."""

    def __init__(self, config: uvicorn.Config, at_exit: Callable[[], Coroutine[Any, Any, None]], *, limits: Limits):
        super().__init__(config)
        self._at_exit = at_exit
        self._limits = limits
        self._house: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._house = asyncio.ensure_future(self._keep_house())
        await super().startup(sockets)

    async def _keep_house(self) -> None:
        waits: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # connection -> since when it owes us headers
        unread: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # request -> seconds that its reply was not taken
        while not self.should_exit:
            now = time.monotonic()
            connections: list[Any] = list(self.server_state.connections)  # of one of the two classes of HTTP
            for connection in connections:
                if not _owes_headers(connection):
                    waits.pop(connection, None)
                elif now - waits.setdefault(connection, now) > HEADER_SECONDS:
                    connection.transport.close()
                if connection.cycle is not None and connection.transport.get_write_buffer_size():
                    unread[connection.cycle] = unread.get(connection.cycle, 0.0) + TICK_SECONDS
                    sent = connection.cycle.scope["state"].get(SENT, 0)
                    if unread[connection.cycle] > self._limits.seconds_for(sent):
                        connection.transport.abort()  # to close it would wait for the client
            await asyncio.sleep(TICK_SECONDS)
        await self._at_exit()


def _owes_headers(connection: Any) -> bool:
    """Tell whether a connection is new, or has begun to send another request, whose headers are not complete.

    One that is idle between two requests has uvicorn's own timer.
    """
    if connection.cycle is None:
        return True
    return connection.cycle.response_complete and connection.timeout_keep_alive_task is None


class _Server:
    """uvicorn around the application, and what it does not do by itself."""

    def __init__(self, specs: Sequence[ModelSpec], settings: ServerSettings):
        self._settings = settings
        self.failure: str | None = None
        metrics = make_metrics()
        limits = settings.limits
        self.models = make_models(specs, limits=limits, metrics=metrics)
        app = create_app(
            self.models,
            limits=limits,
            token=settings.token,
            metrics=metrics,
            drain_seconds=settings.drain_seconds,
            loaded=self._loaded,
        )
        self._uvicorn = _Http(
            uvicorn.Config(
                app,
                lifespan="on",
                http=HTTP,
                ws="none",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections + 1,  # the connection that exceeds it is told so
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(settings.drain_seconds) + LAST_SECONDS,
            ),
            self._end_in_time,
            limits=limits,
        )

    def run(self, found: Any) -> None:
        """Serve; uvicorn uses uvloop and httptools where they are installed."""
        self._uvicorn.run(sockets=[found])

    async def _loaded(self, failures: Mapping[str, WireError | None]) -> None:
        for name, error in failures.items():
            if error is None:
                print(f"tiltflow: {name} is ready", flush=True)
        failed = [error.message for error in failures.values() if error is not None and error.code == "model_failed"]
        if len(failed) == len(failures):
            self.failure = "; ".join(failed)
            self._uvicorn.should_exit = True
        elif failed:
            print(f"tiltflow: {'; '.join(failed)}", file=sys.stderr, flush=True)

    async def _end_in_time(self) -> None:
        """Let nothing outlive the drain."""
        await asyncio.sleep(self._settings.drain_seconds)
        await asyncio.gather(*(model.stop(drain_seconds=0.0) for model in self.models.values()))
