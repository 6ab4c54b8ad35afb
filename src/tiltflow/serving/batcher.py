"""What waits for a model, and which of it goes into the next call.

A batch is made only when a replica is free to run it: nobody waits for it to fill, and under load it fills by itself.
"""

import asyncio
import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tiltflow.serving.jobs import Sample, Scored
from tiltflow.serving.wire import WireError

PACE_WEIGHT = 0.1  # of the newest batch in the running average of seconds
SLACK = 0.25  # of an estimate, added to it at least: the next seconds need not be as quiet as the last ones
DOUBT = 0.8
SPREADS = 4.0  # mean absolute deviations that 99 of 100 batches keep within, on a machine that does other things too


class Entry:
    """One sample that waits for its score."""

    __slots__ = ("_close", "born", "deadline", "future", "nbytes", "pixels", "sample", "tokens")

    def __init__(
        self, sample: Sample, future: "asyncio.Future[Scored]", *, deadline: float, closed: Callable[[], None]
    ):
        """Keep a sample.

        Args:
            sample: What to score.
            future: Gets the answer; done or cancelled means that nobody wants one any more.
            deadline: On the monotonic clock, in seconds.
            closed: Called once, when the entry is finished with.
        """
        self.sample = sample
        self.future = future
        self.deadline = deadline
        self.born = time.monotonic()
        self.pixels = sample.pixels
        self.tokens = sample.tokens
        self.nbytes = sample.nbytes
        self._close: Callable[[], None] | None = closed

    def wanted(self, now: float) -> bool:
        """Tell whether somebody still waits for the answer."""
        return not self.future.done() and self.deadline > now

    def settle(self, scored: Scored) -> None:
        """Answer, unless nobody waits, and finish with the entry."""
        if not self.future.done():
            self.future.set_result(scored)
        if self._close is not None:
            self._close()
            self._close = None

    def drop(self) -> None:
        """Finish with an entry that is not wanted."""
        self.settle(Scored(error=WireError("deadline_exceeded", "the deadline passed before the model was free")))


class Unit:
    """What goes into a call whole: one sample, or one group of a groupwise model."""

    __slots__ = ("entries", "key", "nbytes", "pixels", "priority", "tokens")

    def __init__(self, entries: Sequence[Entry], *, priority: int, alone: bool):
        """Keep entries of one submission; in a call of its own they need not share a shape, as those of a group."""
        self.entries = entries
        self.priority = priority
        self.key: tuple[Any, ...] | None = None if alone else entries[0].sample.shape_key
        self.pixels = sum(entry.pixels for entry in entries)
        self.tokens = sum(entry.tokens for entry in entries)
        self.nbytes = sum(entry.nbytes for entry in entries)

    def wanted(self, now: float) -> bool:
        """Tell whether somebody still waits for one of the answers; a group is scored whole or not at all."""
        return any(entry.wanted(now) for entry in self.entries)


class Queue:
    """Units by priority, then by age; a batch is taken from those of one shape."""

    def __init__(self, changed: Callable[[int, int], None]):
        """Make an empty queue.

        Args:
            changed: Told the waiting samples and their bytes after every change.
        """
        self._changed = changed
        self._heaps: dict[tuple[Any, ...] | None, list[tuple[int, int, Unit]]] = {}
        self._items: Counter[int] = Counter()  # priority -> samples
        self._units: Counter[int] = Counter()
        self._pushed = 0
        self.items = 0
        self.nbytes = 0

    def push(self, units: Sequence[Unit]) -> None:
        """Add units behind those of their priority."""
        for unit in units:
            self._pushed += 1
            heapq.heappush(self._heaps.setdefault(unit.key, []), (-unit.priority, self._pushed, unit))
            self._count(unit, 1)
        self._changed(self.items, self.nbytes)

    def pop(self, *, items: int, pixels: int, tokens: int) -> list[Entry]:
        """Take the next batch, which is empty if nothing waits.

        The unit that is first in line always goes, even beyond the limits: they may have shrunk since it was admitted.

        Args:
            items: Most samples.
            pixels: Most pixels of all samples together.
            tokens: Most tokens of all prompts together.
        """
        batch: list[Entry] = []
        while self._heaps and not batch:
            key = min(self._heaps, key=lambda key: self._heaps[key][0][:2])
            batch = self._take(key, items, pixels, tokens)
        self._changed(self.items, self.nbytes)
        return batch

    def _take(self, key: tuple[Any, ...] | None, items: int, pixels: int, tokens: int) -> list[Entry]:
        heap = self._heaps[key]
        batch: list[Entry] = []
        now = time.monotonic()
        while heap:
            unit = heap[0][2]
            if unit.wanted(now):
                full = len(batch) + len(unit.entries) > items or unit.pixels > pixels or unit.tokens > tokens
                if batch and (key is None or full):
                    break
                batch += unit.entries
                pixels -= unit.pixels
                tokens -= unit.tokens
            else:
                self._drop(unit)
            heapq.heappop(heap)
            self._count(unit, -1)
        if not heap:
            del self._heaps[key]
        return batch

    def purge(self) -> None:
        """Drop what nobody waits for any more."""
        now = time.monotonic()
        for key, heap in list(self._heaps.items()):
            kept = [place for place in heap if place[2].wanted(now)]
            if len(kept) < len(heap):
                for _, _, unit in heap:
                    if not unit.wanted(now):
                        self._drop(unit)
                        self._count(unit, -1)
                heapq.heapify(kept)
                self._heaps[key] = kept
            if not kept:
                del self._heaps[key]
        self._changed(self.items, self.nbytes)

    def clear(self) -> Iterator[Entry]:
        """Take everything, in no order."""
        units = [unit for heap in self._heaps.values() for _, _, unit in heap]
        self._heaps.clear()
        for unit in units:
            self._count(unit, -1)
        self._changed(self.items, self.nbytes)
        return (entry for unit in units for entry in unit.entries)

    def ahead(self, priority: int) -> tuple[int, int]:
        """Return the samples and the units that a new one of this priority waits for."""
        before = [other for other in self._items if other >= priority]
        return sum(self._items[other] for other in before), sum(self._units[other] for other in before)

    def _drop(self, unit: Unit) -> None:
        for entry in unit.entries:
            entry.drop()

    def _count(self, unit: Unit, sign: int) -> None:
        count = sign * len(unit.entries)
        self.items += count
        self.nbytes += sign * unit.nbytes
        self._items[unit.priority] += count
        self._units[unit.priority] += sign
        if not self._units[unit.priority]:  # clients choose priorities freely: keep no empty ones
            del self._items[unit.priority], self._units[unit.priority]


