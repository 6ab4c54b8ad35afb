"""Pairs and ratings as tokens: the policy on texts that are too long, and batches."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tiltflow.data.preferences import Preference
from tiltflow.data.ratings import Rating
from tiltflow.data.records import BadRecord, LeftOut, OverLength
from tiltflow.errors import DataError, RewardError
from tiltflow.reward_training.base import Batch
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.length_buckets import pad_rows

Tokens: TypeAlias = NDArray[np.int32]


class Tokenizing:
    """Makes tokens of texts, and counts those that are too long."""

    def __init__(
        self,
        model: LanguageRewardModel,
        *,
        max_length: int,
        over_length: OverLength,
        left_out: LeftOut,
        keep_identical: bool = False,
    ):
        """Take a model and what to do.

        Args:
            model: Its tokenizer makes the tokens.
            max_length: Tokens that a text may have.
            over_length: Leave a longer one, or the pair it is in, out (`filter`), keep its beginning and what ends
                texts (`truncate`), or stop (`error`).
            left_out: Counts what cannot be encoded, or raises.
            keep_identical: Keep, and count, two texts that are the same tokens, instead of leaving them out.
        """
        self._model = model
        self._max_length = max_length
        self._over_length = over_length
        self._left_out = left_out
        self._keep_identical = keep_identical
        self.notes: Counter[str] = Counter()  # how many examples were too long

    def tokens(self, texts: Sequence[Any], place: str) -> list[Tokens] | None:
        """Return the tokens of the texts of one example, or None if the example is left out.

        Raises:
            DataError: A text is too long or cannot be encoded, and that is an error.
        """
        try:
            rows = [self._model.encode(text) for text in texts]
        except RewardError as error:
            self._left_out.bad(place, BadRecord("cannot be encoded", str(error)))
            return None
        longest = max(len(row) for row in rows)
        if longest > self._max_length and not self._shortened(longest, place):
            return None
        rows = [self._model.shortened(row, self._max_length) for row in rows]
        if len(rows) == 2 and rows[0] == rows[1]:
            cause = "after both were truncated" if longest > self._max_length else "once they are tokens"
            if not self._keep_identical:
                self._left_out.bad(place, BadRecord("identical chosen and rejected", cause))
                return None
            self.notes[f"identical {cause}, so equal rewards"] += 1
        return [np.asarray(row, dtype=np.int32) for row in rows]

    def _shortened(self, longest: int, place: str) -> bool:
        """Count an example that is too long, and tell whether it is kept."""
        if self._over_length == "error":
            raise DataError(
                f"{place}: {longest} tokens are more than max_length={self._max_length}; raise it, or choose "
                "over_length: filter or truncate"
            )
        kept = self._over_length == "truncate"
        self.notes[f"longer than {self._max_length} tokens, {'truncated' if kept else 'left out'}"] += 1
        return kept


class PairExamples:
    """Pairs as tokens; satisfies `Examples`."""

    def __init__(self, preferences: Sequence[Preference], tokenizing: Tokenizing, *, pad: int):
        """Tokenise pairs.

        Args:
            preferences: The pairs.
            tokenizing: How.
            pad: What batches are filled with.

        Raises:
            DataError: As `Tokenizing.tokens`.
        """
        self._rows: list[list[Tokens]] = []
        labels, margins = [], []
        for preference in preferences:
            rows = tokenizing.tokens((preference.chosen, preference.rejected), preference.place)
            if rows is not None:
                self._rows.append(rows)
                labels.append(preference.label)
                margins.append(0.0 if preference.margin is None else preference.margin)
        self._labels = torch.tensor(labels)
        self._margins = torch.tensor(margins)
        self._pad = pad
        self.lengths = [2 * max(len(row) for row in rows) for rows in self._rows]  # both texts, padded to the longer

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, places: Sequence[int], weights: Sequence[float]) -> Batch:
        """Collate pairs.

        Returns:
            `chosen` and `rejected`, int64 `[B, S]` padded on the right, their lengths `[B]`, and float32 `[B]`
            `label`, `margin` and `weight`. Rows of weight 0 are one token long: nobody looks at them.
        """
        sides = [[rows[side] for rows in self._real(places, weights)] for side in range(2)]
        (chosen, chosen_length), (rejected, rejected_length) = (pad_rows(rows, self._pad) for rows in sides)
        index = torch.tensor(list(places), dtype=torch.long)
        return {
            "chosen": chosen,
            "rejected": rejected,
            "chosen_length": chosen_length,
            "rejected_length": rejected_length,
            "label": self._labels[index],
            "margin": self._margins[index],
            "weight": torch.tensor(list(weights)),
        }

    def _real(self, places: Sequence[int], weights: Sequence[float]) -> list[list[Tokens]]:
        return [
            self._rows[place] if weight else [row[:1] for row in self._rows[place]]
            for place, weight in zip(places, weights, strict=True)
        ]


class RatingExamples:
    """Rated texts as tokens; satisfies `Examples`."""

    def __init__(self, ratings: Sequence[Rating], tokenizing: Tokenizing, *, pad: int):
        """Tokenise texts; the arguments are those of `PairExamples`.

        Raises:
            DataError: As `Tokenizing.tokens`.
        """
        self._rows: list[Tokens] = []
        labels = []
        for rating in ratings:
            rows = tokenizing.tokens((rating.text,), rating.place)
            if rows is not None:
                self._rows += rows
                labels.append(rating.labels)
        self._labels = torch.tensor(labels)
        self._pad = pad
        self.lengths = [len(row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, places: Sequence[int], weights: Sequence[float]) -> Batch:
        """Collate texts.

        Returns:
            `inputs`, int64 `[B, S]` padded on the right, `lengths` `[B]`, `labels`, float32 `[B, A]` with -100 where
            there is none, and `weight`, float32 `[B]`.
        """
        rows = [self._rows[p] if weight else self._rows[p][:1] for p, weight in zip(places, weights, strict=True)]
        inputs, lengths = pad_rows(rows, self._pad)
        labels = self._labels[torch.tensor(list(places), dtype=torch.long)]
        return {"inputs": inputs, "lengths": lengths, "labels": labels, "weight": torch.tensor(list(weights))}
