"""GenEval: does the image show the objects, numbers, colours and relations that the prompt names?

Scoring is pure: it takes detections and a prompt's metadata, so it needs no model.

    metadata = {"tag": "position", "prompt": "a photo of a cup left of a cow", "include": [
        {"class": "cow", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}]}

`correct` is the leaderboard's rule (at least `count` objects, fewer than any `exclude` count), `strict` wants exactly
`count` objects and ignores `exclude`, and `partial`, the mean of per-clause terms, is the less sparse training reward.

The released partial score has two quirks. Sixteen cups where one was asked for score 1 - 15/1 = -14, and one such
outlier sets the standard deviation of its whole group, so that all other differences vanish. Two objects in the wrong
relation score (1 + 1 + 0 + 1) / 4 = 0.75, because a 1 follows the 0: most of the reward for what was not drawn.
`quirks="clean"`, the default, clamps every term to [0, 1] and gives a clause the same terms whatever was found: number;
colour, if asked; position, if asked, which is 1 only when number, colour and relation all hold. The wrong relation then
scores 2/3. `quirks="reference"` reproduces published training rewards; `correct` and `strict` are the same in both.

Source: djghosh13/geneval (official rule) and yifan123/reward-server (strict rule and partial score).
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tiltflow.errors import DataError

TAGS: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS: Final = ("left of", "right of", "above", "below")
THRESHOLD: Final = 0.3  # a detection counts when its score is above this ...
COUNTING_THRESHOLD: Final = 0.9  # ... or above this for prompts with the tag "counting"
MAX_OBJECTS: Final = 16  # of one class, best first
POSITION_THRESHOLD: Final = 0.1  # share of both objects' sizes that an offset must exceed
_INCLUDE_FIELDS: Final = frozenset({"class", "count", "color", "position"})
_EXCLUDE_FIELDS: Final = frozenset({"class", "count"})


@dataclass(frozen=True)
class Detection:
    """One detected object; box in pixels, y downwards.

    Example: `Detection("cup", 20.0, 210.0, 100.0, 290.0, 0.77, "blue")`.
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    score: float  # in [0, 1]
    color: str | None = None  # None: not one of the colours, or not asked for


@dataclass(frozen=True)
class GenevalResult:
    """Scores of one image; `reasons` says, one line for each failed clause, why it is not `correct`."""

    correct: bool
    strict: bool
    partial: float  # clean: in [0, 1]; reference: at most 1, possibly far below 0
    reasons: tuple[str, ...]


def score_detections(
    detections: Sequence[Detection], metadata: Mapping[str, Any], *, quirks: Literal["clean", "reference"] = "clean"
) -> GenevalResult:
    """Score the objects found in one image against its prompt.

    Args:
        detections: Objects in any order; those at or below the threshold are dropped here.
        metadata: One line of a GenEval prompt file: `tag`, `include` and, optionally, `exclude`. A clause's
            `position` is [relation, index of an earlier clause].
        quirks: Rule of the partial score only; see the head of this module.

    Raises:
        DataError: If the metadata is malformed.
        ValueError: If `quirks` is unknown.
    """
    if quirks not in ("clean", "reference"):
        raise ValueError(f'quirks is {quirks!r}; choose "clean" or "reference"')
    include, exclude = _clauses(metadata, "include"), _clauses(metadata, "exclude")
    if not include:
        raise DataError("metadata has no include clause; give at least one {class, count}")
    objects = _kept_objects(detections, _known_tag(metadata.get("tag")))
    reasons = _official_reasons(objects, include, exclude)
    outcomes = _exact_outcomes(objects, include)
    terms_of = _clean_terms if quirks == "clean" else _reference_terms
    terms = [term for pair in zip(include, outcomes, strict=True) for term in terms_of(*pair)]
    strict, partial = all(outcome.matched for outcome in outcomes), math.fsum(terms) / len(terms)
    return GenevalResult(not reasons, strict, partial, tuple(reasons))


