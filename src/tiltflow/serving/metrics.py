"""What the serving room counts; whoever keeps the numbers implements `Metrics`."""

from typing import Literal, Protocol, TypeAlias

State: TypeAlias = Literal["LOADING", "READY", "FAILED", "DRAINING"]
Shed: TypeAlias = Literal["queue_full", "too_slow"]  # why a submission was turned away


class Metrics(Protocol):
    """Told of everything that happens to a model's samples; called on the event loop, so it must return at once."""

    def batch(self, model: str, size: int, seconds: float) -> None:
        """Count one call of the model: its samples, and the seconds until its answer."""
        ...

    def queue_wait(self, model: str, seconds: float) -> None:
        """Count how long one sample waited for its call."""
        ...

    def queue(self, model: str, items: int, size: int) -> None:
        """Note what waits now: samples, and the bytes of their pixels."""
        ...

    def restart(self, model: str) -> None:
        """Count a worker process that replaces one that died or hung."""
        ...

    def shed(self, model: str, reason: Shed) -> None:
        """Count a submission that was turned away."""
        ...

    def nonfinite(self, model: str) -> None:
        """Count one score that was NaN or infinite."""
        ...

    def state(self, model: str, state: State) -> None:
        """Note what the model is now."""
        ...


class NoMetrics:
    """Counts nothing."""

    def batch(self, model: str, size: int, seconds: float) -> None:
        """See `Metrics.batch`."""

    def queue_wait(self, model: str, seconds: float) -> None:
        """See `Metrics.queue_wait`."""

    def queue(self, model: str, items: int, size: int) -> None:
        """See `Metrics.queue`."""

    def restart(self, model: str) -> None:
        """See `Metrics.restart`."""

    def shed(self, model: str, reason: Shed) -> None:
        """See `Metrics.shed`."""

    def nonfinite(self, model: str) -> None:
        """See `Metrics.nonfinite`."""

    def state(self, model: str, state: State) -> None:
        """See `Metrics.state`."""
