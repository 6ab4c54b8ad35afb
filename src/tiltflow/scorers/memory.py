"""Features that are computed once: of image tensors while they live, of prompts while there is room."""

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import final

from torch import Tensor


@dataclass
class _Entry:
    owner: weakref.ref[Tensor]
    version: int
    features: dict[Hashable, Tensor] = field(default_factory=dict[Hashable, Tensor])


@final
class ImageMemory:
    """Remembers one feature per image tensor and key, as long as the tensor lives and is not written to.

    A view, such as one row of a batch, is recognised by the tensor it looks into and the place where it looks: two
    rewards that each take `images[3]` mean the same image. Torch counts the writes to a tensor; those that bypass it
    (through a numpy array that shares the memory, or `.data`) are not seen.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type["ImageMemory"], tuple[()]]:
        return ImageMemory, ()  # a copy of a model starts with an empty memory

    def __len__(self) -> int:
        return sum(len(entry.features) for entry in self._entries.values())

    def get(self, image: Tensor, key: Hashable) -> Tensor | None:
        """Return what was remembered of an image, or None."""
        if image.is_inference():  # such a tensor does not count its writes
            return None
        owner = _owner(image)
        entry = self._entries.get(id(owner))
        if entry is None or entry.owner() is not owner or entry.version != owner._version:
            return None
        return entry.features.get((_place(image), key))

    def put(self, image: Tensor, key: Hashable, feature: Tensor) -> None:
        """Remember a feature of an image."""
        if image.is_inference():
            return
        owner = _owner(image)
        entry = self._entries.get(id(owner))
        if entry is None or entry.owner() is not owner or entry.version != owner._version:
            entries, number = self._entries, id(owner)

            def forget(dead: weakref.ref[Tensor]) -> None:
                found = entries.get(number)
                if found is not None and found.owner is dead:
                    entries.pop(number, None)  # another thread may have been first

            entry = entries[number] = _Entry(weakref.ref(owner, forget), owner._version)
        entry.features[_place(image), key] = feature

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


@final
class TextMemory:
    """Remembers the features of the prompts used last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def __reduce__(self) -> tuple[type["TextMemory"], tuple[int]]:
        return TextMemory, (self.size,)

    def __len__(self) -> int:
        return len(self._features)

    def get(self, prompt: str) -> Tensor | None:
        """Return what was remembered of a prompt, or None."""
        if prompt in self._features:
            self._features.move_to_end(prompt)
        return self._features.get(prompt)

    def put(self, prompt: str, feature: Tensor) -> None:
        """Remember a prompt, and forget the one unused for longest when there are too many."""
        self._features[prompt] = feature
        while len(self._features) > self.size:
            self._features.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._features.clear()


def _owner(image: Tensor) -> Tensor:
    """Return the tensor that a view looks into; others own their values."""
    return image if image._base is None else image._base


def _place(image: Tensor) -> Hashable:
    return image.data_ptr(), image.shape, image.stride(), image.dtype
