"""The samples in the forms that rewards ask for, each converted once, whoever asks first."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tiltflow.errors import RewardError
from tiltflow.rewards.base import RewardModel
from tiltflow.types import Prompt

Conditions = Sequence[Sequence[Tensor] | Tensor] | Tensor


class Lookers:
    """Which rewards look at the samples at the same time: so that an error about them names the one that did it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._now: list[tuple[str, set[str]]] = []

    @contextmanager
    def join(self, name: str) -> Iterator[set[str]]:
        """Look at the samples; yields the names of all that look at some time while this one does, and its own."""
        own = {name}
        with self._lock:
            for other, met in self._now:
                met.add(name)
                own.add(other)
            self._now.append((name, own))
        try:
            yield own
        finally:
            with self._lock:
                self._now = [each for each in self._now if each[1] is not own]


@dataclass
class Media:
    """What rewards can look at, growing while samples come in; a row is a sample's place in the order of arrival.

    The tensor of a row is one object for its whole life, so that scorers can know it again.
    """

    prompts: list[Prompt] = field(default_factory=list[Prompt])
    groups: list[int] = field(default_factory=list[int])
    images: list[Tensor] = field(default_factory=list[Tensor])  # each [3, H, W] in [0, 1]
    videos: list[Tensor] = field(default_factory=list[Tensor])  # each [T, 3, H, W] in [0, 1]
    condition_images: list[Sequence[Tensor] | Tensor] = field(default_factory=list)  # each N of [3, H, W]
    condition_videos: list[Sequence[Tensor] | Tensor] = field(default_factory=list)  # each N of [T, 3, H, W]

    def __post_init__(self) -> None:
        self.lookers = Lookers()
        self._lock = Lock()
        self._making: dict[tuple[str, int], Lock] = {}
        self._pil: dict[tuple[str, int], Any] = {}
        self._finite: dict[tuple[str, int], bool] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def clear(self) -> None:
        """Let go of every picture; prompts and groups stay."""
        for values in (self.images, self.videos, self.condition_images, self.condition_videos):
            values.clear()
        self._pil.clear()

    def add(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[int],
        *,
        images: Sequence[Tensor] | Tensor | None,
        videos: Sequence[Tensor] | Tensor | None,
        condition_images: Conditions | None,
        condition_videos: Conditions | None,
    ) -> range:
        """Append samples and return their rows.

        Raises:
            ValueError: The fields have not one entry per prompt, an earlier call gave other fields, or a tensor is not
                floating point `[3, H, W]`, or `[T, 3, H, W]` for videos.
        """
        first = len(self.prompts)
        self.prompts += prompts
        self.groups += groups
        given: dict[str, Sequence[Any] | Tensor | None] = {
            "images": images,
            "videos": videos,
            "condition_images": condition_images,
            "condition_videos": condition_videos,
        }
        for name, values in given.items():
            own: list[Any] = getattr(self, name)
            if values is not None:
                _check_form(name, values)
                own += list(values)
            if len(own) not in (0, len(self.prompts)) or (values is not None and len(own) != len(self.prompts)):
                raise ValueError(f"{name} has {len(own)} entries for {len(self.prompts)} prompts; give one per prompt")
        if len(self.groups) != len(self.prompts):
            raise ValueError(f"groups has {len(self.groups)} entries for {len(self.prompts)} prompts")
        return range(first, len(self.prompts))

    def check(self, name: str, model: RewardModel) -> None:
        """Check that the samples have what a reward requires.

        Raises:
            RewardError: They do not; names the reward and the field.
        """
        if not self.prompts:  # of no samples nothing can be absent
            return
        has = {
            "prompt": True,
            "metadata": True,
            "image": bool(self.images),
            "video": bool(self.videos),
            "condition_images": bool(self.condition_images),
            "condition_videos": bool(self.condition_videos),
        }
        absent = [field for field in model.required_fields if not has[field]]
        if absent:
            raise RewardError(f"reward {name!r} requires {absent[0]!r}, which these samples do not have")

    def broken_field(self, model: RewardModel, row: int) -> str | None:
        """Return the first required field of a row that has NaN or infinite values, or None.

        A picture of 8 bits cannot show them: they would become some colour, and that a score.
        """
        for name in model.required_fields:
            if name in ("prompt", "metadata"):
                continue
            key = (name, row)
            if key not in self._finite:
                self._finite[key] = _all_finite(self._values(name)[row])
            if not self._finite[key]:
                return name
        return None

    def fields(self, model: RewardModel, rows: Sequence[int]) -> dict[str, Any]:
        """Return the required fields of some rows as keyword arguments.

        Tensors are the samples' own; a reward that is not this package's gets pictures of its own, as Pillow lets
        anybody draw on them. See `writes`.
        """
        tensors = model.use_tensor_inputs
        forms: dict[str, Callable[[int], Any]] = {
            "prompt": lambda row: self.prompts[row].text,
            "metadata": lambda row: dict(self.prompts[row].metadata),
            "image": lambda row: self.images[row] if tensors else self._picture("image", row),
            "video": lambda row: self.videos[row] if tensors else self._picture("video", row),
            "condition_images": lambda row: self._condition("condition_images", row, tensors=tensors),
            "condition_videos": lambda row: self._condition("condition_videos", row, tensors=tensors),
        }
        found = {name: [forms[name](row) for row in rows] for name in model.required_fields}
        return found if type(model).__module__.startswith("tiltflow.") else _with_own_pictures(found)

    @staticmethod
    def writes(fields: Any) -> int:
        """Return a number that grows when torch writes to a tensor in a nest of them, or to another view of its memory.

        Tensors that were made in inference mode do not count.
        """
        if isinstance(fields, Tensor):
            return 0 if fields.is_inference() else fields._version
        values = fields.values() if isinstance(fields, dict) else fields if isinstance(fields, list) else ()
        return sum(map(Media.writes, values))

    def _condition(self, name: str, row: int, *, tensors: bool) -> Any:
        """Return one sample's conditions: stacked if they are of one size, else a list; or as pictures."""
        if not tensors:
            return self._picture(name, row)
        parts = getattr(self, name)[row]
        return torch.stack(list(parts)) if len({part.shape for part in parts}) == 1 else list(parts)

    def _picture(self, name: str, row: int) -> Any:
        key = (name, row)
        with self._lock:
            making = self._making.setdefault(key, Lock())
        with making:  # whoever comes second waits for the first one's pictures
            if key not in self._pil:
                self._pil[key] = _pictures(self._values(name)[row])
            return self._pil[key]

    def _values(self, name: str) -> Sequence[Any]:
        """Return the tensors of a field that is not text."""
        return {
            "image": self.images,
            "video": self.videos,
            "condition_images": self.condition_images,
            "condition_videos": self.condition_videos,
        }[name]


