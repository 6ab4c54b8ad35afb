"""One replica's share of the work: takes batches from the queue, and sees to it that every sample is answered.

An error is traced to the samples that cause it by halving the batch: 64 samples of which one fails take 13 calls. A
batch that needs too much memory is halved too, and the next ones start smaller.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from tiltflow.serving.batcher import Budget, Entry, Pace, Queue
from tiltflow.serving.jobs import Sample, Scored, ScorerSource
from tiltflow.serving.metrics import Metrics
from tiltflow.serving.replica import LOST, OVERDUE, Answer, Replica
from tiltflow.serving.suspects import Suspects
from tiltflow.serving.wire import CODES, ModelInfo, WireError

_log = logging.getLogger(__name__)

LaneState: TypeAlias = Literal["LOADING", "READY", "FAILED"]


class Lane:
    """Runs the batches of one replica, one after the other."""

    def __init__(
        self,
        name: str,
        source: ScorerSource,
        *,
        queue: Queue,
        pace: Pace,
        suspects: Suspects,
        batch_size: int | None,
        batch_pixels: int,
        batch_tokens: int,
        batch_seconds: float,
        load_seconds: float,
        metrics: Metrics,
        changed: Callable[[], None],
    ):
        """Describe a lane; `start` runs it.

        Args:
            name: Of the model.
            source: How the worker makes it.
            queue: Of the model, shared by its lanes.
            pace: Of the model, shared by its lanes.
            suspects: Of the model, shared by its lanes.
            batch_size: Most samples of one call; None takes the model's own.
            batch_pixels: Most pixels of one call.
            batch_tokens: Most tokens of one call.
            batch_seconds: How long one call may take.
            load_seconds: How long the making of the model may take.
            metrics: Told of every call.
            changed: Called after every change of `state`.
        """
        self.state: LaneState = "LOADING"
        self.info: ModelInfo | None = None
        self.error: WireError | None = None  # why it has failed
        self.busy_since: float | None = None
        self.wake = asyncio.Event()  # something was queued, or the worker was lost
        self._name = name
        # Whoever a model asks may be slow about any sample: only a worker's death is that of the samples it died with.
        self._incriminating = (LOST,) if source.remote else (LOST, OVERDUE)
        self._replica = Replica(name, source, load_seconds=load_seconds, lost=self.wake.set)
        self._queue = queue
        self._pace = pace
        self._suspects = suspects
        self._batch_size = batch_size
        self._batch_pixels = batch_pixels
        self._batch_tokens = batch_tokens
        self._batch_seconds = batch_seconds
        self._metrics = metrics
        self._changed = changed
        self._budget = self._new_budget(1)  # the real one needs the model's batch size
        self._running: Sequence[Entry] = ()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the worker, and then the work."""
        self._task = asyncio.create_task(self._run())

    async def stop(self, refusal: WireError, *, seconds: float) -> None:
        """End the work and the worker.

        Args:
            refusal: Answers what is in the middle of a call.
            seconds: For the worker to end by itself; none while it is in a call.
        """
        busy = self.busy_since is not None or self.state == "LOADING"
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for entry in self._running:
            entry.settle(Scored(error=refusal))
        await self._replica.stop(seconds=0.0 if busy else seconds)

    async def _run(self) -> None:
        try:
            self._ready(await self._replica.start())
            while True:
                while self._replica.alive:
                    await self._work()
                self._become("LOADING")
                self._metrics.restart(self._name)
                self._ready(await self._replica.restart())
        except WireError as error:
            self.error = error
            self._become("FAILED")
        except Exception as error:  # a mistake of this package: whoever waits must be told, not left waiting
            _log.exception("the lane of %s broke", self._name)
            self.error = WireError("model_failed", f"{self._name}: {type(error).__name__}: {error}")
            self._become("FAILED")

    def _ready(self, info: ModelInfo) -> None:
        self.info = info
        self._budget = self._new_budget(self._batch_size or info.batch_size)
        self._become("READY")

    def _new_budget(self, items: int) -> Budget:
        return Budget(items=items, pixels=self._batch_pixels, tokens=self._batch_tokens)

    def _become(self, state: LaneState) -> None:
        self.state = state
        self._changed()

    async def _work(self) -> None:
        """Run the next batch, or wait until there may be one."""
        self.wake.clear()
        batch = self._queue.pop(items=self._budget.items, pixels=self._budget.pixels, tokens=self._budget.tokens)
        if not batch:
            await self.wake.wait()
            return
        self._running = batch
        self.busy_since = time.monotonic()
        try:
            await self._score(batch)
        except Exception as error:  # the lane must go on: a sample that cannot be sent, or no memory for its pixels
            _log.exception("a batch of %s could not be sent", self._name)
            failed = WireError("internal_error", f"{self._name}: {type(error).__name__}: {error}")
            for entry in batch:
                entry.settle(Scored(error=failed))
        if self._replica.alive:  # the time until a worker is given up says nothing about the model
            self._pace.add(time.monotonic() - self.busy_since)
        self.busy_since = None
        self._running = ()

    async def _score(self, batch: Sequence[Entry]) -> None:
        """Answer every sample of a batch."""
        whole = self._whole
        parts = deque([batch])
        again = False  # the part before was too much for the memory and could not be halved
        while parts:
            part = self._wanted(parts.popleft(), whole)
            if not part:
                continue
            if not whole and len(part) > 1 and not self._budget.fits(part):
                parts.extendleft(_halves(part))
                continue
            answer, begun = await self._call(part)
            if answer.kind == "oom":
                self._budget.halve(part)
                if (whole or len(part) == 1) and not again:
                    again = True
                    parts.appendleft(part)
                    continue
            again = False
            if answer.kind == "scores":
                self._budget.grow()
                for unit in self._samples(part):
                    self._suspects.acquit(unit)
                self._assign(part, answer, begun)
            elif answer.kind in ("oom", "scorer_error") and len(part) > 1 and not whole:
                parts.extendleft(_halves(part))
            else:
                if answer.kind in self._incriminating and answer.begun:
                    answer = await self._accuse(part, answer)
                self._fail(part, answer)

    @property
    def _whole(self) -> bool:
        return self.info is not None and self.info.groupwise

    def _samples(self, part: Sequence[Entry]) -> list[list[Sample]]:
        """Return what the calls of a part stand or fall with: its samples, or its only group."""
        samples = [entry.sample for entry in part]
        return [samples] if self._whole else [[sample] for sample in samples]

    async def _accuse(self, part: Sequence[Entry], answer: Answer) -> Answer:
        """Note whom the worker died with; one that was to blame for sure gets an answer that is final."""
        if not await self._suspects.accuse(self._samples(part)):
            return answer
        self._replica.excuse()
        return Answer("scorer_error", f"{answer.message}; it is the second time with this sample, and it was alone")

    def _wanted(self, part: Sequence[Entry], whole: bool) -> Sequence[Entry]:
        """Leave out what nobody waits for any more; a group stays whole while one of it is wanted."""
        now = time.monotonic()
        wanted = [entry for entry in part if entry.wanted(now)]
        if wanted and whole:
            return part
        for entry in part:
            if not entry.wanted(now):
                entry.drop()
        return wanted

    async def _call(self, part: Sequence[Entry]) -> tuple[Answer, float]:
        begun = time.monotonic()
        answer = await self._replica.call([entry.sample for entry in part], seconds=self._batch_seconds)
        self._metrics.batch(self._name, len(part), time.monotonic() - begun)
        return answer, begun

    def _assign(self, part: Sequence[Entry], answer: Answer, begun: float) -> None:
        for place, (entry, score) in enumerate(zip(part, answer.scores, strict=True)):
            error = None
            if str(place) in answer.failures:
                code, message = answer.failures[str(place)]
                error = WireError(code, message)
            elif score is None:
                self._metrics.nonfinite(self._name)
                error = WireError("nonfinite_score", f"{self._name} gave a score that is not a finite float32")
            waited = begun - entry.born
            self._metrics.queue_wait(self._name, waited)
            components = {name: values[place] for name, values in answer.components.items()}
            entry.settle(
                Scored(
                    score=None if error else score,
                    components=components,
                    error=error,
                    batch_size=len(part),
                    queue_ms=1000 * waited,
                    compute_ms=1000 * answer.seconds,
                )
            )

    def _fail(self, part: Sequence[Entry], answer: Answer) -> None:
        code, message = answer.kind, answer.message
        if code == "oom":
            code, message = "scorer_error", f"{self._name} ran out of memory with {len(part)} samples: {message}"
        if code not in CODES:
            code, message = "internal_error", f"the worker process answered {code!r}"
        for entry in part:
            entry.settle(Scored(error=WireError(code, message), batch_size=len(part)))


def _halves(part: Sequence[Entry]) -> tuple[Sequence[Entry], Sequence[Entry]]:
    """Return both halves, the second one first: as `extendleft` wants them."""
    middle = (len(part) + 1) // 2
    return part[middle:], part[:middle]
