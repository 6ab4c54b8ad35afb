"""Samples as the requests that a reward server is sent, no larger than it takes."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tiltflow.errors import RewardError
from tiltflow.runtime.pixels import to_rgb
from tiltflow.serving import wire

S = TypeVar("S")
T = TypeVar("T")

ITEM_BYTES: Final = 512  # of JSON around an item's texts
TENSOR_BYTES: Final = 160  # of JSON around a tensor

_Array = tuple[object, wire.Pixels]  # a medium and its pixels; one that several samples share is sent once
_Video = _Array | list[_Array]  # frames of one size, or of several


@dataclass(frozen=True)
class Parcel:
    """One request, which may be sent several times, and what its reply must be like."""

    key: str  # the same each time, so that a server knows it again
    body: bytes
    content_type: str
    places: tuple[int, ...]  # of its items in the batch
    ids: tuple[str, ...]  # of its items
    model: str
    revision: str  # that answered so far; "" if none was told
    whole: bool  # one sample's failure is the request's

    def check(self, reply: wire.ScoreReply) -> None:
        """Raise a ValueError if a reply is about other samples, without scores, or from another model."""
        for result, name in zip(reply.results, self.ids, strict=True):
            if result.id not in ("", name):
                raise ValueError(f"item {result.index} is called {result.id!r}, and was sent as {name!r}")
            if result.status == "ok" and self.model not in result.scores:
                raise ValueError(f"item {result.index} has no score of {self.model!r}")
        for info in reply.models:
            if info.name == self.model and self.revision and info.revision not in ("", self.revision):
                raise ValueError(f"{self.model!r} is now {info.revision}; its scores so far are of {self.revision}")


@dataclass(frozen=True)
class RequestForm:
    """What all requests of one reward have in common."""

    model: str  # "name", which scores are under
    asked: str  # the same, or "name@revision"
    revision: str
    partial: Literal["allow", "forbid"]
    limits: wire.Limits
    batch_pixels: int | None = None  # that one sample, or one group, may have; None: any number


@dataclass
class Parcels:
    """The requests of one call, and what could not be put into any."""

    parcels: list[Parcel] = field(default_factory=list[Parcel])
    failures: dict[int, Exception] = field(default_factory=dict[int, Exception])  # place in the batch -> why


@dataclass(frozen=True)
class _Sample:
    """One sample on its way into a request."""

    place: int
    prompt: str | None
    image: _Array | None
    video: _Video | None
    condition_images: list[_Array] | None
    condition_videos: list[_Video] | None
    meta: dict[str, Any] | None
    text_bytes: int

    def arrays(self) -> dict[int, int]:
        """Return the bytes of every array, under the identity of its medium."""
        return {id(medium): pixels.nbytes + TENSOR_BYTES for medium, pixels in self._media()}

    @property
    def pixels(self) -> int:
        """How many pixels a server makes of it: each medium counts as often as it is used."""
        return sum(pixels.size // 3 for _, pixels in self._media())

    def _media(self) -> list[_Array]:
        videos = [*([] if self.video is None else [self.video]), *(self.condition_videos or ())]
        frames = [array for video in videos for array in (video if isinstance(video, list) else [video])]
        single = [] if self.image is None else [self.image]
        return [*single, *(self.condition_images or ()), *frames]


class _Load:
    """Samples of one request, and how large they make it."""

    def __init__(self, samples: Sequence[_Sample] = ()):
        self.samples: list[_Sample] = []
        self.nbytes = 0
        self._arrays: set[int] = set()
        for sample in samples:
            self.add(sample)

    def add(self, sample: _Sample) -> None:
        self.nbytes += self._growth(sample)
        self._arrays.update(sample.arrays())
        self.samples.append(sample)

    def exceeds(self, limits: wire.Limits, *, more: _Sample | None = None) -> bool:
        """Tell whether the samples, or these and one more, are more than a server takes."""
        count = len(self.samples) + (more is not None)
        nbytes = self.nbytes + (0 if more is None else self._growth(more))
        return count > _most_items(limits) or nbytes > _most_bytes(limits)

    def check(self, form: RequestForm) -> None:
        """Raise a RewardError if the samples, one or a group, are more than the server takes."""
        what = "a sample" if len(self.samples) == 1 else f"a group of {len(self.samples)} samples"
        pixels = sum(sample.pixels for sample in self.samples)
        if form.batch_pixels is not None and pixels > form.batch_pixels:
            less = "less" if len(self.samples) == 1 else "smaller groups"
            raise RewardError(
                f"{what} has {pixels} pixels; the server of {form.model!r} takes {form.batch_pixels} in one call; "
                f"start it with a larger batch_pixels, or send {less}"
            )
        if self.exceeds(form.limits):
            raise RewardError(
                f"{what} has {self.nbytes} bytes; the server of {form.model!r} takes {_most_bytes(form.limits)} bytes "
                f"and {_most_items(form.limits)} items in one request; raise its limits, or send fewer bytes (pixels: "
                "uint8)"
            )

    def _growth(self, sample: _Sample) -> int:
        """Return by how many bytes one more sample would make the request larger."""
        new = sum(nbytes for medium, nbytes in sample.arrays().items() if medium not in self._arrays)
        return new + sample.text_bytes


def _most_items(limits: wire.Limits) -> int:
    return min(limits.items, limits.queue_items)


def _most_bytes(limits: wire.Limits) -> int:
    return min(limits.body_bytes, limits.decoded_bytes)


def pack_pointwise(fields: Mapping[str, Sequence[Any]], form: RequestForm) -> Parcels:
    """Return samples as requests of as many items as the server takes.

    Args:
        fields: Name of a field -> B values, as rewards are given them: pictures or tensors in [0, 1].
        form: Of the requests.

    Returns:
        The requests; a sample that cannot be sent is among the failures instead.
    """
    made = Parcels()
    load = _Load()
    for place in range(_count(fields)):
        try:
            sample = _sample(fields, place)
            _Load([sample]).check(form)
        except RewardError as error:
            made.failures[place] = error
            continue
        if load.samples and load.exceeds(form.limits, more=sample):
            made.parcels.append(_parcel(load.samples, form, together=False))
            load = _Load()
        load.add(sample)
    if load.samples:
        made.parcels.append(_parcel(load.samples, form, together=False))
    return made


def pack_group(fields: Mapping[str, Sequence[Any]], form: RequestForm) -> Parcels:
    """Return one group as one request.

    Raises:
        RewardError: A sample cannot be sent, or the group is larger than the server takes.
    """
    samples = [_sample(fields, place) for place in range(_count(fields))]
    if not samples:
        return Parcels()
    _Load(samples).check(form)
    return Parcels([_parcel(samples, form, together=True)])


def _count(fields: Mapping[str, Sequence[Any]]) -> int:
    counts = {name: len(values) for name, values in fields.items()}
    if len(set(counts.values())) > 1:
        raise RewardError(f"fields of one batch have different lengths: {counts}; give one value per sample")
    return next(iter(counts.values()), 0)


def _sample(fields: Mapping[str, Sequence[Any]], place: int) -> _Sample:
    own = {name: values[place] for name, values in fields.items()}
    meta = None if own.get("metadata") is None else dict(own["metadata"])  # an empty one is there all the same
    try:
        text = json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RewardError(f"metadata cannot be sent as JSON: {error}; use numbers, text, lists and mappings") from error
    prompt = own.get("prompt")
    return _Sample(
        place=place,
        prompt=prompt,
        image=None if own.get("image") is None else _picture("image", own["image"]),
        video=None if own.get("video") is None else _video("video", own["video"]),
        condition_images=_each(partial(_picture, "condition_images"), own.get("condition_images")),
        condition_videos=_each(partial(_video, "condition_videos"), own.get("condition_videos")),
        meta=meta,
        # JSON may write one letter as six.
        text_bytes=ITEM_BYTES + len(json.dumps(prompt)) + len(text),
    )


def _picture(name: str, medium: Any) -> _Array:
    """Return a PIL image as `[H, W, 3]` uint8, or a tensor `[3, H, W]` as float32: what is scored is what is there."""
    if isinstance(medium, Image.Image):
        return medium, _levels(medium)
    if isinstance(medium, Tensor) and medium.is_floating_point() and medium.ndim == 3 and medium.shape[0] == 3:
        return medium, _values(medium)
    raise RewardError(f"{name} is {_described(medium)}; give PIL images or float tensors [3, H, W] in [0, 1]")


def _each(convert: Callable[[S], T], values: Sequence[S] | None) -> list[T] | None:
    return None if values is None else [convert(value) for value in values]


def _video(name: str, medium: Any) -> _Video:
    """Return a list of PIL images as `[T, H, W, 3]` uint8, or a tensor `[T, 3, H, W]` as float32."""
    if isinstance(medium, Tensor) and medium.is_floating_point() and medium.ndim == 4 and medium.shape[1] == 3:
        return medium, _values(medium)
    if isinstance(medium, list | tuple) and medium and all(isinstance(frame, Image.Image) for frame in medium):
        frames = [_levels(frame) for frame in medium]
        if len({frame.shape for frame in frames}) > 1:
            return list(zip(medium, frames, strict=True))
        return medium, np.stack(frames)
    raise RewardError(f"{name} is {_described(medium)}; give lists of PIL images or float tensors [T, 3, H, W]")


def _levels(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(to_rgb(picture))


def _values(tensor: Tensor) -> wire.Pixels:
    return tensor.detach().to("cpu", torch.float32).numpy()


def _described(medium: Any) -> str:
    if isinstance(medium, Tensor):
        return f"a tensor {list(medium.shape)} of {medium.dtype}"
    return f"a {type(medium).__name__}"


def _parcel(samples: Sequence[_Sample], form: RequestForm, *, together: bool) -> Parcel:
    key = uuid.uuid4().hex
    tensors: dict[str, wire.Pixels] = {}
    names: dict[int, str] = {}

    def media(array: _Array) -> wire.Media:
        medium, pixels = array
        name = names.setdefault(id(medium), f"t{len(names)}")
        tensors[name] = pixels
        return wire.Media(ref=name)

    def video(each: _Video) -> wire.Video:
        return [media(frame) for frame in each] if isinstance(each, list) else media(each)

    items: list[wire.Item] = []
    for index, sample in enumerate(samples):
        content = {
            "id": f"{key}-{index}",  # names the request too, so that no reply to another one can pass for its own
            "prompt": sample.prompt,
            "image": None if sample.image is None else media(sample.image),
            "video": None if sample.video is None else video(sample.video),
            "condition_images": _each(media, sample.condition_images),
            "condition_videos": _each(video, sample.condition_videos),
            "group_id": key if together else None,
            "meta": sample.meta,
        }
        items.append(wire.Item.model_validate({name: value for name, value in content.items() if value is not None}))
    request = wire.ScoreRequest.model_validate(
        {"models": [form.asked], "items": items, "partial": form.partial, "return": ["components"]}
    )
    if tensors:
        body, content_type = wire.pack_safetensors(request, tensors), wire.SAFETENSORS
    else:
        body, content_type = request.model_dump_json(by_alias=True, exclude_defaults=True).encode(), wire.JSON
    return Parcel(
        key=key,
        body=body,
        content_type=content_type,
        places=tuple(sample.place for sample in samples),
        ids=tuple(item.id for item in items),
        model=form.model,
        revision=form.revision,
        whole=form.partial == "forbid",
    )
