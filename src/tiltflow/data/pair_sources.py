"""Pairs of images of one prompt as they are stored, in Pick-a-Pic's columns or as lines with paths.

No image is read here but those that somebody asks for.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.data.parts import ABSENT, Part
from tiltflow.data.records import BadRecord, check_columns, short
from tiltflow.data.sources import open_source
from tiltflow.errors import DataError

Stored = bytes | Path | Tensor  # the content of an image file, the file, or pixels: uint8 [H, W, 3]

# What is read -> what it may be called: as in lines of JSON, or as Pick-a-Pic is published.
NEEDED: Final[Mapping[str, Sequence[str]]] = {
    "image_0": ("image_0", "jpg_0"),
    "image_1": ("image_1", "jpg_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "prompt": ("prompt", "caption"),
}
OPTIONAL: Final = ("has_label", "num_example_per_prompt")


class PairSource(ABC):
    """N pairs as they are stored; a label that is missing or no number is NaN."""

    def __init__(self, name: str, labels: NDArray[np.float64], *, labelled: NDArray[np.bool_], prompts: Sequence[Any]):
        self.name = name  # of a file or a set
        self.labels = labels  # [N, 2]
        self.labelled = labelled  # [N]; False where the set says that nobody has judged the pair
        self.prompts = prompts  # N; anything but a non-empty string is a bad record
        self.problems: dict[int, BadRecord] = {}  # place -> what is wrong with a record besides
        self.per_prompt: NDArray[np.float64] | None = None  # [N]; pairs of the whole set with its prompt, if it says so

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def images(self, place: int) -> tuple[Stored, Stored]:
        """Return both images of a pair, as stored.

        Raises:
            DataError: There is none.
        """

    @abstractmethod
    def where(self, place: int) -> str:
        """Return what people look for to find a pair, such as the line of a file."""


def open_pairs(source: str, *, split: str | None = None, columns: Mapping[str, str] | None = None) -> PairSource:
    """Open a set of pairs.

    Args:
        source: As for `open_source`.
        split: The same.
        columns: What is read (`NEEDED`, `OPTIONAL`) -> the source's own name, where it is another one.

    Raises:
        DataError: There is nothing, it cannot be read, or a column is missing; says which and what to do.
    """
    return _StoredPairs(source, split, columns or {})


@final
class _StoredPairs(PairSource):
    """Pairs of a source; paths of images are relative to their file."""

    def __init__(self, source: str, split: str | None, columns: Mapping[str, str]):
        self._names = {
            **NEEDED,
            **{name: (name,) for name in OPTIONAL},
            **{name: (own,) for name, own in columns.items()},
        }
        self._parts = open_source(source, split=split, mapped=True)
        check_columns(self._parts, columns, (*NEEDED, *OPTIONAL))
        for part in self._parts.parts:
            self._check_columns(part)
        label_0, label_1, prompts, judged = (
            self._parts.column(self._names[name]) for name in ("label_0", "label_1", "prompt", "has_label")
        )
        same: dict[Any, Any] = {}  # a prompt that many pairs have is kept once
        super().__init__(
            source,
            np.array([[_number(value) for value in labels] for labels in (label_0, label_1)]).T,
            labelled=np.array([value is ABSENT or value is None or bool(value) for value in judged]),
            prompts=[same.setdefault(prompt, prompt) if isinstance(prompt, str) else prompt for prompt in prompts],
        )
        counts = np.array([_number(value) for value in self._parts.column(self._names["num_example_per_prompt"])])
        self.per_prompt = counts if (counts >= 1).all() else None
        for place in np.flatnonzero(np.isnan(self.labels).any(axis=1) & self.labelled):
            self.problems[int(place)] = _no_label(label_0[place], label_1[place])
        start = 0
        for part in self._parts.parts:
            if part.columns is None:
                self._check_lines(part, start)
            start += len(part)

    def images(self, place: int) -> tuple[Stored, Stored]:
        """Return the encoded images of a row, or the files that it names."""
        part, index = self._parts.find(place)
        first, second = (_stored(part, index, self._names[name]) for name in ("image_0", "image_1"))
        return first, second

    def where(self, place: int) -> str:
        """Return the file and the line or row, counted from 1."""
        part, index = self._parts.find(place)
        return part.where(index)

    def _check_columns(self, part: Part) -> None:
        if part.columns is None:
            return
        missing = [" or ".join(self._names[name]) for name in NEEDED if not {*self._names[name]} & {*part.columns}]
        if missing:
            raise DataError(
                f"data {part.name}: no column {', '.join(missing)}; it has {', '.join(part.columns)}; columns: "
                "{prompt: theirs} says what else one is called"
            )

    def _check_lines(self, part: Part, start: int) -> None:
        """Note what is wrong with lines: they are no objects, lack a key, or have no path."""
        for index in range(len(part)):
            problem = self._problem(part, index)
            if problem is not None:
                self.problems[start + index] = problem

    def _problem(self, part: Part, index: int) -> BadRecord | None:
        if index in part.problems:
            return BadRecord("broken JSON", part.problems[index])
        found = {name: part.value(index, self._names[name]) for name in NEEDED}
        missing = [name for name, value in found.items() if value is ABSENT]
        if missing:
            return BadRecord("missing key", f"no {', '.join(missing)}; a line needs {', '.join(NEEDED)}")
        for name in ("image_0", "image_1"):
            if not isinstance(found[name], str) or not found[name]:
                text = f"{name} is {short(found[name])}; it must be the path of an image, relative to the file"
                return BadRecord("no path", text)
        return None


def _stored(part: Part, index: int, names: Sequence[str]) -> Stored:
    value = part.value(index, names)
    if isinstance(value, Mapping):  # an image column as `datasets` stores it
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return part.folder / value
    if not isinstance(value, bytes):
        raise DataError(
            f"{part.where(index)}: {names[-1]} must hold encoded images or paths; got {type(value).__name__}"
        )
    return value


def _no_label(*labels: Any) -> BadRecord:
    """Return what is wrong with the labels of a pair of which one is no number."""
    key, value = next((key, value) for key, value in enumerate(labels) if np.isnan(_number(value)))
    return BadRecord("no number", f"label_{key} is {short(value)}; it must be a number from 0 to 1")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("inf")
