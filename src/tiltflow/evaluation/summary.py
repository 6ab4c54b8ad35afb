"""Numbers from the rows of an evaluation: the summary of one, the difference of two, a table of several."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tiltflow.errors import DataError
from tiltflow.evaluation.results import EvaluationResult, EvaluationRow
from tiltflow.evaluation.statistics import Estimate, Floats, estimate_known, estimate_stratified, paired_score
from tiltflow.rewards.geneval import TAGS
from tiltflow.runtime.tables import aligned

# Of fewer prompts the 95% intervals are clearly too short: with 6 they leave the truth out in 14 of 100 cases.
FEW_PROMPTS: Final = 10
_CERTAIN: Final = 1.96  # standard deviations of chance: 5%, both sides

# What a reward tells when it judges as GenEval does.
_TAGGED: Final = frozenset({"tag", "correct", "strict", "partial"})


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean change and its interval, with a test against chance that holds its level for few prompts too.

    The interval alone does not: of 2 prompts it excludes zero in half of all cases in which nothing has changed.
    """

    score: float  # of the change, in standard deviations of chance, as `paired_score` tells; NaN: not known

    @property
    def is_certain(self) -> bool:
        """Whether chance alone is an unlikely cause: the interval excludes zero and a t-test over prompts agrees."""
        return (self.low > 0 or self.high < 0) and abs(self.score) > _CERTAIN


def few_prompts_note(prompts: int) -> str:
    """Return a warning of intervals over few prompts, or "" for enough of them."""
    return f"Few prompts ({prompts}): the 95% intervals are too short." if prompts < FEW_PROMPTS else ""


def summarise(rows: Sequence[EvaluationRow]) -> dict[str, Estimate]:
    """Return every key's estimate; the prefix of a key is its reward's name in lower case.

    `<reward>` is the mean score and `<reward>_failures` the number of images without one. Where the reward tells
    `tag`, `correct` and `strict`: `<reward>_correct`, `<reward>_strict` (unweighted means over tags), the same of each
    tag with `_<tag>` added, and `<reward>_partial`, the mean score again under GenEval's name for it.
    """
    groups = np.array([row.group for row in rows])
    summary = {key: column.estimate(groups) for key, column in _columns(rows).items()}
    for name in _reward_names(rows):
        failures = sum(row.scores.get(name) is None for row in rows)
        summary[f"{name.lower()}_failures"] = Estimate(float(failures), math.nan, math.nan, len(rows))
    return summary


def paired_rows(before: EvaluationResult, after: EvaluationResult) -> list[tuple[EvaluationRow, EvaluationRow]]:
    """Return the rows of two evaluations of the same prompts and samples, image by image.

    Raises:
        DataError: The two were not measured on the same prompts and samples.
    """
    first, second = ({(row.group, row.sample): row for row in result.rows} for result in (before, after))
    if {place: row.prompt for place, row in first.items()} != {place: row.prompt for place, row in second.items()}:
        raise DataError(
            f"{before.name!r} ({len(before.rows)} images) and {after.name!r} ({len(after.rows)} images) are not of the "
            "same prompts and samples; evaluate both with one config and one prompt file"
        )
    return [(first[place], second[place]) for place in sorted(first)]


def paired_difference(before: EvaluationResult, after: EvaluationResult, key: str) -> Difference:
    """Return after - before of one key of the summary, image by image over the same prompts and samples.

    Raises:
        DataError: The two were not measured on the same prompts and samples, or have no such key.
    """
    rows = paired_rows(before, after)
    columns = [_columns([pair[side] for pair in rows]) for side in (0, 1)]
    if not all(key in part for part in columns):
        raise DataError(
            f"key {key!r} has no value per image; keys of both: {', '.join(columns[0].keys() & columns[1])}"
        )
    old, new = (part[key] for part in columns)
    groups = np.array([row.group for row, _ in rows])
    changes = new.values - old.values
    # A difference is never a rate, even where it happens to hold only zeros and ones.
    found = estimate_known(changes, groups, new.strata, rate=False)
    _, score = paired_score(changes * _stratum_weights(changes, new.strata), groups)
    return Difference(found.value, found.low, found.high, found.count, score)


def compare_table(results: Sequence[EvaluationResult]) -> str:
    """Return a plain text table: one line a key, one column a result, `value [low, high]` in the cells."""
    keys = list(dict.fromkeys(key for result in results for key in result.summary))
    lines = [["", *(result.name for result in results)]]
    for key in keys:
        lines.append([key, *(str(result.summary[key]) if key in result.summary else "-" for result in results)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return aligned([lines[0], ["-" * width for width in widths], *lines[1:]])


@dataclass(frozen=True)
class _Column:
    """What one key of the summary is computed from."""

    values: Floats  # [N], NaN: not part of it
    strata: NDArray[Any]  # [N]; all alike for a plain mean

    def estimate(self, groups: NDArray[Any]) -> Estimate:
        return estimate_stratified(self.values, groups, self.strata)


def _columns(rows: Sequence[EvaluationRow]) -> dict[str, _Column]:
    columns: dict[str, _Column] = {}
    plain = np.zeros(len(rows), dtype=np.int64)
    for name in _reward_names(rows):
        prefix = name.lower()
        scores = np.array([_number(row.scores.get(name)) for row in rows])
        columns[prefix] = _Column(scores, plain)
        infos = [row.info.get(name, {}) for row in rows]
        if not any(info.keys() >= _TAGGED for info in infos):
            continue
        tags = np.array([str(info.get("tag", "")) for info in infos])
        partial = np.array([_number(info.get("partial")) for info in infos])
        columns[f"{prefix}_partial"] = _Column(partial, plain)
        for kind in ("correct", "strict"):
            values = np.array([_number(info.get(kind)) for info in infos])
            columns[f"{prefix}_{kind}"] = _Column(values, tags)
            for tag in _ordered_tags(tags[np.isfinite(values)].tolist()):
                columns[f"{prefix}_{kind}_{tag}"] = _Column(np.where(tags == tag, values, math.nan), plain)
    return columns


def _stratum_weights(values: Floats, strata: NDArray[Any]) -> Floats:
    """Return what each image counts, `[N]`, so that the plain mean of all becomes the mean of the strata's means."""
    known = np.isfinite(values)
    names, place = np.unique(strata, return_inverse=True)
    sizes = np.bincount(place, weights=known, minlength=len(names))
    return known.sum() / (max(1, (sizes > 0).sum()) * np.maximum(sizes, 1.0)[place])


def _reward_names(rows: Sequence[EvaluationRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def _ordered_tags(tags: Iterable[str]) -> list[str]:
    """Return the distinct tags, GenEval's first and in its order."""
    present = sorted(set(tags))
    return [tag for tag in TAGS if tag in present] + [tag for tag in present if tag not in TAGS]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
