"""From the body of a request to its samples: the three content types, and everything that can be wrong with them.

An error of the whole request is raised; an error of one item stands in its place among the samples.
"""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from tiltflow.serving.jobs import Sample
from tiltflow.serving.multipart import read_parts
from tiltflow.serving.pictures import Budget, check_size, decode, decode_base64, stack_frames
from tiltflow.serving.wire import (
    JSON,
    MULTIPART,
    REQUEST,
    SAFETENSORS,
    Item,
    Limits,
    Media,
    Pixels,
    ScoreRequest,
    Video,
    WireError,
    read_request,
    unpack_safetensors,
)

DECODE_THREADS: Final = 2
INLINE_BYTES: Final = 65_536  # a smaller body is read sooner than handed to a thread
META_DEPTH: Final = 3  # where `meta` stands in a request: of the request, its items, an item

Read: TypeAlias = Sample | WireError
Admit: TypeAlias = Callable[[ScoreRequest], None]
Hold: TypeAlias = Callable[[int], None]
Sources: TypeAlias = Mapping[str, Pixels | bytes]  # tensors and encoded pictures that came beside the JSON


@dataclass(frozen=True)
class Parsed:
    """A request and its samples, or why an item is none."""

    request: ScoreRequest
    samples: Sequence[Read]  # one per item