def _check_form(name: str, values: Any) -> None:
    """Raise ValueError unless a field, nested as it may be, holds floating-point pictures, the channels first."""
    axes = 4 if name.endswith("videos") else 3
    for value in values:
        if not isinstance(value, Tensor) or value.ndim > axes:
            _check_form(name, value)
        elif not value.is_floating_point() or value.ndim < axes or value.shape[-3] != 3:
            form = "[T, 3, H, W]" if axes == 4 else "[3, H, W]"
            raise ValueError(
                f"{name}: got {value.dtype} {list(value.shape)}; give floating-point tensors {form} in [0, 1]"
            )


def _with_own_pictures(fields: Any) -> Any:
    """Return a nest of pictures and other things with copies of the pictures."""
    if isinstance(fields, Image.Image):
        return fields.copy()
    if isinstance(fields, dict):
        return {name: _with_own_pictures(value) for name, value in fields.items()}
    return [_with_own_pictures(value) for value in fields] if isinstance(fields, list) else fields


def _all_finite(value: Any) -> bool:
    """Tell whether a tensor, or a nest of them, has only finite values; one sum is several times faster than asking."""
    if isinstance(value, Tensor):
        return bool(value.sum(dtype=torch.float32).isfinite())
    return all(_all_finite(item) for item in value)


def _pictures(value: Any) -> Any:
    """Return a tensor `[..., 3, H, W]` in [0, 1], or a nest of them, as PIL images in nested lists."""
    if not isinstance(value, Tensor) or value.ndim > 3:
        return [_pictures(item) for item in value]
    levels = (value.detach().float() * 255).round_().clamp_(0, 255).to("cpu", torch.uint8)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in levels.numpy()])  # sooner done than moving axes