def colored_classes(metadata: Mapping[str, Any]) -> frozenset[str]:
    """Return the classes whose colour decides about a prompt; a detector need not name any other colour.

    Raises:
        DataError: If the metadata is malformed.
    """
    return frozenset(clause.label for clause in _clauses(metadata, "include") if clause.color is not None)


def check_findable(metadata: Mapping[str, Any], *, classes: Collection[str], colors: Collection[str]) -> None:
    """Check that what a prompt asks for is among what a detector can find: its score would be 0 for ever.

    Args:
        metadata: As for `score_detections`.
        classes: That the detector knows.
        colors: That it tells apart.

    Raises:
        DataError: It is not, or the metadata is malformed.
    """
    for clause in _clauses(metadata, "include"):
        for what, value, known in (("class", clause.label, classes), ("color", clause.color, colors)):
            if value is not None and value not in known:
                raise DataError(
                    f"the detector cannot find the {what} {value!r}, so the score would be 0 for ever; it knows "
                    f"{', '.join(known)}; take another detector, or leave such prompts out"
                )


@dataclass(frozen=True)
class _Clause:
    label: str
    count: int
    color: str | None
    position: tuple[str, int] | None  # relation, index of the target clause


@dataclass(frozen=True)
class _Outcome:
    """How one clause fared under the exact-count rule; a later test runs only when the earlier ones passed."""

    found: int
    colored: int | None = None  # objects of the right colour; None: not tested
    relation: Literal["untested", "no target", "wrong", "right"] = "untested"
    matched: bool = False


def _known_tag(tag: object) -> str:
    if not isinstance(tag, str) or tag not in TAGS:
        raise DataError(f"tag is {tag!r}; it must be one of {', '.join(TAGS)}")
    return tag


def _clauses(metadata: Mapping[str, Any], key: Literal["include", "exclude"]) -> list[_Clause]:
    """Read and check one list of clauses; an absent list is empty."""
    fields = _INCLUDE_FIELDS if key == "include" else _EXCLUDE_FIELDS
    clauses: list[_Clause] = []
    entries = metadata.get(key, ())
    if not isinstance(entries, list | tuple):
        raise DataError(f"metadata {key} is {entries!r}; it must be a list of mappings with class and count")
    for index, entry in enumerate(entries):
        where = f"metadata {key}[{index}] is {entry!r}"
        if not isinstance(entry, Mapping) or not fields.issuperset(entry):
            raise DataError(f"{where}; it must be a mapping with no keys but {', '.join(sorted(fields))}")
        label, count = entry.get("class"), entry.get("count")
        color, position = entry.get("color"), entry.get("position")
        if not isinstance(label, str) or not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise DataError(f"{where}; it needs class (text) and count (a whole number from 1)")
        if color is not None and (not isinstance(color, str) or color not in COLORS):
            raise DataError(f"{where}; color is one of {', '.join(COLORS)}")
        if position is not None:
            is_pair = isinstance(position, list | tuple) and len(position) == 2
            if not is_pair or position[0] not in RELATIONS or position[1] not in range(index):
                raise DataError(f"{where}; position is [{' | '.join(RELATIONS)}, index of an earlier clause]")
            position = (position[0], position[1])
        clauses.append(_Clause(label, count, color, position))
    return clauses


