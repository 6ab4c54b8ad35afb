"""How often a reward model agrees with people who may also call two images equally good.

A model calls a tie what it gives nearly equal probabilities. From where on is chosen on a validation set and held fixed
for the test set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from tiltflow.data.image_preferences import LABEL_TIE
from tiltflow.errors import DataError
from tiltflow.reward_training.base import Examples
from tiltflow.reward_training.image_text import CLIPRewardModel
from tiltflow.runtime.intervals import Estimate, mean_of_independent

Floats = NDArray[np.float64]
THRESHOLDS: Final = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class TieEvaluation:
    """The outcome of the threshold protocol.

    Example: `TieEvaluation(0.3, Estimate(0.82, ...), Estimate(0.85, ...), random_baseline=0.54)`.
    """

    threshold: float
    validation: Estimate  # with Wilson's interval, which takes the pairs for independent
    test: Estimate
    random_baseline: float  # what coin flips score on the test set with this threshold


def probabilities(rewards_0: ArrayLike, rewards_1: ArrayLike) -> Floats:
    """Return the softmax of two rewards, float64 `[N, 2]`.

    Raises:
        DataError: A reward is not finite.
    """
    difference = _finite("rewards_1", rewards_1) - _finite("rewards_0", rewards_0)
    first = np.where(difference > 0, np.exp(-np.abs(difference)), 1.0) / (1 + np.exp(-np.abs(difference)))
    return np.stack([first, 1 - first], axis=-1)


def tie_scores(probs: ArrayLike, labels: ArrayLike, threshold: float) -> Floats:
    """Return how right the model is about each pair, float64 `[N]`.

    A pair whose probabilities differ by at most the threshold is called a tie, which scores 1 if it is one and 1/2
    otherwise; any other scores the label of the likelier image: 1, 0, or 1/2 if the pair is a tie.

    Args:
        probs: Softmax of both rewards, `[N, 2]`.
        labels: `[N, 2]`.
        threshold: From 0, only equal ones, to 1, all pairs.

    Raises:
        DataError: The shapes do not fit, there is no pair, or a number is not finite.
    """
    likely, given = _finite("probs", probs), _finite("labels", labels)
    if likely.ndim != 2 or likely.shape[1:] != (2,) or likely.shape != given.shape or not len(likely):
        raise DataError(f"probs {list(likely.shape)} and labels {list(given.shape)} must both be [N, 2], N at least 1")
    called_tie = np.abs(likely[:, 0] - likely[:, 1]) <= threshold
    chosen = np.where(likely[:, 1] > likely[:, 0], given[:, 1], given[:, 0])
    return np.where(called_tie, np.where(label_ties(given), 1.0, 0.5), chosen)


def label_ties(labels: ArrayLike) -> NDArray[np.bool_]:
    """Return which pairs people call equally good, `[N]`."""
    given = _finite("labels", labels)
    return np.abs(given[:, 0] - given[:, 1]) <= LABEL_TIE


def threshold_accuracies(probs: ArrayLike, labels: ArrayLike, thresholds: Sequence[float] = THRESHOLDS) -> Floats:
    """Return the mean of `tie_scores` for each threshold, `[T]`."""
    return np.array([tie_scores(probs, labels, threshold).mean() for threshold in thresholds])


def choose_threshold(probs: ArrayLike, labels: ArrayLike) -> float:
    """Return which of `THRESHOLDS` scores best, the first of them if several do.

    Raises:
        DataError: The shapes do not fit, there is no pair, or a number is not finite.
    """
    return THRESHOLDS[int(np.argmax(threshold_accuracies(probs, labels)))]


def random_baseline(labels: ArrayLike, thresholds: Sequence[float] = THRESHOLDS) -> Floats:
    """Return what a model scores whose probability is drawn evenly from [0, 1], for each threshold, `[T]`.

    (t + (1 - t) / 2) * share of ties + 1/2 * share of the rest
    """
    ties = float(label_ties(labels).mean())
    return np.array([(t + (1 - t) / 2) * ties + 0.5 * (1 - ties) for t in thresholds])


def evaluate_with_ties(
    val_probs: ArrayLike, val_labels: ArrayLike, *, test_probs: ArrayLike, test_labels: ArrayLike
) -> TieEvaluation:
    """Choose the threshold on validation pairs and report the test pairs with it.

    Args:
        val_probs: `[N, 2]`.
        val_labels: `[N, 2]`.
        test_probs: `[M, 2]`.
        test_labels: `[M, 2]`.

    Raises:
        DataError: The shapes do not fit, there is no pair, or a number is not finite.

    Source: PickScore (arXiv 2305.01569, section 4) and the evaluations published with it and with NeMo-Aligner.
    """
    threshold = choose_threshold(val_probs, val_labels)
    return TieEvaluation(
        threshold,
        mean_of_independent(tie_scores(val_probs, val_labels, threshold)),
        mean_of_independent(tie_scores(test_probs, test_labels, threshold)),
        float(random_baseline(test_labels, [threshold])[0]),
    )


def agreements(rewards_0: ArrayLike, rewards_1: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Return whether the preferred image has the higher reward, 1 or 0 `[N]`, and which pairs are no ties, `[N]`.

    Raises:
        DataError: A number is not finite.
    """
    difference = _finite("rewards_0", rewards_0) - _finite("rewards_1", rewards_1)
    given = _finite("labels", labels)
    right = np.where(given[:, 0] > given[:, 1], difference > 0, difference < 0)
    return right.astype(np.float64), ~label_ties(given)


def pair_rewards(model: CLIPRewardModel, pairs: Examples, *, batch_size: int = 64) -> tuple[Floats, Floats, Floats]:
    """Return the rewards of both images and the labels of all pairs: `[N]`, `[N]` and `[N, 2]`; not always finite.

    Pairs whose images cannot be read, and which the data leaves out, are left out.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(pairs), batch_size):
            places = range(start, min(start + batch_size, len(pairs)))
            batch = pairs.batch(places, [1.0] * len(places))
            used = batch["weight"] > 0
            rewards = [reward.cpu()[used] for reward in model.pair_rewards(batch)]
            parts.append((*rewards, batch["label"][used]))
    model.train(training)
    first, second, labels = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
    return first, second, labels


def _finite(name: str, values: ArrayLike) -> Floats:
    """Return numbers as an array; NaN compares with nothing, so one would count as a tie, or as wrong."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    wrong = np.flatnonzero(~(finite if array.ndim == 1 else finite.all(axis=tuple(range(1, array.ndim)))))
    if len(wrong):
        more = f", as at {len(wrong) - 1} more places" if len(wrong) > 1 else ""
        raise DataError(f"{name}[{wrong[0]}] is {array[wrong[0]]}{more}: rewards and labels must be finite numbers")
    return array
