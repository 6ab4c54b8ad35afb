"""Samples that were in a call when its worker died or hung: tried alone the next time, refused after that.

A client that gets `worker_lost` sends the same samples again. Without a memory of them, the one that kills its worker
would take the others down with it every time, and after three times the model.
"""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

from tiltflow.serving.jobs import Sample

KEPT: Final = 4096  # suspects at a time; the oldest are forgotten
KEPT_SECONDS: Final = 600.0

Standing: TypeAlias = Literal["free", "suspect", "guilty"]


class Suspects:
    """What is known about the samples of one model; a groupwise model's groups count as one sample each."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        """Suspect nothing."""
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[Standing, float]] = OrderedDict()  # digest -> standing, until when
        self._prompts: set[str] = set()  # of those known: another prompt is free without reading its pixels

    def standing(self, samples: Sequence[Sample]) -> Standing:
        """Return what is known about a sample, or a group."""
        if not self._known or not self._prompts.intersection(sample.prompt for sample in samples):
            return "free"
        standing, until = self._known.get(_digest(samples), ("free", 0.0))
        return standing if self._clock() < until else "free"

    def accuse(self, units: Sequence[Sequence[Sample]]) -> bool:
        """Note that the worker of a call did not survive it.

        Args:
            units: The samples of the call, or its only group.

        Returns:
            Whether it is certain now which one was to blame: one that was alone and suspect already.
        """
        until = self._clock() + KEPT_SECONDS
        guilty = len(units) == 1 and self.standing(units[0]) != "free"
        for unit in units:
            digest = _digest(unit)
            self._known[digest] = ("guilty" if guilty else "suspect", until)
            self._known.move_to_end(digest)
            self._prompts.update(sample.prompt for sample in unit)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return guilty

    def acquit(self, samples: Sequence[Sample]) -> None:
        """Note that a call with a sample, or a group, went well."""
        if self.standing(samples) == "free":
            return
        del self._known[_digest(samples)]
        if not self._known:
            self._prompts.clear()


def _digest(samples: Sequence[Sample]) -> bytes:
    """Return a digest of everything that the model sees of the samples."""
    found = hashlib.blake2b(digest_size=16)
    for sample in samples:
        shapes = [(array.dtype.str, array.shape) for array in sample.media]
        told = [sample.prompt, sample.meta, repr(sample.shape_key), repr(shapes)]
        found.update(json.dumps(told, sort_keys=True).encode())
        for array in sample.media:
            found.update(array.tobytes())
    return found.digest()