class RequestReader:
    """Reads bodies; large ones and encoded pictures in threads."""

    def __init__(self, limits: Limits):
        """Take the limits."""
        self._limits = limits
        self._pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        self._requests = 0

    async def read(self, body: bytes, content_type: str, *, admit: Admit, hold: Hold) -> Parsed:
        """Read the body of `POST /v1/score`.

        Args:
            body: All of it.
            content_type: The header.
            admit: Called before any picture is decoded; raises where that would be for nothing.
            hold: Counts the bytes of decoded pictures among those of all requests, or raises.

        Raises:
            WireError: The request is wrong as a whole; `param` names the field. Or that of `admit` or `hold`.
        """
        request, sources = await self.parse(len(body), _parse, body, content_type)
        return await self.samples(request, sources, admit=admit, hold=hold)

    async def samples(self, request: ScoreRequest, sources: Sources, *, admit: Admit, hold: Hold) -> Parsed:
        """Turn the items of a request into samples.

        Raises:
            WireError: As `read`.
        """
        self._check(request)
        admit(request)
        self._requests += 1
        builder = _Builder(request, sources, self._limits, scope=self._requests, hold=hold)
        encoded = builder.encoded()
        await self._decode(builder, list(encoded.items()))
        if builder.is_quick:
            return Parsed(request, builder.samples())
        return Parsed(request, await self.run(builder.samples))

    async def parse(self, size: int, function: Any, *arguments: Any) -> Any:
        """Run a function that reads `size` bytes: in a thread if they are many."""
        return function(*arguments) if size < INLINE_BYTES else await self.run(function, *arguments)

    async def run(self, function: Any, *arguments: Any) -> Any:
        """Run a function of bytes in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _decode(self, builder: "_Builder", encoded: list[tuple[str, bytes | str]]) -> None:
        if not encoded:
            return
        shares = [encoded[start::DECODE_THREADS] for start in range(min(DECODE_THREADS, len(encoded)))]
        await asyncio.gather(*(self.run(builder.decode, share) for share in shares))

    def _check(self, request: ScoreRequest) -> None:
        limits = self._limits
        if not request.items:
            raise WireError("invalid_request", "items is empty; send at least one", param="items")
        if len(request.items) > limits.items:
            message = f"{len(request.items)} items; one request may have {limits.items}"
            raise WireError("payload_too_large", message, param="items")
        if request.params:
            raise WireError("invalid_request", "params must be empty in this version", param="params")
        for index, item in enumerate(request.items):
            if item.meta:
                _check_plain(item.meta, f"items[{index}].meta", depth=limits.json_depth - META_DEPTH)


class _Builder:
    """Makes the samples of one request."""

    def __init__(self, request: ScoreRequest, sources: Sources, limits: Limits, *, scope: int, hold: Hold):
        self._request = request
        self._sources = sources
        self._limits = limits
        self._scope = scope
        self._hold = hold
        self._budget = Budget(limits.decoded_bytes, hold=hold)
        self._decoded: dict[str, Pixels | WireError] = {}
        self._stacked = 0  # bytes of the videos that were made of single pictures

    @property
    def is_quick(self) -> bool:
        """Tell whether `samples` neither looks at many values nor copies many."""
        values = sum(
            source.nbytes
            for source in self._sources.values()
            if isinstance(source, np.ndarray) and source.dtype == np.float32
        )
        return values < INLINE_BYTES and not any(
            isinstance(video, list)
            for item in self._request.items
            for video in (item.video, *(item.condition_videos or ()))
        )

    def encoded(self) -> dict[str, bytes | str]:
        """Return every encoded picture once, by its key, after checking that each reference has a target."""
        found: dict[str, bytes | str] = {}
        used: dict[str, set[int | None]] = {}
        for param, media in _all_media(self._request.items):
            if media.ref is None:
                found[param] = media.b64 or ""
                continue
            source = self._source(media, param)
            used.setdefault(media.ref, set()).add(media.index)
            if isinstance(source, bytes):
                found[media.ref] = source
        self._check_use(used)
        return found

    def _source(self, media: Media, param: str) -> Pixels | bytes:
        """Return what a reference stands for, which has the row that it names."""
        source = self._sources.get(media.ref or "")
        if source is None:
            message = f"{param}: ref is {media.ref!r}; the body has {_some(self._sources)}"
            raise WireError("invalid_item", message, param=f"{param}.ref")
        if media.index is not None:
            rows = 0 if isinstance(source, bytes) else len(source)
            if media.index >= rows:
                message = f"{param}: index is {media.index}; {media.ref!r} has {rows or 'no'} rows"
                raise WireError("invalid_item", message, param=f"{param}.index")
        return source

    def decode(self, encoded: Sequence[tuple[str, bytes | str]]) -> None:
        """Decode pictures; runs in a thread."""
        for key, data in encoded:
            try:
                raw = decode_base64(data, param=key) if isinstance(data, str) else data
                self._decoded[key] = decode(raw, limits=self._limits, budget=self._budget, param=key)
            except WireError as error:
                if error.code in ("payload_too_large", "overloaded"):  # of the request as a whole
                    raise
                self._decoded[key] = error

    def samples(self) -> list[Read]:
        found: list[Read] = []
        total = 0
        for index, item in enumerate(self._request.items):
            try:
                sample = self._sample(item, f"items[{index}]")
            except _ItemError as error:
                found.append(error.told)
                continue
            total += sample.nbytes  # a picture counts as often as it is used: each use is a copy later on
            if total > self._limits.decoded_bytes:
                raise self._too_large(f"items[{index}]")
            found.append(sample)
        return found

    def _too_large(self, param: str) -> WireError:
        message = f"the pictures are more than the {self._limits.decoded_bytes} bytes that one request may have"
        return WireError("payload_too_large", message, param=param)

    def _sample(self, item: Item, param: str) -> Sample:
        prompt = item.prompt or ""
        if len(prompt) * 4 > self._limits.prompt_bytes and len(prompt.encode()) > self._limits.prompt_bytes:
            message = f"{param}.prompt: longer than {self._limits.prompt_bytes} bytes"
            raise _ItemError(WireError("invalid_item", message, param=f"{param}.prompt"))
        return Sample(
            prompt=prompt,
            image=None if item.image is None else self._picture(item.image, f"{param}.image"),
            video=None if item.video is None else self._video(item.video, f"{param}.video"),
            condition_images=None
            if item.condition_images is None
            else [
                self._picture(media, f"{param}.condition_images[{place}]")
                for place, media in enumerate(item.condition_images)
            ],
            condition_videos=None
            if item.condition_videos is None
            else [
                self._video(video, f"{param}.condition_videos[{place}]")
                for place, video in enumerate(item.condition_videos)
            ],
            meta=item.meta,
            group=None if item.group_id is None else f"{self._scope}:{item.group_id}",
        )

    def _picture(self, media: Media, param: str) -> Pixels:
        source = self._sources.get(media.ref) if media.ref is not None else None
        if isinstance(source, np.ndarray):
            return self._tensor(source, media, param, frames=False)
        decoded = self._decoded[param if media.ref is None else media.ref]
        if isinstance(decoded, WireError):  # told of this item, whichever one the picture was decoded for
            raise _ItemError(WireError(decoded.code, decoded.message, param=param))
        return decoded

    def _video(self, video: Video, param: str) -> Pixels:
        if isinstance(video, list):
            if not video:
                raise _ItemError(WireError("invalid_item", f"{param}: has no frames", param=param))
            frames = [self._picture(frame, f"{param}[{place}]") for place, frame in enumerate(video)]
            size = sum(frame.nbytes for frame in frames)  # before they are copied: one may be there often
            self._stacked += size
            if self._stacked > self._limits.decoded_bytes:
                raise self._too_large(param)
            self._hold(size)
            try:
                return stack_frames(frames, param=param)
            except WireError as error:
                raise _ItemError(error) from error
        source = self._sources.get(video.ref) if video.ref is not None else None
        if not isinstance(source, np.ndarray):
            message = f"{param}: a video is a tensor [T, H, W, 3], or a list of pictures"
            raise WireError("invalid_item", message, param=param)
        return self._tensor(source, video, param, frames=True)

    def _tensor(self, tensor: Pixels, media: Media, param: str, *, frames: bool) -> Pixels:
        """Return one picture or video of a tensor.

        Raises:
            WireError: It has another shape.
            _ItemError: Its values or its size are out of range.
        """
        if media.index is not None:
            tensor = tensor[media.index]
        axis = -1 if tensor.dtype == np.uint8 else -3
        if tensor.ndim != 3 + frames or tensor.shape[axis] != 3:
            front, rows = "T, " if frames else "", ", or one row of a tensor of those" if media.index is None else ""
            message = (
                f"{param}: {media.ref!r} has the shape {list(tensor.shape)} and dtype {tensor.dtype}; send uint8 "
                f"[{front}H, W, 3] or float32 [{front}3, H, W]{rows}"
            )
            raise WireError("invalid_item", message, param=str(media.ref))
        height, width = tensor.shape[-3:-1] if axis == -1 else tensor.shape[-2:]
        try:
            check_size(height, width, limits=self._limits, param=param)
        except WireError as error:
            raise _ItemError(error) from error
        if axis == -3 and not (tensor.min() >= 0 and tensor.max() <= 1):  # false for NaN too
            message = f"{param}: values outside of [0, 1], or none at all (NaN)"
            raise _ItemError(WireError("invalid_item", message, param=param))
        return tensor

    def _check_use(self, used: Mapping[str, set[int | None]]) -> None:
        """Check that nothing in the body is left over: that is a miscount of the client's."""
        for name, source in self._sources.items():
            if name not in used:
                raise WireError("invalid_item", f"{name}: in the body, but no item refers to it", param=name)
            rows = used[name]
            if isinstance(source, np.ndarray) and None not in rows and len(rows) < len(source):
                message = f"{name}: has {len(source)} rows; the items use {len(rows)} of them"
                raise WireError("invalid_item", message, param=name)


