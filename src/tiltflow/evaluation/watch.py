"""A watch for reward hacking: the training reward rises while a held-out reward falls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiltflow.evaluation.results import EvaluationResult
from tiltflow.evaluation.summary import paired_difference


@dataclass(frozen=True)
class Sign:
    """One held-out reward that fell while a training reward rose.

    Example: `Sign("hps", fall=-0.021, training="pick", rise=0.4)`.
    """

    held_out: str
    fall: float  # mean change over the same prompts and noise, its 95% interval below zero
    training: str
    rise: float  # change of the training reward's mean over the same epochs

    def __str__(self) -> str:
        return (
            f"held-out reward {self.held_out!r} fell by {-self.fall:.4g} while the training reward {self.training!r} "
            f"rose by {self.rise:.4g}"
        )


def hacking_signs(
    earlier: EvaluationResult,
    later: EvaluationResult,
    *,
    training_before: Mapping[str, float],
    training_after: Mapping[str, float],
) -> list[Sign]:
    """Compare two evaluations of one run on the same prompts and noise.

    A held-out reward has fallen when the 95% interval of its paired difference lies below zero. Rewards that are also
    trained on are no witnesses: their rise or fall is what training is about.

    Args:
        earlier: The evaluation that is compared with.
        later: The newest evaluation.
        training_before: Mean of each training reward in the epochs that led to `earlier`.
        training_after: The same for `later`.

    Returns:
        A sign per held-out reward that fell, if any training reward rose; none otherwise.

    Raises:
        DataError: The two are not of the same prompts and samples.
    """
    rises = {name: training_after[name] - before for name, before in training_before.items() if name in training_after}
    risen = {name: rise for name, rise in rises.items() if rise > 0}
    if not risen:
        return []
    training = max(risen, key=lambda name: risen[name])
    signs: list[Sign] = []
    for name in dict.fromkeys(name for row in later.rows for name in row.scores):
        if name in training_before:
            continue
        difference = paired_difference(earlier, later, name.lower())
        if difference.high < 0:
            signs.append(Sign(name, difference.value, training, risen[training]))
    return signs


class HackingWatch:
    """Follows a run's evaluations and says when they look like reward hacking.

    Every evaluation is compared with the one at which the held-out rewards stood before the first fall in a row.
    """

    def __init__(self, *, patience: int | None):
        """Start without any evaluation.

        Args:
            patience: How many evaluations in a row with a sign end the run; None never ends it.
        """
        self._patience = patience
        self._anchor: tuple[EvaluationResult, Mapping[str, float]] | None = None
        self.streak = 0

    def observe(self, result: EvaluationResult, training: Mapping[str, float]) -> Sequence[Sign]:
        """Take the newest evaluation and the training rewards that led to it; return the signs of hacking."""
        signs: list[Sign] = []
        if self._anchor is not None:
            earlier, before = self._anchor
            signs = hacking_signs(earlier, result, training_before=before, training_after=training)
        if signs:
            self.streak += 1
        else:
            self.streak = 0
            self._anchor = (result, training)
        return signs

    @property
    def should_stop(self) -> bool:
        """Whether the patience is at its end."""
        return self._patience is not None and self.streak >= self._patience
