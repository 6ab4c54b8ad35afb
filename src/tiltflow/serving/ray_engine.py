"""The same application on Ray Serve: replicas on one or many machines, as many as the load asks for.

Each replica of Ray is a whole server without its listening socket: the application, and under it the worker processes
with their queue, batches, deadlines and watchdog. Ray starts and replaces replicas, and its HTTP proxies choose one for
each request.
"""

import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiltflow.errors import ConfigError
from tiltflow.runtime.malloc import keep_memory
from tiltflow.serving.app import create_app
from tiltflow.serving.models import ServedModel
from tiltflow.serving.prometheus import make_metrics
from tiltflow.serving.running import KEEP_ALIVE_SECONDS, LAST_SECONDS, ModelSpec, make_models
from tiltflow.serving.settings import ServerSettings, listen
from tiltflow.serving.wire import ID_HEADER, WireError

APP: Final = "tiltflow"  # of the application and of its one deployment, as Ray's own tools show them
REPLICA_HEADER: Final = "X-Replica-Id"  # of every answer: Ray's name for the replica that gave it
OBJECT_STORE_BYTES: Final = 100 * 2**20  # of a Ray of our own: bodies pass through it in pieces; Ray's least is 75 MiB
STARTS: Final = 1  # a model that could not be made will not be made the next time either
HEALTH_SECONDS: Final = 5.0  # between looks at a replica
LOOK_SECONDS: Final = 2.0  # between looks at the whole
TICK_SECONDS: Final = 0.2
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
MESSAGE_LENGTH: Final = 500  # characters of what Ray tells
_HIDDEN: Final = ID_HEADER.lower().encode()


@dataclass(frozen=True)
class RaySettings:
    """How many replicas Ray keeps, what each is given, and where.

    Raises:
        ConfigError: A number is out of range.
    """

    min_replicas: int = 1
    max_replicas: int | None = None  # None: min_replicas, so that nothing is scaled
    target_ongoing_requests: float = 8.0  # of one replica; more add replicas, fewer remove them
    num_cpus: float = 1.0  # of one replica, a share of its machine that nobody enforces
    num_gpus: float = 0.0  # of one replica
    address: str | None = None  # of a Ray that runs, "host:6379" or "auto"; None: one of our own, on this machine

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ConfigError(f"min_replicas={self.min_replicas}: use 1 or more")
        if self.most < self.min_replicas:
            raise ConfigError(f"max_replicas={self.max_replicas}: use min_replicas={self.min_replicas} or more")
        for name, value in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value}: use 0 or more")
        if not 0 < self.target_ongoing_requests < float("inf"):
            raise ConfigError(f"target_ongoing_requests={self.target_ongoing_requests}: use a number above 0")
        if self.address is not None and (not self.address or "://" in self.address):
            raise ConfigError(f"address={self.address!r}: use host:port of a Ray cluster's head, such as 10.0.0.1:6379")

    @property
    def most(self) -> int:
        """Return the most replicas."""
        return self.min_replicas if self.max_replicas is None else self.max_replicas


class Replica:
    """What Ray makes once per replica; `serve.ingress` gives it the rest of an ASGI deployment."""

    def __init__(self, specs: Sequence[ModelSpec], settings: ServerSettings):
        """Keep what the application is made of; Ray asks for it next."""
        self._specs = specs
        self._settings = settings
        self._models: Mapping[str, ServedModel] = {}
        self._loaded = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, whose lifespan Ray runs; it has the replica's process to itself."""
        keep_memory()
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked, from the header
        warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # on damaged EXIF entries, ever other texts
        metrics = make_metrics()
        limits = self._settings.limits
        self._models = make_models(self._specs, limits=limits, metrics=metrics)
        app = create_app(
            self._models,
            limits=limits,
            token=self._settings.token,
            metrics=metrics,
            drain_seconds=self._settings.drain_seconds,
        )
        return Labelled(app, import_module("ray.serve").get_replica_context().replica_tag)

    async def check_health(self) -> None:
        """Tell Ray whether this replica is of use.

        Ray asks before it sends the first request, so that a replica gets none while its models load, and regularly
        after that. A model whose worker is being replaced does not count as ill.

        Raises:
            ConfigError: A model could not be made, or its workers died too often. Ray replaces the replica.
        """
        for model in self._models.values():
            why = await _failure(model) if model.state == "FAILED" or not self._loaded else None
            if why is not None:
                raise ConfigError(why)  # not the error itself: Ray sends it to other processes
        self._loaded = True


