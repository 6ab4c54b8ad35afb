"""Samples that were in a call when its worker died or hung: tried alone the next time, refused after that.

A client that gets `worker_lost` sends the same samples again. Without a memory of them, the one that kills its worker
would take the others down with it every time, and after three times the model.
"""

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from tiltflow.serving.jobs import THREAD_BYTES, Sample

KEPT: Final = 4096  # suspects at a time; the oldest are forgotten
KEPT_SECONDS: Final = 600.0
GLANCED: Final = 64  # values of a picture: the samples of one prompt differ in them

Standing: TypeAlias = Literal["free", "suspect", "guilty"]


@dataclass(frozen=True)
class _Record:
    standing: Standing
    until: float  # of the clock
    glance: int


class Suspects:
    """What is known about the samples of one model; a groupwise model's groups count as one sample each."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        """Suspect nothing."""
        self._clock = clock
        self._known: OrderedDict[bytes, _Record] = OrderedDict()  # by digest, the oldest first
        self._glances: Counter[int] = Counter()  # of those known: what looks different need not be read

    def __len__(self) -> int:
        return len(self._known)

    def standing(self, samples: Sequence[Sample]) -> Standing:
        """Return what is known about a sample, or a group."""
        if not self._looks_known(samples):
            return "free"
        record = self._known.get(_digest(samples))
        return record.standing if record is not None and self._clock() < record.until else "free"

    async def recognize(self, units: Sequence[Sequence[Sample]]) -> None:
        """Read what looks like a suspect beforehand, in a thread where it is large: then `standing` only looks it up.

        Args:
            units: Samples, or groups.
        """
        await _read([sample for unit in units if self._looks_known(unit) for sample in unit])

    async def accuse(self, units: Sequence[Sequence[Sample]]) -> bool:
        """Note that the worker of a call did not survive it.

        Args:
            units: The samples of the call, or its only group.

        Returns:
            Whether it is certain now which one was to blame: one that was alone and suspect already.
        """
        await _read([sample for unit in units for sample in unit])
        now = self._clock()
        guilty = len(units) == 1 and self.standing(units[0]) != "free"
        for unit in units:
            digest = _digest(unit)
            self._forget(digest)
            self._known[digest] = _Record("guilty" if guilty else "suspect", now + KEPT_SECONDS, _glance(unit))
            self._glances[self._known[digest].glance] += 1
        while len(self._known) > KEPT or next(iter(self._known.values())).until <= now:
            self._forget(next(iter(self._known)))
        return guilty

    def acquit(self, samples: Sequence[Sample]) -> None:
        """Note that a call with a sample, or a group, went well."""
        if self.standing(samples) != "free":
            self._forget(_digest(samples))

    def _looks_known(self, samples: Sequence[Sample]) -> bool:
        return bool(self._glances) and _glance(samples) in self._glances

    def _forget(self, digest: bytes) -> None:
        record = self._known.pop(digest, None)
        if record is not None:
            self._glances[record.glance] -= 1
            if not self._glances[record.glance]:
                del self._glances[record.glance]


def _glance(samples: Sequence[Sample]) -> int:
    """Return a hash of the prompts and of some values of each picture."""
    seen = [array.reshape(-1)[:: max(1, array.size // GLANCED)].tobytes() for each in samples for array in each.media]
    return hash((*(sample.prompt for sample in samples), *seen))


def _digest(samples: Sequence[Sample]) -> bytes:
    """Return a digest of everything that the model sees of the samples."""
    return hashlib.blake2b(b"".join(sample.digest for sample in samples), digest_size=16).digest()


async def _read(samples: Sequence[Sample]) -> None:
    """Digest samples in a thread, where they are large."""
    if sum(sample.nbytes for sample in samples) >= THREAD_BYTES:
        await asyncio.get_running_loop().run_in_executor(None, lambda: [sample.digest for sample in samples])
