"""Memory that the HTTP process and one worker share, through which the pixels of a batch travel.

It is a file without a name: the kernel frees it when the last process that has it open ends, however that ends. It is
not under /dev/shm either, which containers often limit to 64 MiB.
"""

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from tiltflow.serving.jobs import Sample
from tiltflow.serving.wire import Pixels

ALIGNMENT = 64
PAGE = 2**20  # the file grows by multiples of it
LOOK_EVERY = 64  # batches, after which memory that none of them needed goes back to the system
SPARE = 16 * 2**20  # bytes that are kept all the same

Spec = list[Any]  # ["u1" or "f4", *shape] of one array
Layout = list[Any]  # image, video, condition images, condition videos of one sample: None, a Spec or a list of them


class Arena:
    """One writer, one reader, one batch at a time."""

    def __init__(self, descriptor: int, *, writable: bool):
        """Take over the file's descriptor; `close` gives it back."""
        self._descriptor = descriptor
        self._writable = writable
        self._map: mmap.mmap | None = None
        self._copy = bytearray()  # the reader's own memory
        self._loan: weakref.ref[Pixels] | None = None  # alive while an array in `_copy` is
        self._puts = 0  # batches since the last look at what is needed
        self._peak = 0  # bytes of the largest batch since then
        self._touched = 0  # bytes that a batch has been written to
        self.size = 0  # bytes that are mapped
        self.used = 0  # bytes of the batch that was put last

    @staticmethod
    def create() -> "Arena":
        """Return the writer's end of an empty one; its reader's end is what a spawned process gets as an argument."""
        if sys.platform == "linux":
            return Arena(os.memfd_create("tiltflow"), writable=True)
        with tempfile.TemporaryFile() as file:
            return Arena(os.dup(file.fileno()), writable=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (DupFd(self._descriptor),)

    def close(self) -> None:
        """Forget the memory; arrays that still show it keep it until they are gone."""
        self._map = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def put(self, samples: Sequence[Sample]) -> list[Layout]:
        """Copy the arrays of a batch into the memory, over what was there.

        Returns:
            Where `take` finds them: one layout for each sample, or a single one that holds for all.

        Raises:
            OSError: There is no memory.
        """
        arrays = [array for sample in samples for array in sample.media]
        self.used = sum(_aligned(array.nbytes) for array in arrays)
        self._reserve(self.used)
        offset = 0
        for array in arrays:
            np.copyto(np.ndarray(array.shape, _kind(array), buffer=self._map, offset=offset), array)
            offset += _aligned(array.nbytes)
        self._let_go()
        layouts = [_layout(sample) for sample in samples]
        return layouts[:1] if layouts.count(layouts[0]) == len(layouts) else layouts

    def take(self, layouts: list[Layout], count: int, *, size: int, used: int, borrow: bool) -> list[dict[str, Any]]:
        """Find the arrays of a batch.

        Args:
            layouts: What `put` returned.
            count: How many samples.
            size: The writer's `size`.
            used: The writer's `used`.
            borrow: Return read-only views of the memory, which the next batch overwrites, instead of copies.

        Returns:
            The pixel fields of each `Sample`.
        """
        self._map_to(size)
        buffer = (self._map or b"") if borrow else self._copied(used)
        offset = 0

        def array(spec: Spec) -> Pixels:
            nonlocal offset
            found = np.ndarray(tuple(spec[1:]), spec[0], buffer=buffer, offset=offset)
            offset += _aligned(found.nbytes)
            return found

        def fields(layout: Layout) -> dict[str, Any]:
            image, video, images, videos = layout
            return {
                "image": None if image is None else array(image),
                "video": None if video is None else array(video),
                "condition_images": None if images is None else [array(spec) for spec in images],
                "condition_videos": None if videos is None else [array(spec) for spec in videos],
            }

        return [fields(layout) for layout in (layouts * count if len(layouts) == 1 else layouts)]

    def _copied(self, used: int) -> Pixels:
        """Copy the batch into memory that is used again as soon as no array shows it: fresh pages cost ten times more.

        Numpy gives all arrays made from the returned one that one as their base, so it lives as long as any of them.
        """
        kept = self._loan is not None and self._loan() is not None
        wasteful = self._needed(used, held=len(self._copy)) is not None
        if kept or wasteful or len(self._copy) < used:
            self._copy = bytearray(used)
        loan = np.frombuffer(self._copy, np.uint8)
        self._loan = weakref.ref(loan)
        if self._map is not None:
            loan[:used] = np.frombuffer(self._map, np.uint8, used)
        return loan

    def _reserve(self, size: int) -> None:
        if size > self.size:
            size = -(-max(size, self.size * 3 // 2) // PAGE) * PAGE
            os.ftruncate(self._descriptor, size)
            self._map_to(size)

    def _needed(self, used: int, *, held: int) -> int | None:
        """Count a batch; every so many of them, return what the largest needed, if far more than that is held."""
        self._puts += 1
        self._peak = max(self._peak, used)
        if self._puts < LOOK_EVERY:
            return None
        peak, self._puts, self._peak = self._peak, 0, 0
        return peak if held > 4 * peak + SPARE else None

    def _let_go(self) -> None:
        """Give memory back that a large batch took once; the mapping stays, and is filled again when it is written."""
        self._touched = max(self._touched, self.used)
        needed = self._needed(self.used, held=self._touched)
        if needed is not None and sys.platform == "linux" and self._map is not None:
            kept = -(-needed // PAGE) * PAGE
            self._map.madvise(mmap.MADV_REMOVE, kept, self.size - kept)
            self._touched = kept

    def _map_to(self, size: int) -> None:
        if size > self.size:
            access = mmap.ACCESS_WRITE if self._writable else mmap.ACCESS_READ
            self._map = mmap.mmap(self._descriptor, size, access=access)
            self.size = size


def _attach(handle: Any) -> Arena:
    return Arena(handle.detach(), writable=False)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _kind(array: Pixels) -> str:
    return array.dtype.str[1:]  # without the byte order, which is the machine's own in the arena


def _layout(sample: Sample) -> Layout:
    def spec(array: Pixels) -> Spec:
        return [_kind(array), *array.shape]

    return [
        None if sample.image is None else spec(sample.image),
        None if sample.video is None else spec(sample.video),
        None if sample.condition_images is None else [spec(array) for array in sample.condition_images],
        None if sample.condition_videos is None else [spec(array) for array in sample.condition_videos],
    ]
