"""What the server counts, in the format of Prometheus."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol, get_args

from tiltflow.serving.metrics import Metrics, NoMetrics, Shed, State
from tiltflow.serving.wire import WireError

_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class HttpMetrics(Metrics, Protocol):
    """What the HTTP side counts beside what the models do."""

    def request(self, route: str, status: int) -> None:
        """Count one HTTP request."""
        ...

    def items(self, model: str, outcome: str, count: int) -> None:
        """Count items; `outcome` is `ok` or an error code."""
        ...

    def decode(self, seconds: float) -> None:
        """Count the reading of one body: parsing it and decoding its pictures."""
        ...

    def watch_inflight(self, size: Callable[[], float]) -> None:
        """Take what tells how many bytes of bodies are held."""
        ...

    def text(self) -> tuple[bytes, str]:
        """Return all numbers, and the Content-Type.

        Raises:
            WireError: `not_implemented` where nothing is counted.
        """
        ...


class PrometheusMetrics:
    """Keeps the numbers of one server; names begin with `tiltflow_`."""

    def __init__(self) -> None:
        """Make a registry of its own.

        Raises:
            ImportError: prometheus-client is not installed.
        """
        library = import_module("prometheus_client")
        self._library = library
        self._series = cache(_series)  # one for each model, route and outcome: few, and looked up with every request
        self._registry = library.CollectorRegistry()
        library.ProcessCollector(registry=self._registry)

        def make(kind: Any, name: str, text: str, labels: tuple[str, ...], **more: Any) -> Any:
            return kind(f"tiltflow_{name}", text, labels, registry=self._registry, **more)

        counter, gauge, histogram = library.Counter, library.Gauge, library.Histogram
        self._requests = make(counter, "requests_total", "HTTP requests", ("route", "code"))
        self._items = make(counter, "items_total", "Items, by model and outcome", ("model", "outcome"))
        self._queue_items = make(gauge, "queue_items", "Samples that wait", ("model",))
        self._queue_bytes = make(gauge, "queue_bytes", "Bytes of the pixels that wait", ("model",))
        self._wait = make(histogram, "queue_wait_seconds", "Samples' wait", ("model",), buckets=_SECONDS)
        self._size = make(histogram, "batch_size", "Samples of a call", ("model",), buckets=_SIZES)
        self._batch = make(histogram, "batch_seconds", "Seconds of a call", ("model",), buckets=_SECONDS)
        self._decode = make(histogram, "decode_seconds", "Seconds to read a body", (), buckets=_SECONDS)
        self._inflight = make(gauge, "inflight_bytes", "Bytes of bodies and decoded pictures in flight", ())
        self._restarts = make(counter, "worker_restarts_total", "Workers that replaced lost ones", ("model",))
        self._shed = make(counter, "shed_total", "Submissions turned away", ("model", "reason"))
        self._nonfinite = make(counter, "nonfinite_total", "Scores that were NaN or infinite", ("model",))
        self._state = make(gauge, "model_state", "1 for the state that the model is in", ("model", "state"))

    def batch(self, model: str, size: int, seconds: float) -> None:
        """See `Metrics.batch`."""
        self._series(self._size, model).observe(size)
        self._series(self._batch, model).observe(seconds)

    def queue_wait(self, model: str, seconds: float) -> None:
        """See `Metrics.queue_wait`."""
        self._series(self._wait, model).observe(seconds)

    def queue(self, model: str, items: int, size: int) -> None:
        """See `Metrics.queue`."""
        self._series(self._queue_items, model).set(items)
        self._series(self._queue_bytes, model).set(size)

    def restart(self, model: str) -> None:
        """See `Metrics.restart`."""
        self._series(self._restarts, model).inc()

    def shed(self, model: str, reason: Shed) -> None:
        """See `Metrics.shed`."""
        self._series(self._shed, model, reason).inc()

    def nonfinite(self, model: str) -> None:
        """See `Metrics.nonfinite`."""
        self._series(self._nonfinite, model).inc()

    def state(self, model: str, state: State) -> None:
        """See `Metrics.state`."""
        for each in get_args(State):
            self._series(self._state, model, each).set(each == state)

    def request(self, route: str, status: int) -> None:
        """See `HttpMetrics.request`."""
        self._series(self._requests, route, str(status)).inc()

    def items(self, model: str, outcome: str, count: int) -> None:
        """See `HttpMetrics.items`."""
        self._series(self._items, model, outcome).inc(count)

    def decode(self, seconds: float) -> None:
        """See `HttpMetrics.decode`."""
        self._decode.observe(seconds)

    def watch_inflight(self, size: Callable[[], float]) -> None:
        """See `HttpMetrics.watch_inflight`."""
        self._inflight.set_function(size)

    def text(self) -> tuple[bytes, str]:
        """See `HttpMetrics.text`."""
        return self._library.generate_latest(self._registry), self._library.CONTENT_TYPE_LATEST


def _series(metric: Any, *labels: str) -> Any:
    return metric.labels(*labels)


class NoHttpMetrics(NoMetrics):
    """Counts nothing; stands in where prometheus-client is not installed."""

    def request(self, route: str, status: int) -> None:
        """See `HttpMetrics.request`."""

    def items(self, model: str, outcome: str, count: int) -> None:
        """See `HttpMetrics.items`."""

    def decode(self, seconds: float) -> None:
        """See `HttpMetrics.decode`."""

    def watch_inflight(self, size: Callable[[], float]) -> None:
        """See `HttpMetrics.watch_inflight`."""

    def text(self) -> tuple[bytes, str]:
        """See `HttpMetrics.text`."""
        raise WireError(
            "not_implemented", "/metrics needs the package prometheus-client: pip install 'tiltflow[serve]'"
        )


def make_metrics() -> HttpMetrics:
    """Return metrics that count if prometheus-client is installed."""
    return NoHttpMetrics() if find_spec("prometheus_client") is None else PrometheusMetrics()
