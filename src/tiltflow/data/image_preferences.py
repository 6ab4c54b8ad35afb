"""Which of two images of a prompt people prefer: checked, filtered, weighed, and decoded batch by batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tiltflow.data.images import read_pixels
from tiltflow.data.pair_sources import PairSource, open_pairs
from tiltflow.data.records import BadRecord, LeftOut, OnBad, OverLength, short
from tiltflow.errors import DataError
from tiltflow.types import Config

LABEL_TIE: Final = 0.01  # labels that differ by no more are a tie
SUM_TOLERANCE: Final = 1e-3


class PairFilter(Config):
    """Which pairs of a set are used, and what becomes of bad ones."""

    filter_ties: bool = False  # leave out pairs whose two labels are equal
    # A pair counts 1/n, n being its num_example_per_prompt or, without that column, the pairs used with its prompt.
    weight_by_prompt: bool = False
    pairs_per_prompt: int | None = Field(default=None, ge=1)  # leave out a prompt's further pairs
    over_length: OverLength = "truncate"  # what is done with pairs whose prompts have more tokens than the model reads
    on_bad_record: OnBad = "error"  # broken or incomplete, a label outside [0, 1], a preferred image equal to the other
    on_bad_image: OnBad = "error"  # that is missing or does not decode; found when it is needed


class ImagePreferences:
    """Pairs of one set, as the trainer reads them."""

    def __init__(self, source: PairSource, rules: PairFilter):
        """Look through all records; no image is read.

        Raises:
            DataError: A record is bad and `on_bad_record` is "error", or nothing is left.
        """
        self._source = source
        self._rules = rules
        self._notes: Counter[str] = Counter()
        self.found: dict[int, str] = {}  # record -> why it was left out when its images were read
        self._places = self._choose()
        self._require_some()
        self._weights = self._weigh()

    @property
    def notes(self) -> Counter[str]:
        """What has been left out so far, or shortened, and how often."""
        return self._notes + Counter(self.found.values())

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
            has weight 0, and is in `found` from now on.

        Raises:
            DataError: An image is missing or does not decode, or the preferred image is the other one.
        """
        rows = [self._read(place, weight) for place, weight in zip(places, weights, strict=True)]
        return collate(rows)

    def check_captions(self, longest: int, lengths: Sequence[int]) -> None:
        """Count the pairs whose prompts are too long for a model, and do with them what `over_length` says.

        Args:
            longest: Tokens that the model reads.
            lengths: Tokens of each of `prompts`.

        Raises:
            DataError: There is one, and that is an error; or nothing is left.
        """
        long = {prompt: tokens for prompt, tokens in zip(self.prompts, lengths, strict=True) if tokens > longest}
        if not long:
            return
        prompts, over_length = self._source.prompts, self._rules.over_length
        kept = [place for place in self._places if prompts[place] not in long]
        if over_length == "error":
            place = next(place for place in self._places if prompts[place] in long)
            raise DataError(
                f"{self._source.where(place)}: {long[prompts[place]]} tokens are more than the {longest} that the "
                "model reads; choose over_length: truncate or filter"
            )
        what = "truncated" if over_length == "truncate" else "left out"
        self._notes[f"longer than {longest} tokens, {what}"] = len(self) - len(kept)
        if over_length == "filter":
            self._places = kept
            self._require_some()
            self._weights = self._weigh()

    def _read(self, index: int, weight: float) -> dict[str, Any]:
        place = self._places[index]
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
            return row | self._skip(place, "unreadable image", str(error), self._rules.on_bad_image)
        if abs(label[0] - label[1]) > LABEL_TIE and torch.equal(pixels[0], pixels[1]):
            message = f"{self._source.where(place)}: the preferred image is the other one; remove the pair"
            return row | self._skip(place, "identical images", message, self._rules.on_bad_record)
        return row | {"img_0": pixels[0], "img_1": pixels[1], "skipped": False}

    def _skip(self, place: int, name: str, message: str, policy: OnBad) -> dict[str, Any]:
        """Note a pair and return what takes its place, which counts nowhere; or raise."""
        if policy == "error":
            raise DataError(
                f"{message}; or leave such pairs out with --on_bad_image skip --on_bad_record skip (keys of a "
                "config too)"
            )
        self.found[place] = name
        return {"weight": 0.0, **_blank(skipped=True)}

    def _choose(self) -> list[int]:
        """Return the places of the pairs that are used; every other one is counted in the notes."""
        source, rules, labels = self._source, self._rules, self._source.labels
        unlabelled = ~source.labelled | (labels == 0).all(axis=1)
        bad = self._problems(unlabelled)
        left_out = LeftOut(rules.on_bad_record)
        for place in sorted(bad):
            left_out.bad(source.where(place), bad[place])
        self._notes.update(left_out.counts)
        good = np.ones(len(source), dtype=np.bool_)
        good[list(bad)] = False
        ties = np.abs(labels[:, 0] - labels[:, 1]) <= LABEL_TIE if rules.filter_ties else np.zeros_like(good)
        self._notes["unlabelled"] = int((good & unlabelled).sum())
        self._notes["tie"] = int((good & ~unlabelled & ties).sum())
        places: list[int] = np.flatnonzero(good & ~unlabelled & ~ties).tolist()
        if rules.pairs_per_prompt is not None:
            places = self._first_of_prompts(places, rules.pairs_per_prompt)
        self._notes = +self._notes  # only what there is
        return places

    def _problems(self, unlabelled: NDArray[np.bool_]) -> dict[int, BadRecord]:
        """Return what is wrong with which records; prompts and labels matter only where there is a label."""
        source, labels = self._source, self._source.labels
        outside = ~((labels >= 0) & (labels <= 1)).all(axis=1) | (np.abs(labels.sum(axis=1) - 1) > SUM_TOLERANCE)
        bad: dict[int, BadRecord] = {}
        for place, prompt in enumerate(source.prompts):
            if not (isinstance(prompt, str) and prompt.strip()) and not unlabelled[place]:
                bad[place] = BadRecord("no text", f"the prompt must be a text that is not empty; it is {short(prompt)}")
        for place in np.flatnonzero(outside & ~unlabelled).tolist():
            label_0, label_1 = labels[place]
            detail = f"label_0 is {label_0:g} and label_1 is {label_1:g}; they must lie in [0, 1] and add up to 1"
            bad[place] = BadRecord("label out of range", detail)
        return bad | source.problems

    def _first_of_prompts(self, places: Sequence[int], limit: int) -> list[int]:
        used: Counter[str] = Counter()
        kept = []
        for place in places:
            prompt = self._source.prompts[place]
            used[prompt] += 1
            if used[prompt] <= limit:
                kept.append(place)
        self._notes["over pairs_per_prompt"] = len(places) - len(kept)
        return kept

    def _weigh(self) -> list[float]:
        """Return what each pair counts."""
        source, places = self._source, self._places
        if not self._rules.weight_by_prompt:
            return [1.0] * len(places)
        if source.per_prompt is not None:
            return (1 / source.per_prompt[places]).tolist()
        counts = Counter(source.prompts[place] for place in places)
        return [1 / counts[source.prompts[place]] for place in places]

    def _require_some(self) -> None:
        if not self._places:
            left_out = ", ".join(f"{count} {name}" for name, count in self.notes.items())
            source = self._source
            raise DataError(f"pairs {source.name!r}: none of {len(source)} is left ({left_out}); change the filters")


def read_image_preferences(
    source: str, rules: PairFilter, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> ImagePreferences:
    """Read a set of pairs; see `open_pairs` for the sources, their columns and the errors."""
    return ImagePreferences(open_pairs(source, split=split, columns=columns), rules)


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
