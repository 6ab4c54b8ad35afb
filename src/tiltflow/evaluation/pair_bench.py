"""How often an image-text reward model agrees with people, who may call two images equally good.

With ties the score of a pair depends on a threshold, which is chosen on validation pairs; beside it stand what the
model scores without one, what calling every pair a tie scores, and what chance scores.

The 95% intervals are Wilson's where every pair has a prompt of its own; else whole prompts are resampled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltflow.errors import DataError
from tiltflow.evaluation.statistics import estimate
from tiltflow.reward_training.thresholds import (
    THRESHOLDS,
    Floats,
    agreements,
    choose_threshold,
    label_ties,
    probabilities,
    random_baseline,
    threshold_accuracies,
    tie_scores,
)
from tiltflow.runtime.intervals import Estimate, mean_of_independent, wilson
from tiltflow.runtime.plain import plain
from tiltflow.runtime.tables import aligned


@dataclass(frozen=True)
class PairRewards:
    """What a model gives the pairs of one set; those without two finite rewards are counted apart.

    Example: `PairRewards(np.array([1.5]), np.array([0.5]), np.array([[1.0, 0.0]]), np.array(["a cat"]))`.
    """

    first: Floats  # [N]
    second: Floats  # [N]
    labels: Floats  # [N, 2]
    prompts: NDArray[Any]  # [N]; pairs of one prompt resemble each other

    @property
    def finite(self) -> "PairRewards":
        """The pairs that have two finite rewards."""
        known = np.isfinite(self.first) & np.isfinite(self.second)
        return PairRewards(self.first[known], self.second[known], self.labels[known], self.prompts[known])

    @property
    def failures(self) -> int:
        """How many have not."""
        return len(self.first) - len(self.finite.first)

    @property
    def probs(self) -> Floats:
        """The softmax of both rewards, `[N, 2]`."""
        return probabilities(self.first, self.second)


@dataclass(frozen=True)
class SetScores:
    """The outcome on one set."""

    pairs: int
    ties: int  # pairs that people call equal
    accuracy: Estimate  # over the others; NaN if there is none
    at_thresholds: tuple[float, ...]  # the score with ties, for each of THRESHOLDS
    without_threshold: Estimate  # the score with ties, if only equal rewards are called a tie
    all_ties: float  # the same, if every pair is called one
    at_threshold: Estimate | None  # at the threshold of the validation set
    chance: float | None  # what coin flips score at it

    @classmethod
    def of(cls, rewards: PairRewards, threshold: float | None) -> "SetScores":
        """Score pairs with finite rewards."""
        probs, labels, prompts = rewards.probs, rewards.labels, rewards.prompts
        right, decided = agreements(rewards.first, rewards.second, labels)
        known = threshold is not None
        return cls(
            pairs=len(labels),
            ties=int(label_ties(labels).sum()),
            accuracy=_mean(right[decided], prompts[decided]),
            at_thresholds=tuple(threshold_accuracies(probs, labels).tolist()),
            without_threshold=_mean(tie_scores(probs, labels, 0.0), prompts),
            all_ties=float(tie_scores(probs, labels, 1.0).mean()),
            at_threshold=_mean(tie_scores(probs, labels, threshold), prompts) if known else None,
            chance=float(random_baseline(labels, [threshold])[0]) if known else None,
        )


@dataclass(frozen=True)
class PairBench:
    """The outcome on all sets."""

    threshold: float | None  # None without validation pairs
    validation: SetScores | None
    tests: Mapping[str, SetScores]


def pair_bench(tests: Mapping[str, PairRewards], validation: PairRewards | None = None) -> PairBench:
    """Score sets of pairs; with validation pairs also at the threshold that they choose.

    Args:
        tests: By name.
        validation: None leaves everything out that takes a threshold.

    Raises:
        DataError: A set has no pair with finite rewards.
    """
    for name, rewards in {**tests, **({"--validation": validation} if validation else {})}.items():
        if not len(rewards.finite.first):
            raise DataError(f"{name}: none of {len(rewards.first)} pairs has two finite rewards; there is no score")
    if validation is None:
        return PairBench(None, None, {name: SetScores.of(rewards.finite, None) for name, rewards in tests.items()})
    held = validation.finite
    threshold = choose_threshold(held.probs, held.labels)
    scored = {name: SetScores.of(rewards.finite, threshold) for name, rewards in tests.items()}
    return PairBench(threshold, SetScores.of(held, threshold), scored)


def pair_table(found: PairBench) -> str:
    """Return a plain text table, a row per set, and what its columns mean."""
    head = ("set", "pairs", "ties", "accuracy", "with ties, no threshold", "all called ties")
    sets = {**({"--validation": found.validation} if found.validation else {}), **found.tests}
    lines = [aligned([head, *(_row(name, each) for name, each in sets.items())])]
    if found.threshold is None:
        lines.append("no threshold for ties: --validation names the pairs that choose one")
    else:
        rows = [
            (name, str(each.at_threshold), "-" if each.chance is None else f"{each.chance:.3f}")
            for name, each in sets.items()
        ]
        lines.append(aligned([("set", f"with ties, threshold {found.threshold:g}", "chance"), *rows]))
        lines.append("the threshold was chosen on the validation pairs")
    return "\n\n".join(lines)


def pair_content(found: PairBench) -> dict[str, object]:
    """Return everything as JSON has it; what does not exist is None."""
    return {
        "threshold": found.threshold,
        "thresholds": list(THRESHOLDS),
        "validation": None if found.validation is None else _content(found.validation),
        "sets": {name: _content(each) for name, each in found.tests.items()},
    }


def told(each: Estimate | None, name: str = "accuracy") -> dict[str, float | int | None] | None:
    """Return a rate under a name as JSON has it; NaN, which JSON has not, is None."""
    if each is None:
        return None
    return plain({name: each.value, "low": each.low, "high": each.high, "pairs": each.count})


def _row(name: str, each: SetScores) -> tuple[str, ...]:
    accuracy = str(each.accuracy) if each.accuracy.count else "-"
    return name, str(each.pairs), str(each.ties), accuracy, str(each.without_threshold), f"{each.all_ties:.3f}"


def _content(each: SetScores) -> dict[str, object]:
    return {
        "pairs": each.pairs,
        "ties": each.ties,
        "accuracy": told(each.accuracy),
        "with_ties": {
            "at_threshold": told(each.at_threshold, "score"),
            "chance": each.chance,
            "without_threshold": told(each.without_threshold, "score"),
            "all_called_ties": each.all_ties,
            "at_thresholds": list(each.at_thresholds),
        },
    }


def _mean(scores: Floats, prompts: NDArray[Any]) -> Estimate:
    """Return the mean of scores from 0 to 1; where they do not vary, prompts count as one case each."""
    groups, clusters = np.unique(prompts, return_inverse=True)
    if len(groups) == len(scores):
        return mean_of_independent(scores)
    if len(groups) < 2 or scores.min() == scores.max():  # resampling would promise certainty
        value = float(scores.mean())
        return Estimate(value, *wilson(value, len(groups)), len(scores))
    return estimate(scores, clusters)