class Budget:
    """How much goes into one call: halved when memory runs out, grown back by one sample with every good call."""

    def __init__(self, *, items: int, pixels: int, tokens: int):
        """Start with the whole budget: samples, pixels and tokens."""
        self._items = items
        self._pixels = pixels
        self._tokens = tokens
        self._share = 1.0

    @property
    def items(self) -> int:
        """Return the most samples of a call."""
        return max(1, int(self._items * self._share + 1e-6))

    @property
    def pixels(self) -> int:
        """Return the most pixels of a call."""
        return int(self._pixels * self._share)

    @property
    def tokens(self) -> int:
        """Return the most tokens of a call."""
        return int(self._tokens * self._share)

    def halve(self, batch: Sequence[Entry]) -> None:
        """Allow half of what this batch took, which was too much."""
        pixels, tokens = _sizes(batch)
        taken = max(len(batch) / self._items, pixels / self._pixels, tokens / self._tokens)
        self._share = min(self._share, max(taken / 2, 1 / self._items))

    def grow(self) -> None:
        """Allow one more sample."""
        self._share = min(1.0, self._share + 1 / self._items)

    def fits(self, batch: Sequence[Entry]) -> bool:
        """Tell whether the batch keeps within the budget."""
        pixels, tokens = _sizes(batch)
        return len(batch) <= self.items and pixels <= self.pixels and tokens <= self.tokens


class Pace:
    """A running average of the seconds that a batch takes, and of how far off it is."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.seconds = 0.0
        self._spread = 0.0
        self._batches = 0

    def add(self, seconds: float) -> None:
        """Count one batch; the first one, in which a model warms up, counts only until there is a second."""
        weight = max(PACE_WEIGHT, 1 / max(1, self._batches))
        self._batches += 1
        off = seconds / 2 if self._batches <= 2 else abs(seconds - self.seconds)  # a guess, until it can be known
        self._spread += weight * (off - self._spread)
        self.seconds += weight * (seconds - self.seconds)

    def doubt(self) -> None:
        """Believe less in an estimate that keeps a model from work which has nothing else to do."""
        self.seconds *= DOUBT
        self._spread *= DOUBT

    def until_done(self, *, batches: int, running: Sequence[float], replicas: int) -> float:
        """Estimate the seconds until a sample that comes now is scored, so that 99 of 100 take less.

        Args:
            batches: Batches until it is, its own included.
            running: For each batch that is computed now, the seconds since it was started.
            replicas: How many share the work.

        Returns:
            0 while a replica would take it at once, whatever is known: only that can prove an estimate too high.
        """
        if len(running) < replicas and batches <= 1:
            return 0.0
        left = sum(max(0.0, self.seconds - seconds) for seconds in running)
        count = batches + len(running)
        # A sum of `count` batches strays by the root of `count`, and the average itself is off by its weight's part.
        stray = SPREADS * self._spread * math.sqrt(count + count**2 * PACE_WEIGHT / (2 - PACE_WEIGHT))
        expected = batches * self.seconds + left
        return (expected + max(stray, SLACK * expected)) / max(1, replicas)


def batches_until(items: int, units: int, *, count: int, groups: int, batch_size: int, groupwise: bool) -> int:
    """Return how many calls it takes to come to the end of what waits and of one more request.

    Args:
        items: Samples that wait.
        units: Groups that wait, of a groupwise model.
        count: Samples of the request, at least 1.
        groups: Groups of the request.
        batch_size: Samples of a full batch.
        groupwise: One call a group.
    """
    return units + groups if groupwise else (items + count - 1) // batch_size + 1


def _sizes(batch: Sequence[Entry]) -> tuple[int, int]:
    """Return the pixels and the tokens of a batch."""
    return sum(entry.pixels for entry in batch), sum(entry.tokens for entry in batch)