class _ItemError(Exception):
    """An error that is told of one item only."""

    def __init__(self, told: WireError):
        super().__init__(told.message)
        self.told = told


def _parse(body: bytes, content_type: str) -> tuple[ScoreRequest, Sources]:
    kind = media_type(content_type)
    if kind == SAFETENSORS:
        return unpack_safetensors(body)
    if kind == MULTIPART:
        parts = read_parts(body, content_type)
        if REQUEST not in parts:
            raise WireError("invalid_request", f"no part is called {REQUEST!r}", param=REQUEST)
        return read_request(parts.pop(REQUEST)), parts
    return read_request(body), {}


def media_type(content_type: str) -> str:
    """Return the media type of a Content-Type.

    Raises:
        WireError: It is none of the three.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (SAFETENSORS, MULTIPART, JSON):
        message = f"Content-Type is {content_type!r}; send {SAFETENSORS}, {MULTIPART} or {JSON}"
        raise WireError("unsupported_media", message, param="Content-Type")
    return kind


def _all_media(items: Sequence[Item]) -> Iterator[tuple[str, Media]]:
    """Yield every picture and video of the items with the name of its field."""
    for index, item in enumerate(items):
        if item.image is not None:
            yield f"items[{index}].image", item.image
        videos = [] if item.video is None else [(f"items[{index}].video", item.video)]
        for place, media in enumerate(item.condition_images or ()):
            yield f"items[{index}].condition_images[{place}]", media
        for place, video in enumerate(item.condition_videos or ()):
            videos.append((f"items[{index}].condition_videos[{place}]", video))
        for name, video in videos:
            if isinstance(video, Media):
                yield name, video
            else:
                yield from ((f"{name}[{place}]", frame) for place, frame in enumerate(video))


def _check_plain(value: Any, param: str, *, depth: int) -> None:
    """Check that a value of `meta` is neither nested too deeply nor holds a number that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError("invalid_request", f"{param}: {value} is no JSON number", param=param)
    if isinstance(value, dict | list):
        if depth == 0:
            raise WireError("invalid_request", f"{param}: nested too deeply", param=param)
        for each in value.values() if isinstance(value, dict) else value:
            _check_plain(each, param, depth=depth - 1)


def _some(sources: Sources) -> str:
    names = [repr(name) for name in sources]
    return ", ".join([*names[:5], "..."] if len(names) > 5 else names) or "nothing beside its JSON"
