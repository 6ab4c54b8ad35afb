"""Which of two images of a prompt people prefer: checked, filtered, weighed, and decoded batch by batch."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.data.images import read_pixels
from tiltflow.data.pair_sources import PairSource, open_pairs
from tiltflow.errors import DataError
from tiltflow.types import Config

Policy = Literal["error", "skip"]
TIE: Final = 0.01  # labels that differ by no more are a tie
SUM_TOLERANCE: Final = 1e-3
TOLD: Final = 3  # bad records that a message shows


class PairFilter(Config):
    """Which pairs of a set are used, and what becomes of bad ones."""

    filter_ties: bool = False  # leave out pairs whose two labels are equal
    weight_by_prompt: bool = False  # a pair counts 1/n, where n pairs that are used have its prompt
    pairs_per_prompt: int | None = Field(default=None, ge=1)  # leave out a prompt's further pairs
    on_bad_record: Policy = (
        "error"  # broken or incomplete, a label outside [0, 1], a preferred image equal to the other
    )
    on_bad_image: Policy = "error"  # that is missing or does not decode; found when it is needed


class ImagePreferences:
    """Pairs of one set, as the trainer reads them."""

    def __init__(self, source: PairSource, rules: PairFilter):
        """Look through all records; no image is read.

        Raises:
            DataError: A record is bad and `on_bad_record` is "error", or nothing is left.
        """
        self._source = source
        self._rules = rules
        self.notes: dict[str, int] = {}  # what was left out, and how often; images are counted when they are read
        self._lock = threading.Lock()  # batches are decoded in several threads
        self._places = self._choose()
        if not len(self._places):
            left_out = ", ".join(f"{count} {name}" for name, count in self.notes.items())
            raise DataError(f"pairs {source.name!r}: none of {len(source)} is left ({left_out}); change the filters")
        counts = Counter(source.prompts[place] for place in self._places)
        self._weights = [1 / counts[source.prompts[place]] if rules.weight_by_prompt else 1.0 for place in self._places]

    @property
    def lengths(self) -> Sequence[int]:
        """All pairs cost the same."""
        return [1] * len(self)

    @property
    def prompts(self) -> list[str]:
        """Every prompt that is used, once, in the order of the set."""
        return list(dict.fromkeys(self._source.prompts[place] for place in self._places))

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, places: Sequence[int], weights: Sequence[float]) -> Mapping[str, Any]:
        """Read and decode pairs.

        Returns:
            `img_0` and `img_1`: B tensors `[H, W, 3]`, uint8, of any sizes; `prompt`: B strings; `label`: `[B, 2]`;
            `weight`: `[B]`; `skipped`: `[B]`, 1 where an image cannot be read and `on_bad_image` is "skip". Such a pair
            has weight 0.

        Raises:
            DataError: An image is missing or does not decode, or the preferred image is the other one.
        """
        rows = [self._read(place, weight) for place, weight in zip(places, weights, strict=True)]
        return collate(rows)

    def _read(self, index: int, weight: float) -> dict[str, Any]:
        place = int(self._places[index])
        label = self._source.labels[place]
        row = {
            "prompt": self._source.prompts[place],
            "label": torch.tensor(label, dtype=torch.float32),
            "weight": weight * self._weights[index],
        }
        if not weight:  # only fills up a batch
            return row | _blank(skipped=False)
        try:
            first, second = self._source.images(place)
            name = f"{self._source.where(place)}: an image"
            pixels = [
                image if isinstance(image, Tensor) else read_pixels(image, name=name) for image in (first, second)
            ]
        except DataError as error:
            return row | self._skip("unreadable image", str(error), self._rules.on_bad_image)
        if abs(label[0] - label[1]) > TIE and torch.equal(pixels[0], pixels[1]):
            message = f"{self._source.where(place)}: the preferred image is the other one; remove the pair"
            return row | self._skip("identical images", message, self._rules.on_bad_record)
        return row | {"img_0": pixels[0], "img_1": pixels[1], "skipped": False}

    def _skip(self, name: str, message: str, policy: Policy) -> dict[str, Any]:
        """Count a pair and return what takes its place, which counts nowhere; or raise."""
        if policy == "error":
            raise DataError(f"{message}; or set on_bad_image and on_bad_record to skip")
        with self._lock:
            self.notes[name] = self.notes.get(name, 0) + 1
        return {"weight": 0.0, **_blank(skipped=True)}

    def _choose(self) -> list[int]:
        """Return the places of the pairs that are used; every other one is counted in the notes."""
        source, kept, told = self._source, [], []
        used: Counter[str] = Counter()
        for place in range(len(source)):
            reason, problem = self._judge(place)
            if not reason:
                prompt = source.prompts[place]
                limit = self._rules.pairs_per_prompt
                if limit is None or used[prompt] < limit:
                    used[prompt] += 1
                    kept.append(place)
                    continue
                reason = "over pairs_per_prompt"
            if problem:
                told.append(f"{source.where(place)}: {problem}")
            self.notes[reason] = self.notes.get(reason, 0) + 1
        if told and self._rules.on_bad_record == "error":
            more = f"\nand {len(told) - TOLD} more" if len(told) > TOLD else ""
            raise DataError("\n".join(told[:TOLD]) + f"{more}\nmend them, or set on_bad_record: skip to leave them out")
        return kept

    def _judge(self, place: int) -> tuple[str, str]:
        """Return under what name a pair is left out ("": it is used), and what is wrong with it ("": nothing)."""
        source = self._source
        label_0, label_1 = (float(label) for label in source.labels[place])
        prompt = source.prompts[place]
        if problem := source.problems.get(place):
            return "bad record", problem
        if not source.labelled[place] or label_0 == label_1 == 0:
            return "unlabelled", ""
        if not (0 <= label_0 <= 1 and 0 <= label_1 <= 1 and abs(label_0 + label_1 - 1) <= SUM_TOLERANCE):
            return "bad label", f"label_0={label_0} and label_1={label_1} must lie in [0, 1] and add up to 1"
        if not isinstance(prompt, str) or not prompt.strip():
            return "bad record", f"the prompt {prompt!r} must be a text that is not empty"
        if self._rules.filter_ties and abs(label_0 - label_1) <= TIE:
            return "tie", ""
        return "", ""


def read_preferences(source: str, rules: PairFilter, *, split: str | None = None) -> ImagePreferences:
    """Read a set of pairs; see `open_pairs` for the sources and the errors."""
    return ImagePreferences(open_pairs(source, split=split), rules)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch of pairs: images and prompts as lists, since sizes differ; all else as tensors."""
    return {
        **{key: [row[key] for row in rows] for key in ("img_0", "img_1", "prompt")},
        "label": torch.stack([row["label"] for row in rows]),
        "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
        "skipped": torch.tensor([float(row["skipped"]) for row in rows]),
    }


def _blank(*, skipped: bool) -> dict[str, Any]:
    """Return the images of a pair that counts nowhere."""
    black = torch.zeros(8, 8, 3, dtype=torch.uint8)
    return {"img_0": black, "img_1": black, "skipped": skipped}