def _kept_objects(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Return each class's objects above the threshold, best first; equal scores are ordered by box, not by input."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for item in sorted(detections, key=lambda d: (-d.score, d.x1, d.y1, d.x2, d.y2, d.color or "")):
        same = objects.setdefault(item.label, [])
        if item.score > threshold and len(same) < MAX_OBJECTS:
            same.append(item)
    return objects


def _official_reasons(
    objects: Mapping[str, list[Detection]], include: Sequence[_Clause], exclude: Sequence[_Clause]
) -> list[str]:
    """Apply the leaderboard's rule to the best `count` objects of each clause; no reason means correct."""
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in include:
        found = objects.get(clause.label, [])[: clause.count]
        reason = _official_reason(clause, found, groups)
        reasons += [reason] if reason else []
        groups.append(None if reason else found)
    counts = [(clause, len(objects.get(clause.label, []))) for clause in exclude]
    return reasons + [f"expected {c.label}<{c.count}, found {n}" for c, n in counts if n >= c.count]


def _official_reason(clause: _Clause, found: list[Detection], groups: Sequence[list[Detection] | None]) -> str | None:
    """Return why a clause fails, in the official wording, or None."""
    label, count, color = clause.label, clause.count, clause.color
    if len(found) < count:
        return f"expected {label}>={count}, found {len(found)}"
    seen = Counter(item.color for item in found)
    if color is not None and seen[color] < count:
        listed = ", ".join(f"{seen[name]} {name}" for name in COLORS if seen[name])
        return f"expected {color} {label}>={count}, found {seen[color]} {color}; and {listed}"
    if clause.position is None:
        return None
    relation, index = clause.position
    targets = groups[index]
    if targets is None:
        return f"no target for {label} to be {relation}"
    for relations in (_relations(item, target) for item in found for target in targets):
        if relation not in relations:
            return f"expected {label} {relation} target, found {' and '.join(sorted(relations))} target"
    return None


def _exact_outcomes(objects: Mapping[str, list[Detection]], include: Sequence[_Clause]) -> list[_Outcome]:
    """Apply the exact-count rule: number, then colour, then position, each only after the one before held."""
    outcomes: list[_Outcome] = []
    for clause in include:
        found = objects.get(clause.label, [])
        if len(found) != clause.count:
            outcomes.append(_Outcome(len(found)))
            continue
        colored = None if clause.color is None else sum(item.color == clause.color for item in found)
        if colored not in (None, clause.count):
            outcomes.append(_Outcome(len(found), colored))
        elif clause.position is None:
            outcomes.append(_Outcome(len(found), colored, matched=True))
        else:
            name, index = clause.position
            targets = objects.get(include[index].label, [])
            holds = all(name in _relations(item, target) for item in found for target in targets)
            relation = "no target" if not outcomes[index].matched else "right" if holds else "wrong"
            outcomes.append(_Outcome(len(found), colored, relation, matched=relation == "right"))
    return outcomes


def _clean_terms(clause: _Clause, outcome: _Outcome) -> list[float]:
    """Return the clause's terms, each in [0, 1] and as many whatever was found."""
    terms = [max(0.0, _closeness(outcome.found, clause.count))]
    if clause.color is not None:
        terms.append(0.0 if outcome.colored is None else _closeness(outcome.colored, clause.count))
    if clause.position is not None:
        terms.append(float(outcome.relation == "right"))
    return terms


def _reference_terms(clause: _Clause, outcome: _Outcome) -> list[float]:
    """Return the terms of the released training reward, quirks included."""
    terms = [_closeness(outcome.found, clause.count)]
    if outcome.found != clause.count:
        return terms if clause.color is None and clause.position is None else [*terms, 0.0]
    if outcome.colored is not None:
        terms.append(_closeness(outcome.colored, clause.count))
    return terms + {"untested": [], "no target": [0.0], "wrong": [0.0, 1.0], "right": [1.0]}[outcome.relation]


def _closeness(number: int, wanted: int) -> float:
    return 1 - abs(number - wanted) / wanted


def _relations(item: Detection, target: Detection) -> set[str]:
    """Return where `item` lies as seen from `target`: none, one or (on a diagonal) two relations."""
    offset = ((item.x1 + item.x2 - target.x1 - target.x2) / 2, (item.y1 + item.y2 - target.y1 - target.y2) / 2)
    sizes = (item.x2 - item.x1 + target.x2 - target.x1, item.y2 - item.y1 + target.y2 - target.y1)
    beyond = [max(abs(o) - POSITION_THRESHOLD * size, 0.0) for o, size in zip(offset, sizes, strict=True)]
    if max(beyond) < 1e-3:
        return set()
    dx, dy = (math.copysign(b, o) / math.hypot(*offset) for b, o in zip(beyond, offset, strict=True))
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}
