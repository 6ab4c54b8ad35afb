"""One model behind the server: its queue, its replicas, and what state it is in."""

import asyncio
import time
from collections.abc import Iterator, Sequence

from tiltflow.serving.batcher import Entry, Pace, Queue, Unit, batches_until
from tiltflow.serving.jobs import Sample, Scored, ScorerSource
from tiltflow.serving.lane import Lane
from tiltflow.serving.metrics import Metrics, NoMetrics, State
from tiltflow.serving.suspects import Suspects
from tiltflow.serving.wire import Limits, ModelInfo, WireError

# Of one call, where nothing else is said.
BATCH_PIXELS = 64 * 2**20  # 64 pictures of 1024 x 1024, or one video of 81 frames
BATCH_TOKENS = 65_536  # four prompts of the largest size
RETRY_MS = 1000  # until a client asks again, where nothing better is known
EXIT_SECONDS = 2.0  # for a worker process to end by itself
LOAD_SECONDS = 1800.0  # for a model to be made; large ones come over slow disks


class ServedModel:
    """Scores samples in worker processes, in batches, as soon as one of them is free."""

    state: State = "LOADING"
    _stopping = False

    def __init__(
        self,
        name: str,
        source: ScorerSource,
        *,
        replicas: int = 1,
        batch_size: int | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        batch_pixels: int | None = None,
        batch_tokens: int | None = None,
        batch_seconds: float = 60.0,
        load_seconds: float = LOAD_SECONDS,
        metrics: Metrics | None = None,
    ):
        """Describe a model; `start` makes it.

        Args:
            name: As requests name it.
            source: How a worker process makes it.
            replicas: Worker processes, each with a model of its own.
            batch_size: Most samples of one call; None takes the model's own.
            limits: What the server takes; here `queue_items` counts.
            batch_pixels: Most pixels of one call; a sample (or a group) with more is refused.
            batch_tokens: Most tokens of one call, at four bytes of a prompt each; likewise.
            batch_seconds: How long a call may take before its worker is killed and replaced.
            load_seconds: How long the making of the model may take before it counts as failed.
            metrics: Told of everything that happens.

        Raises:
            WireError: `replicas` or `batch_size` is below 1.
        """
        _check_settings(replicas=replicas, batch_size=batch_size, batch_pixels=batch_pixels, batch_tokens=batch_tokens)
        self.name = name
        self._limits = limits
        self._batch_size = batch_size
        self._batch_pixels = batch_pixels or BATCH_PIXELS
        self._batch_tokens = batch_tokens or BATCH_TOKENS
        self._metrics: Metrics = metrics or NoMetrics()
        self._queue = Queue(lambda items, nbytes: self._metrics.queue(name, items, nbytes))
        self._pace, self._suspects = Pace(), Suspects()
        self._open = 0  # submitted samples that are not settled
        self._known = asyncio.Event()  # the state is not LOADING
        self._lanes = [
            Lane(
                name,
                source,
                queue=self._queue,
                pace=self._pace,
                suspects=self._suspects,
                batch_size=batch_size,
                batch_pixels=self._batch_pixels,
                batch_tokens=self._batch_tokens,
                batch_seconds=batch_seconds,
                load_seconds=load_seconds,
                metrics=self._metrics,
                changed=self._refresh,
            )
            for _ in range(replicas)
        ]
        self.info = ModelInfo(name=name, state=self.state, limits=limits, batch_size=batch_size or 1)

    @property
    def queue_items(self) -> int:
        """Return how many samples wait."""
        return self._queue.items

    @property
    def queue_bytes(self) -> int:
        """Return the bytes of the pixels that wait."""
        return self._queue.nbytes

    async def start(self) -> None:
        """Start the worker processes and return at once; the state tells when they are ready."""
        self._metrics.state(self.name, self.state)
        for lane in self._lanes:
            lane.start()

    async def wait_ready(self) -> None:
        """Wait until the model can be called.

        Raises:
            WireError: `model_failed` with what its constructor raised, or `draining`.
        """
        await self._known.wait()
        if self.state != "READY":
            raise self._refusal()

    async def stop(self, *, drain_seconds: float) -> None:
        """Take no new work, finish what waits and runs, and end the workers.

        Args:
            drain_seconds: What is not finished after them is answered with `draining`.
        """
        self._stopping = True
        self._refresh()
        end = time.monotonic() + drain_seconds
        while self._open and time.monotonic() < end:
            self._queue.purge()
            await asyncio.sleep(0.01)
        refusal = WireError("draining", f"{self.name} stopped before it came to this sample", retry_after_ms=RETRY_MS)
        await asyncio.gather(*(lane.stop(refusal, seconds=EXIT_SECONDS) for lane in self._lanes))
        self._refuse_all(refusal)

    async def recognize(self, samples: Sequence[Sample]) -> None:
        """Read samples that look like those which ended a worker, before `submit` has to do it at once."""
        if not self._suspects:
            return
        units: dict[object, list[Sample]] = {}
        for place, sample in enumerate(samples):
            units.setdefault(sample.group if self.info.groupwise else place, []).append(sample)
        await self._suspects.recognize(list(units.values()))

    def submit(
        self, samples: Sequence[Sample], *, deadline: float, priority: int = 0
    ) -> "list[asyncio.Future[Scored]]":
        """Queue samples, all of them or none.

        Args:
            samples: N samples; all of a group together.
            deadline: On the monotonic clock (`time.monotonic`), in seconds; a sample that is not scored by then is
                answered with `deadline_exceeded`.
            priority: Higher goes first.

        Returns:
            N futures, never with an exception: what goes wrong with a sample is its `Scored.error`. Cancelling one
            drops its sample if its call has not begun; a group is dropped when all of it is cancelled.

        Raises:
            WireError: `loading`, `draining` or `model_failed`; `deadline_exceeded` already; `overloaded`: the queue
                is full or moves too slowly for the deadline; `invalid_item`: a sample is larger than any batch, or has
                no group where the model needs one.
        """
        groups = self._grouped(samples) if self.state == "READY" else []
        self.admit(len(samples), len(groups), deadline=deadline, priority=priority)
        if not samples:
            return []
        for places in groups:
            why = self.too_large([samples[place] for place in places])
            if why is not None:
                raise WireError("invalid_item", why, param=f"items[{places[0]}]")
        entries = self._entries(samples, deadline)
        self._queue.push(list(self._units([[entries[place] for place in places] for places in groups], priority)))
        for lane in self._lanes:
            lane.wake.set()
        return [entry.future for entry in entries]

    def admit(self, count: int, groups: int, *, deadline: float, priority: int = 0) -> None:
        """Check, as `submit` does, whether so many samples would be taken now: before they are decoded for nothing.

        Args:
            count: Samples of one request.
            groups: Into how many groups they fall; of meaning to groupwise models alone.
            deadline: As `submit`.
            priority: As `submit`.

        Raises:
            WireError: As `submit`, apart from what is wrong with the samples.
        """
        if self.state != "READY":
            raise self._refusal()
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise WireError("deadline_exceeded", "the deadline passed before the samples could be queued")
        if count:
            self._admit(count, groups, seconds, priority)

    def too_large(self, samples: Sequence[Sample]) -> str | None:
        """Return why a sample, or a group, is more than one call takes; None if it is not."""
        what = f"the group of {len(samples)} samples" if self.info.groupwise else "the item"
        for unit, size, most in (
            ("pixels", sum(sample.pixels for sample in samples), self._batch_pixels),
            ("tokens", sum(sample.tokens for sample in samples), self._batch_tokens),
        ):
            if size > most:
                return (
                    f"{what} has {size} {unit}, more than the {most} that {self.name} takes in one call; send less, or "
                    f"start the server with a larger batch_{unit}"
                )
        return None

    def _units(self, groups: Sequence[Sequence[Entry]], priority: int) -> Iterator[Unit]:
        """Yield what is to be queued; what has killed its worker before goes alone, or gets its answer at once."""
        for entries in groups:
            standing = self._suspects.standing([entry.sample for entry in entries])
            if standing == "guilty":
                why = f"a worker process of {self.name} died or hung over this sample twice; it is not tried again"
                for entry in entries:
                    entry.settle(Scored(error=WireError("scorer_error", why)))
            else:
                yield Unit(entries, priority=priority, alone=self.info.groupwise or standing == "suspect")

    def _grouped(self, samples: Sequence[Sample]) -> list[list[int]]:
        if not self.info.groupwise:
            return [[place] for place in range(len(samples))]
        groups: dict[str, list[int]] = {}
        for place, sample in enumerate(samples):
            if sample.group is None:
                message = f"{self.name} compares samples of one group; give every item its group_id"
                raise WireError("invalid_item", message, param=f"items[{place}].group_id")
            groups.setdefault(sample.group, []).append(place)
        return list(groups.values())

    def _admit(self, count: int, groups: int, seconds: float, priority: int) -> None:
        """Turn a submission away that does not fit, after a second look without what nobody waits for any more."""
        if count > self._limits.queue_items:
            message = f"{count} items at once; {self.name} queues at most {self._limits.queue_items}: send fewer"
            raise WireError("invalid_request", message, param="items")
        for purged in (False, True):
            wait = self._estimate(count, groups, priority)
            full = self._queue.items + count > self._limits.queue_items
            if not full and wait <= seconds:
                return
            if not purged:
                self._queue.purge()
        self._metrics.shed(self.name, "queue_full" if full else "too_slow")
        if not self._open:
            self._pace.doubt()
        if full:
            why = f"{self._queue.items} of {self._limits.queue_items} places in the queue of {self.name} are taken"
            retry = wait
        else:
            why = f"{self.name} would need about {wait:.1f} s and the deadline is in {seconds:.1f} s"
            retry = wait - seconds
        raise WireError("overloaded", why, retry_after_ms=max(50, int(1000 * retry)) if retry else RETRY_MS)

    def _estimate(self, count: int, groups: int, priority: int) -> float:
        now = time.monotonic()
        ready = [lane for lane in self._lanes if lane.state == "READY"]
        running = [now - lane.busy_since for lane in ready if lane.busy_since is not None]
        items, units = self._queue.ahead(priority)
        size, groupwise = self.info.batch_size, self.info.groupwise
        batches = batches_until(items, units, count=count, groups=groups, batch_size=size, groupwise=groupwise)
        return self._pace.until_done(batches=batches, running=running, replicas=len(ready))

    def _entries(self, samples: Sequence[Sample], deadline: float) -> list[Entry]:
        """Make the entries of one submission, which share a timer."""
        loop = asyncio.get_running_loop()
        left = len(samples)

        def expire() -> None:
            for entry in entries:
                if not entry.future.done():
                    message = f"{self.name} did not come to an answer by the deadline"
                    entry.future.set_result(Scored(error=WireError("deadline_exceeded", message)))
            self._queue.purge()

        def closed() -> None:
            nonlocal left
            left -= 1
            self._open -= 1
            if not left:
                timer.cancel()

        timer = loop.call_later(deadline - time.monotonic(), expire)
        entries = [Entry(sample, loop.create_future(), deadline=deadline, closed=closed) for sample in samples]
        self._open += left
        return entries

    def _refusal(self) -> WireError:
        if self.state == "FAILED":
            return next(lane.error for lane in self._lanes if lane.error is not None)
        if self.state == "DRAINING":
            return WireError("draining", f"{self.name} is stopping", retry_after_ms=RETRY_MS)
        return WireError("loading", f"{self.name} is loading", retry_after_ms=RETRY_MS)

    def _refuse_all(self, error: WireError) -> None:
        for entry in self._queue.clear():
            entry.settle(Scored(error=error))

    def _refresh(self) -> None:
        """Work the state out again after a lane has changed its own."""
        state: State = "LOADING"
        if self._stopping:
            state = "DRAINING"
        elif any(lane.state == "READY" for lane in self._lanes):
            state = "READY"
        elif all(lane.state == "FAILED" for lane in self._lanes):
            state = "FAILED"
        told = next((lane.info for lane in self._lanes if lane.info is not None), self.info)
        size = self._batch_size or told.batch_size
        changes = {
            "name": self.name,
            "state": state,
            "limits": self._limits,
            "batch_size": size,
            "batch_pixels": self._batch_pixels,
            "batch_tokens": self._batch_tokens,
        }
        self.info = told.model_copy(update=changes)
        if all(lane.state == "FAILED" for lane in self._lanes):  # also while it stops: nobody will come to what waits
            self._refuse_all(next(lane.error for lane in self._lanes if lane.error is not None))
        if state == self.state:
            return
        self.state = state
        self._metrics.state(self.name, state)
        if state == "LOADING":
            self._known.clear()
        else:
            self._known.set()


def _check_settings(**settings: int | None) -> None:
    for field, value in settings.items():
        if value is not None and value < 1:
            raise WireError("invalid_request", f"{field} is {value}; it must be 1 or more", param=field)