async def _failure(model: ServedModel) -> str | None:
    try:
        await model.wait_ready()
    except WireError as error:
        return error.message if error.code == "model_failed" else None
    return None


class Labelled:
    """An application whose answers name the replica that gave them."""

    def __init__(self, app: ASGIApp, replica: str):
        """Wrap an application; `replica` goes into `X-Replica-Id`."""
        self._app = app
        self._label = (REPLICA_HEADER.lower().encode(), replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""

        async def label(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Ray's proxy gives every request an id where the client gave none, and tells it back by itself.
                kept = [(name, value) for name, value in message["headers"] if name.lower() != _HIDDEN]
                message = {**message, "headers": [*kept, self._label]}
            await send(message)

        await self._app(scope, receive, label)


def run_on_ray(specs: Sequence[ModelSpec], settings: ServerSettings, scaling: RaySettings) -> None:
    """Serve models on Ray until SIGTERM or SIGINT; prints the address as soon as every model can be called.

    Raises:
        ConfigError: Ray is missing or cannot be reached, it has too little for the replicas or serves something
            already, the address cannot be had, a model could not be made, or Ray ended by itself.
    """
    settings = _with_port(settings, scaling)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody, unless that is asked for
    if find_spec("ray") is None:
        raise ConfigError("--engine ray needs a package that is missing (ray): pip install 'tiltflow[ray]'")
    ray, serve = import_module("ray"), import_module("ray.serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it does in order needs no line
    with _interruptible() as quietly:
        try:
            _connect(ray, scaling)
            quietly()  # Ray has put handlers of its own in their place
            _deploy(serve, specs, settings, scaling)
            _watch(ray, serve)
        finally:
            for number in SIGNALS:  # a second one interrupts nothing: the orderly end takes a bounded time
                signal.signal(number, signal.SIG_IGN)
            _end(ray, serve, settings)


def _with_port(settings: ServerSettings, scaling: RaySettings) -> ServerSettings:
    """Return the settings with a port that Ray's proxies can listen on.

    Raises:
        ConfigError: The address cannot be had, or there is no port that is free on machines unseen.
    """
    if scaling.address is not None:
        if not settings.port:
            raise ConfigError(f"port=0 with address={scaling.address!r}: name the port that all its machines listen on")
        return settings
    with listen(settings) as found:  # Ray itself would share a port with another server, and say nothing
        return replace(settings, port=found.getsockname()[1])


def _connect(ray: Any, scaling: RaySettings) -> None:
    """Start a Ray or connect to one.

    Raises:
        ConfigError: It cannot be reached, or the machine has not what the replicas need.
    """
    quiet = {"logging_level": "WARNING"}
    if scaling.address is not None:
        try:
            ray.init(address=scaling.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            told = _one_line(str(error))
            raise ConfigError(f"address={scaling.address!r}: no Ray cluster could be reached there: {told}") from error
        return
    ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    has = ray.cluster_resources()
    for name, kind, each in (("num_cpus", "CPU", scaling.num_cpus), ("num_gpus", "GPU", scaling.num_gpus)):
        need, there = each * scaling.min_replicas, has.get(kind, 0.0)
        if need > there:  # Ray would wait for them for ever
            raise ConfigError(
                f"{name}={each:g} for each of min_replicas={scaling.min_replicas} is {need:g} {kind}, and this machine "
                f"has {there:g}; use less, or an --address with more"
            )


def _deploy(serve: Any, specs: Sequence[ModelSpec], settings: ServerSettings, scaling: RaySettings) -> None:
    """Deploy the application and wait until its first replicas are ready.

    Raises:
        ConfigError: Ray serves something already, or a model could not be made.
    """
    found = serve.status()
    if found.proxies or found.applications:
        raise ConfigError(
            f"address={scaling.address!r}: Ray Serve runs there already, with an address and rules of its own for who "
            "may ask; end it with `serve shutdown`, or use another cluster"
        )
    http = {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": KEEP_ALIVE_SECONDS}
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    print(f"tiltflow: starting {scaling.min_replicas} of {scaling.most} replicas on Ray", flush=True)
    serve.start(http_options=http, logging_config=quiet)
    cls = serve.ingress()(Replica)
    deployment = serve.deployment(cls, name=APP, **_deployment_options(settings, scaling))
    try:
        serve.run(deployment.bind(tuple(specs), settings), name=APP, route_prefix="/", logging_config=quiet)
    except (RuntimeError, TimeoutError) as error:
        found = serve.status().applications.get(APP)
        told = [each.message for each in found.deployments.values()] if found is not None else []
        raise ConfigError(_reason("\n".join([str(error), *told]))) from error
    names = ", ".join(spec.name for spec in specs)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"tiltflow: listening on http://{host}:{settings.port} ({names})", flush=True)
    for spec in specs:
        print(f"tiltflow: {spec.name} is ready", flush=True)


def _deployment_options(settings: ServerSettings, scaling: RaySettings) -> dict[str, Any]:
    most = max(settings.limits.connections, int(scaling.target_ongoing_requests) + 1)
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
        "max_ongoing_requests": most,  # of one replica; its own queue is the one that sheds
        "max_queued_requests": most,  # of one proxy, while no replica takes them; more get a plain 503
        "graceful_shutdown_timeout_s": settings.drain_seconds + LAST_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_SECONDS,
        "max_constructor_retry_count": STARTS,
    }
    if scaling.most == scaling.min_replicas:
        return {**options, "num_replicas": scaling.min_replicas}
    scale = {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.most,
        "target_ongoing_requests": scaling.target_ongoing_requests,
    }
    return {**options, "autoscaling_config": scale}


def _watch(ray: Any, serve: Any) -> None:
    """Wait for a signal, and tell when the application's state changes.

    Raises:
        ConfigError: Ray has ended, or somebody else has removed the application.
    """
    state = "RUNNING"
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            found = serve.status().applications.get(APP)
        except ray.exceptions.RayError as error:
            raise ConfigError(f"Ray ended by itself: {_one_line(str(error))}") from error
        if found is None:
            raise ConfigError("the application was removed from Ray")
        if found.status.value != state:
            state = found.status.value
            print(f"tiltflow: the application is {state} {_one_line(found.message)}".rstrip(), file=sys.stderr)


def _end(ray: Any, serve: Any, settings: ServerSettings) -> None:
    """Finish what is in flight, then end the replicas, the proxies and a Ray of our own."""
    try:
        if ray.is_initialized() and APP in serve.status().applications:
            serve.delete(APP, _blocking=False)  # the proxies stay until the replicas have drained
            end = time.monotonic() + settings.drain_seconds + 2 * LAST_SECONDS
            while APP in serve.status().applications and time.monotonic() < end:
                time.sleep(TICK_SECONDS)
            serve.shutdown()
    except ray.exceptions.RayError as error:  # it ended before us, and there is nothing left to end in order
        print(f"tiltflow: Ray could not be ended in order: {_one_line(str(error))}", file=sys.stderr)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and SIGINT end the block, without an error; yields what sets the handlers once more."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def listen_to_signals() -> None:
        for number in SIGNALS:
            signal.signal(number, interrupt)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen_to_signals()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield listen_to_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(message: str) -> str:
    """Return why a deployment failed: the error's own line, where Ray's report has one."""
    lines = [line.strip() for line in message.splitlines() if "ConfigError: " in line]
    return lines[-1].partition("ConfigError: ")[2] if lines else _one_line(message)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MESSAGE_LENGTH]
