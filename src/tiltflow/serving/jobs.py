"""What the HTTP process hands to a model's worker process, and what comes back."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tiltflow.serving.wire import ModelInfo, Pixels, WireError

THREAD_BYTES = 4 * 2**20  # more is copied or read in a thread: the loop has other clients


@dataclass(frozen=True)
class Sample:
    """One decoded item of a request.

    A picture is levels `[H, W, 3]` uint8 or values in [0, 1] `[3, H, W]` float32; a video has one more axis in front.
    """

    prompt: str = ""
    image: Pixels | None = None
    video: Pixels | None = None
    condition_images: Sequence[Pixels] | None = None
    condition_videos: Sequence[Pixels] | None = None
    meta: Mapping[str, Any] | None = None
    group: str | None = None  # unique over all requests; a groupwise model gets all samples of one group in one call
    _digest: bytes = field(default=b"", init=False, repr=False, compare=False)

    @property
    def media(self) -> list[Pixels]:
        """Return every array of the sample."""
        single = [array for array in (self.image, self.video) if array is not None]
        return [*single, *(self.condition_images or ()), *(self.condition_videos or ())]

    @property
    def pixels(self) -> int:
        """Return how many pixels the sample has in all, for the budget of a batch."""
        return sum(array.size // 3 for array in self.media)

    @property
    def tokens(self) -> int:
        """Return about how many tokens the prompt has, at four bytes each, for the budget of a batch."""
        return -(-len(self.prompt.encode(errors="surrogatepass")) // 4)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays."""
        return sum(array.nbytes for array in self.media)

    @property
    def digest(self) -> bytes:
        """Return a digest of everything that the model sees of the sample; it is computed once."""
        if not self._digest:
            found = hashlib.blake2b(digest_size=16)
            shapes = [(array.dtype.str, array.shape) for array in self.media]
            told = [self.prompt, self.meta, repr(self.shape_key), repr(shapes)]
            found.update(json.dumps(told, sort_keys=True, default=repr).encode())
            for array in self.media:
                found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            object.__setattr__(self, "_digest", found.digest())
        return self._digest

    @property
    def shape_key(self) -> tuple[Any, ...]:
        """Return what the samples of one batch have in common: their fields, and each array's shape and dtype."""

        def key(array: Pixels) -> tuple[Any, ...]:
            return (array.dtype == np.uint8, *array.shape)

        return (
            None if self.image is None else key(self.image),
            None if self.video is None else key(self.video),
            None if self.condition_images is None else tuple(map(key, self.condition_images)),
            None if self.condition_videos is None else tuple(map(key, self.condition_videos)),
            self.meta is not None,
        )


@dataclass(frozen=True)
class Scored:
    """One model's answer about one sample: a finite score, or why there is none."""

    score: float | None = None
    components: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: WireError | None = None
    batch_size: int = 0  # samples in the call that scored it
    queue_ms: float = 0.0
    compute_ms: float = 0.0


class Scorer(Protocol):
    """A model as its worker process sees it; made there and never sent anywhere."""

    def describe(self) -> ModelInfo:
        """Return its name, revision, preprocessing, dtype, fields and batch size."""
        ...

    def score(
        self, samples: Sequence[Sample]
    ) -> tuple[Sequence[float], Mapping[str, Sequence[Any]], Mapping[int, str | WireError]]:
        """Score samples of one shape key, or exactly one group of a groupwise model.

        Returns:
            B scores, components (key -> B values), and failures (place in the batch -> why; a text is told as
            `scorer_error`). What is not finite in a component is told as null.

        Raises:
            WireError: Every sample of the call failed for this reason; anything else that is raised is a
                `scorer_error` of the sample that causes it, which is found by calling again with parts of the batch.
        """
        ...


@dataclass(frozen=True)
class ScorerSource:
    """How a worker process makes its scorer; sent to it by the process that starts it, so both must be importable."""

    factory: Callable[..., Scorer]  # of a module's top level
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    # The arrays that the scorer gets are read-only and hold only until `score` returns, because their memory is used
    # again: right for a scorer that converts them. False gives it arrays of its own.
    borrows: bool = False
    # It asks another process or machine: a call that takes too long says nothing about the samples of that call.
    remote: bool = False
