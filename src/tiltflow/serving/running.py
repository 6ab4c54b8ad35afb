"""Runs the HTTP process: listens, serves until a signal, ends in order."""

import asyncio
import contextlib
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final
from weakref import WeakKeyDictionary

import uvicorn
from PIL import Image

from tiltflow.errors import ConfigError
from tiltflow.serving.app import create_app
from tiltflow.serving.jobs import ScorerSource
from tiltflow.serving.malloc import keep_memory
from tiltflow.serving.metrics import Metrics
from tiltflow.serving.models import ServedModel
from tiltflow.serving.prometheus import make_metrics
from tiltflow.serving.settings import ServerSettings, address_of, listen
from tiltflow.serving.wire import Limits, WireError

HTTP: Final = "h11" if find_spec("httptools") is None else "httptools"
KEEP_ALIVE_SECONDS: Final = 30  # longer than clients keep idle connections, so that they are the ones to close them
HEADER_SECONDS: Final = 10.0  # for a new connection to send its first request's headers
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
    batch_seconds: float = 60.0


def make_models(specs: Sequence[ModelSpec], *, limits: Limits, metrics: Metrics) -> dict[str, ServedModel]:
    """Return the models of one server, by name; none is started."""
    return {
        spec.name: ServedModel(
            spec.name,
            spec.source,
            replicas=spec.replicas,
            batch_size=spec.batch_size,
            batch_pixels=spec.batch_pixels,
            batch_seconds=spec.batch_seconds,
            limits=limits,
            metrics=metrics,
        )
        for spec in specs
    }


def run_server(specs: Sequence[ModelSpec], settings: ServerSettings) -> None:
    """Serve models until SIGTERM or SIGINT; the first line printed tells the address.

    Raises:
        ConfigError: The address cannot be had, or no model could be made.
    """
    keep_memory()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked, from the header
    with listen(settings) as found:
        server = _Server(specs, settings)
        print(f"tiltflow: listening on {address_of(found)} ({', '.join(server.models)})", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # what uvicorn leaves after an orderly end by Ctrl+C
            server.run(found)
    if server.failure is not None:
        raise ConfigError(server.failure)


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
        self._uvicorn = uvicorn.Server(
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
            )
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
        await self._keep_house()

    async def _keep_house(self) -> None:
        """Close connections that never ask for anything, and let nothing outlive the drain."""
        seen: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        while not self._uvicorn.should_exit:
            now = time.monotonic()
            connections: list[Any] = list(self._uvicorn.server_state.connections)  # of one of the two classes of HTTP
            for connection in connections:
                if connection.cycle is None and now - seen.setdefault(connection, now) > HEADER_SECONDS:
                    connection.transport.close()
            await asyncio.sleep(TICK_SECONDS)
        await asyncio.sleep(self._settings.drain_seconds)
        await asyncio.gather(*(model.stop(drain_seconds=0.0) for model in self.models.values()))
