"""Which examples make which batch: the same sets for any number of processes, every example exactly once an epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiltflow.errors import ConfigError, DataError, GeometryError
from tiltflow.runtime.randomness import derive_seed


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one process sees.

    Example: `MicroBatch((7, 3, 3), (1.0, 1.0, 0.0))` holds the examples 7 and 3, and a row that only fills up.
    """

    places: tuple[int, ...]
    weights: tuple[float, ...]  # 1, or 0 for a row that only fills up


@dataclass(frozen=True)
class Step:
    """This process's part of one global batch."""

    number: int  # counted from 0 over the run
    micro_batches: tuple[MicroBatch, ...]  # as many on every process, of as many rows


class Batches:
    """Cuts a data set into global batches, equal shares of the processes, and micro-batches.

    The examples of a global batch follow from seed, epoch and step alone. They are dealt out by length, longest first,
    one to each process in turn, so that all processes meet rows of about one length at one time and cut their shares
    in the same places: the same number of forward passes everywhere. A batch whose size the number of processes does
    not divide, such as the last one of an epoch, is filled up with rows of weight 0.

    Args:
        lengths: What each example costs, at least 1: tokens of its texts, or 1 where all cost the same.
        batch_size: Examples of a global batch, over all processes.
        micro_batch_size: Rows of a forward pass of one process at most; None for a share as a whole.
        max_tokens: Rows times the longest length of a forward pass at most; a longer row is alone. None for no limit.
        seed: Seeds the order, which is another one each epoch. None keeps the order of the data, whatever its lengths.
        length_window: In every so many global batches in a row examples are put together by length, and the batches
            then shuffled; below 2 leaves them as they were drawn.
        limit: The first so many examples of the order at most.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        DataError: There is no example.
        ConfigError: A size is below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        length_window: int = 0,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(lengths) == 0:
            raise DataError("the data set holds no example, so no batch can be made of it; look at what was left out")
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "max_tokens": max_tokens}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"{name}={size}: use at least 1")
        if batch_size < world_size:
            raise GeometryError(
                f"batch_size={batch_size} is the number of examples of a step over all processes, of which there are "
                f"{world_size}; nearest legal: {world_size} or {2 * world_size}"
            )
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens
        self.seed = seed
        self.length_window = length_window
        self.count = len(lengths) if limit is None else min(limit, len(lengths))  # examples of an epoch
        self.rank = rank
        self.world_size = world_size
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the last one not always full."""
        return -(-self.count // self.batch_size)

    def samples(self, steps: int) -> int:
        """Return how many examples so many steps from the start consume; rows that fill up do not count."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.count + min(rest * self.batch_size, self.count)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps from `start` to `stop - 1`, counted from 0 over the run."""
        for number in range(start, stop):
            yield self.step(number)

    def epoch(self, epoch: int = 0) -> Iterator[Step]:
        """Yield the steps of one epoch, counted from 0."""
        return self.steps(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)

    def step(self, number: int) -> Step:
        """Return this process's part of a step, counted from 0 over the run."""
        epoch, index = divmod(number, self.steps_per_epoch)
        places = self._places(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        longest_first = places[np.argsort(-self._lengths[places], kind="stable")]
        filled = -len(places) % self.world_size
        rows = np.concatenate([longest_first, np.repeat(longest_first[-1:], filled)])
        weights = np.concatenate([np.ones(len(places)), np.zeros(filled)])
        # A rung is one row for each process; the first of its rows is the longest.
        rungs = rows.reshape(-1, self.world_size)
        own_weights = weights.reshape(-1, self.world_size)[:, self.rank].tolist()
        own = rungs[:, self.rank].tolist()
        cuts = self._cuts(self._lengths[rungs[:, 0]].tolist())
        return Step(number, tuple(MicroBatch(tuple(own[a:b]), tuple(own_weights[a:b])) for a, b in cuts))

    def _cuts(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Cut rows, longest first, into micro-batches; return where each begins and ends."""
        cuts: list[tuple[int, int]] = []
        start = 0
        while start < len(lengths):
            size = self.micro_batch_size or len(lengths)
            if self.max_tokens is not None:
                size = min(size, max(1, self.max_tokens // lengths[start]))
            cuts.append((start, min(start + size, len(lengths))))
            start += size
        return cuts

    def _places(self, epoch: int) -> NDArray[np.int64]:
        """Return the examples of an epoch in their order, `[count]`."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._ordered(epoch))
        return self._order[1]

    def _ordered(self, epoch: int) -> NDArray[np.int64]:
        if self.seed is None:
            return np.arange(self.count)
        draws = np.random.default_rng(derive_seed(self.seed, "batches", epoch))
        order = draws.permutation(len(self._lengths))[: self.count]
        if self.length_window < 2:
            return order
        # The batch that is not full stays last, and is no special one.
        full = self.count // self.batch_size
        batches: list[NDArray[np.int64]] = []
        for first in range(0, full, self.length_window):
            window = order[first * self.batch_size : min(first + self.length_window, full) * self.batch_size]
            by_length = window[np.argsort(self._lengths[window], kind="stable")].reshape(-1, self.batch_size)
            batches.extend(by_length[draws.permutation(len(by_length))])
        return np.concatenate([*batches, order[full * self.batch_size :]])
