"""A watch for reward hacking: the training reward rises, as far as it can tell, while a held-out reward falls.

Every evaluation is compared, image by image over the same prompts and noise, with the one at which that held-out reward
stood best. Compared with its neighbours, a slow fall would never show; compared with the best of many, an evaluation
looks worse by chance alone. So the bar is that of all comparisons a run can make (Bonferroni): with E evaluations after
the first and H held-out rewards there are H E (E + 1) / 2 pairs, and each may alarm by chance with the probability 0.05
over that number. Whichever pairs the search for the best picks, a run in which nothing falls is then warned in at most
5% of cases (of 1,000 simulated runs with 40 evaluations of 64 prompts: 2.9%, and two warnings in a row in 0.1%; a
steady fall of 6 standard errors in all is met around the 18th evaluation). Chance is what differs from prompt to
prompt: a generator that swings to and fro as a whole, alike for all prompts, falls and recovers in truth, and
`patience` decides how long that may last.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

from tiltflow.evaluation.results import EvaluationResult
from tiltflow.evaluation.statistics import paired_score
from tiltflow.evaluation.summary import paired_rows
from tiltflow.rewards import RewardArguments
from tiltflow.rewards.registry import subject

FALSE_ALARMS: Final = 0.05  # probability of any warning in a run in which nothing falls


@dataclass(frozen=True)
class Sign:
    """One held-out reward that fell while a training reward rose, or while training was on one that tells no rise.

    Example: `Sign("hps", fall=-0.021, score=-4.4, since="before", training="pick", rise=0.4)`.
    """

    held_out: str
    fall: float  # mean change over the same prompts and noise
    score: float  # of that change, in standard deviations of chance
    since: str  # the evaluation at which it stood best
    training: str
    rise: float | None  # change of the training reward's mean over the same epochs; None: it has no such mean

    def __str__(self) -> str:
        fell = f"held-out reward {self.held_out!r} fell by {-self.fall:.4g} since {self.since!r} while"
        if self.rise is not None:
            return f"{fell} the training reward {self.training!r} rose by {self.rise:.4g}"
        return (
            f"{fell} {self.training!r} was trained on, which only compares the images of a prompt with each other: its "
            "mean does not tell whether it rose"
        )


def held_out(measured: Sequence[RewardArguments], trained: Sequence[RewardArguments]) -> list[str]:
    """Return the names of the rewards that are measured and not trained on, whatever they are called there.

    One that is trained on with another scale, as ranks or in another dtype is no witness. A training reward of weight 0
    is only watched, so it is held out too.
    """
    known = {subject(reward) for reward in trained if reward.weight != 0}
    return [reward.name for reward in measured if subject(reward) not in known]


def alarm_limit(held_out: int, evaluations: int) -> float:
    """Return how many standard deviations of chance a fall must reach, so that chance seldom warns in a whole run.

    Args:
        held_out: How many rewards are held out, H.
        evaluations: How many evaluations follow the first, E.

    Returns:
        z with P(Z > z) = 0.05 / (H E (E + 1) / 2), such as 3.1 for 9 evaluations and 3.8 for 40 of one reward.
    """
    pairs = max(1, held_out) * max(1, evaluations) * (max(1, evaluations) + 1) / 2
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / pairs)


class HackingWatch:
    """Follows a run's evaluations and says when they look like reward hacking.

    `mute` names the held-out rewards without a value on at least two prompts in the newest evaluation: they witness
    nothing.
    """

    def __init__(
        self, held_out: Sequence[str], *, evaluations: int, patience: int | None, relative: Sequence[str] = ()
    ):
        """Start without any evaluation.

        Args:
            held_out: The rewards that are watched; `held_out()` tells them.
            evaluations: How many evaluations the run has after the first.
            patience: How many evaluations in a row with a sign end the run; None never ends it.
            relative: Training rewards that compare the images of a prompt with each other, such as ranks: their means
                stay where they are, so that beside one of them a fall alone is a sign.
        """
        self._held_out = tuple(held_out)
        self._patience = patience
        self._relative = tuple(relative)
        self._limit = alarm_limit(len(held_out), evaluations)
        self._best: dict[str, tuple[EvaluationResult, Mapping[str, float]]] = {}
        self.seen = 0
        self.streak = 0
        self.mute: list[str] = []

    def observe(self, result: EvaluationResult, training: Mapping[str, float]) -> Sequence[Sign]:
        """Take the newest evaluation and the training rewards that led to it; return the signs of hacking.

        Args:
            result: Of the same prompts and samples as those before.
            training: Mean of each training reward in the epochs that led to it; more is what training is after.

        Raises:
            DataError: It is of other prompts or samples.
        """
        result = replace(result, pictures={})  # it may be kept for the rest of the run
        self.mute = [name for name in self._held_out if _prompts(result, name) < 2]
        signs = [self._compare(name, result, training) for name in self._held_out if name not in self.mute]
        found = [sign for sign in signs if sign is not None]
        self.seen += 1
        self.streak = self.streak + 1 if found else 0
        return found

    @property
    def should_stop(self) -> bool:
        """Whether the patience is at its end."""
        return self._patience is not None and self.streak >= self._patience

    def _compare(self, name: str, result: EvaluationResult, training: Mapping[str, float]) -> Sign | None:
        """Compare with the best evaluation of a reward so far; the newest takes its place if it is better."""
        if name not in self._best:
            self._best[name] = result, training
            return None
        best, before = self._best[name]
        change, score = fall_score(best, result, name)
        if change > 0:
            self._best[name] = result, training
        if not score < -self._limit:
            return None
        rises = {key: training[key] - value for key, value in before.items() if key in training}
        most = max(rises, key=lambda key: rises[key], default=None)
        if most is not None and rises[most] > 0:
            return Sign(name, change, score, best.name, most, rises[most])
        return Sign(name, change, score, best.name, self._relative[0], None) if self._relative else None


def fall_score(earlier: EvaluationResult, later: EvaluationResult, name: str) -> tuple[float, float]:
    """Return the mean change of a reward and its score: the paired t-test over prompts as a standard normal.

    Raises:
        DataError: The two are not of the same prompts and samples.
    """
    rows = paired_rows(earlier, later)
    scores = [(first.scores.get(name), second.scores.get(name)) for first, second in rows]
    changes = [math.nan if old is None or new is None else new - old for old, new in scores]
    return paired_score(changes, [first.group for first, _ in rows])


def _prompts(result: EvaluationResult, name: str) -> int:
    return len({row.group for row in result.rows if row.scores.get(name) is not None})
